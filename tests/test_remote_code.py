"""Models with code of their own: a row for DeepSeek's blocks, and transformers' own class where there is one."""

import json
import shutil
from pathlib import Path

import families
import pytest
import torch
from families import IDS
from helpers import relative
from safetensors.torch import save_file
from test_blocks import REFERENCE, assert_same_gradients, step
from transformers import AutoConfig, AutoModelForCausalLM

import ktmoe
from ktmoe import KTError
from ktmoe.models import attach, detach, moe_layers


CODE = Path(__file__).parent / "remote_code" / "modeling_remote.py"
MAP = {"AutoConfig": "modeling_remote.RemoteConfig", "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM"}


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """A checkpoint whose class is in a file beside it."""
    block = getattr(request, "param", "DeepseekV2MoE")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = tmp_path / f"remote_{block.lower()}"
    made.mkdir()
    shutil.copy(CODE, made)
    config = {"model_type": "remote_code", "auto_map": MAP, "block": block, "architectures": ["RemoteForCausalLM"]}
    (made / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(made, trust_remote_code=True), trust_remote_code=True
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in model.state_dict().items()}
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


both = pytest.mark.parametrize("folder", ["DeepseekV2MoE", "DeepseekV3MoE"], indirect=True)


@both
def test_equals_the_remote_code(folder):
    made, streamed = stock(folder), ktmoe.load_model(folder, REFERENCE, r=4, trust_remote_code=True)
    attached = attach(stock(folder), REFERENCE)
    assert type(made).__module__.startswith("transformers_modules.")
    expected = families.logits(made)
    for other in (streamed, attached):
        assert len(moe_layers(other)) == 2
        assert relative(families.logits(other), expected) < 1e-5
    assert torch.equal(families.logits(detach(attached)), expected)


def test_training_has_the_auxiliary_loss(folder):
    made, attached = stock(folder), attach(stock(folder), REFERENCE)
    (a, expected), (b, got) = step(made), step(attached)
    torch.testing.assert_close(b.loss, a.loss)
    assert_same_gradients(got, expected)
    assert expected["layers.0.mlp.gate.weight"].abs().sum() > 0


@pytest.mark.parametrize("folder", ["DeepseekV3MoE"], indirect=True)
def test_what_is_for_inference_alone_trains(folder):
    """DeepSeek-V3's code refuses training; here a step has the loss of evaluation, and a gradient for the router."""
    made, attached = stock(folder), attach(stock(folder), REFERENCE)
    with pytest.raises(AssertionError):
        step(made)
    out, gradients = step(attached)
    torch.testing.assert_close(out.loss, made.eval()(IDS, labels=IDS).loss)
    assert gradients["layers.0.mlp.gate.weight"].abs().sum() > 0
    assert gradients["embeddings"].abs().sum() > 0


def test_it_is_not_run_unasked(folder):
    with pytest.raises(KTError, match="trust_remote_code"):
        ktmoe.load_model(folder, REFERENCE)


def test_code_that_does_not_run_here(folder):
    code = folder / CODE.name
    code.write_text(code.read_text().replace("class Layer(", "from transformers import NoSuchName\n\n\nclass Layer("))
    with pytest.raises(KTError, match=r"NoSuchName"):
        ktmoe.load_model(folder, REFERENCE, trust_remote_code=True)


def test_the_native_class_wins(tmp_path):
    families.model("Mixtral").save_pretrained(tmp_path)
    expected = families.logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": MAP}))
    (tmp_path / CODE.name).write_text("raise RuntimeError('remote code was run')\n")
    with pytest.warns(UserWarning, match=r"MixtralConfig\); its remote code is not run"):
        streamed = ktmoe.load_model(tmp_path, REFERENCE, r=4, trust_remote_code=True)
    assert type(streamed).__module__.startswith("transformers.models.mixtral")
    assert relative(families.logits(streamed), expected) < 1e-5
