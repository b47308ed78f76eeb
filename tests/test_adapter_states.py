"""What must not be left half done: targets, merging, loading, attaching. A refusal leaves everything as it was."""

import dataclasses

import pytest
import torch
from families import logits, model
from helpers import BF16_KERNELS, weights
from safetensors.torch import load_file, save_file
from test_models import REFERENCE, lora, moved

import ktmoe
from ktmoe import KTConfig, KTError, MoEExperts
from ktmoe.adapters.model import get_peft_model
from ktmoe.gate import gate
from ktmoe.models import attach, moe_layers, summary


def layers_with_lora(made):
    names = {
        n.split(".mlp.experts.")[0].rsplit(".", 1)[-1] for n, _ in made.named_parameters() if ".experts.lora_A" in n
    }
    return sorted(int(n) for n in names)


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("Qwen3-MoE", ["model.layers.0.mlp.experts", "q_proj"], [0]),
        ("Qwen3-MoE", r".*layers\.[02]\.mlp\.experts", [0, 2]),
        ("Qwen3-MoE", r".*(embed_tokens|q_proj)", []),
        ("DeepSeek-V2", ["shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"], []),
        ("DeepSeek-V2", ["shared_experts.gate_proj"], []),
        ("DeepSeek-V2", ["gate_proj", "up_proj", "down_proj"], [1, 2]),
    ],
)
def test_exactly_the_asked_layers_get_lora(family, targets, expected, tmp_path):
    made = moved(get_peft_model(attach(model(family), REFERENCE), lora(target_modules=targets)))
    assert layers_with_lora(made) == expected
    if isinstance(targets, str) and "embed" in targets:
        assert any("embed_tokens.lora_embedding_A" in n for n, _ in made.named_parameters())
    made.save_pretrained(tmp_path)
    again = ktmoe.load_adapter(attach(model(family), REFERENCE), tmp_path)
    assert layers_with_lora(again) == expected
    assert torch.equal(logits(again), logits(made))


def test_a_refused_attach_changes_nothing():
    m = model()
    before = logits(m)
    for bad in (dict(use_dora=True), dict(lora_bias=True), dict(init_lora_weights="olora")):
        with pytest.raises(KTError):
            attach(m, REFERENCE, lora=lora("experts", "q_proj", **bad))
        assert moe_layers(m) == {}
    assert torch.equal(logits(m), before)
    attach(m, REFERENCE, lora=lora("experts", "q_proj"))


def test_an_adapter_that_does_not_load_does_not_stay(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("experts", "q_proj")))
    made.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    save_file(dict(list(good.items())[3:]), path, metadata={"format": "pt"})
    with pytest.raises(KTError, match="does not fit"):
        made.load_adapter(str(tmp_path), "other")
    assert list(made.peft_config) == ["default"]
    save_file(good, path, metadata={"format": "pt"})
    made.load_adapter(str(tmp_path), "other")
    expected = logits(made)
    made.set_adapter("other")
    assert torch.equal(logits(made), expected)


def test_selected_adapters_and_refused_options(tmp_path):
    made = moved(attach(model(), REFERENCE, lora=lora("experts", "q_proj")))
    made.add_adapter("other", lora("experts", r=2))
    made.save_pretrained(str(tmp_path), True, ["other"])
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["other"]
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(KTError, match="safe_serialization"):
        made.save_pretrained(str(tmp_path), safe_serialization=False)
    for modules in (["experts"], ["mlp"], ["layers.1"]):
        with pytest.raises(KTError, match=r"modules_to_save.*routed experts"):
            get_peft_model(attach(model(), REFERENCE), lora("q_proj", modules_to_save=modules))
    with pytest.raises(KTError, match="low_cpu_mem_usage"):
        get_peft_model(attach(model(), REFERENCE), lora("experts"), low_cpu_mem_usage=True)
    assert get_peft_model(attach(model(), REFERENCE), lora("experts", modules_to_save=["lm_head"]))


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "16", True])
def test_lora_alpha_is_a_number_above_zero(alpha):
    with pytest.raises(KTError, match="lora_alpha: got"):
        MoEExperts(weights(), top_k=2, r=4, lora_alpha=alpha, config=REFERENCE)


def test_lora_of_its_own_is_not_hidden_by_peft():
    m = torch.nn.Sequential()
    m.add_module("experts", MoEExperts(weights(), top_k=2, r=4, config=REFERENCE))
    with pytest.raises(KTError, match="LoRA of their own"):
        get_peft_model(m, lora("experts", task_type=None))


def test_expert_lora_stays_fp32_on_the_cpu():
    made = attach(model(), REFERENCE, lora=lora("experts", "q_proj"))
    made.to(torch.bfloat16)
    assert {p.dtype for n, p in made.named_parameters() if ".experts." in n} == {torch.float32}
    assert torch.isfinite(logits(made)).all()


@pytest.mark.parametrize("name", BF16_KERNELS)
def test_an_evaluation_before_the_adapter_is_added(name):
    attached = attach(model(dtype=torch.bfloat16), KTConfig(kt_backend=name, kt_max_len=64))
    before = logits(attached)
    made = get_peft_model(attached, lora("experts"))
    assert torch.equal(logits(made), before)  # B starts at zero
    with pytest.raises(KTError, match="at most 16"):
        made.add_adapter("large", lora("experts", r=32))


@pytest.mark.parametrize("name", BF16_KERNELS)
def test_a_layer_that_falls_back_is_reported(name, monkeypatch):
    monkeypatch.setattr(gate, "probe_problems", lambda *args: ["output of expert 1: wrong"])
    config = KTConfig(kt_backend=name, kt_max_len=64, kt_fallback="torch")
    made = attach(model(dtype=torch.bfloat16), config, r=4)
    assert {m.plan.backend for m in moe_layers(made).values()} == {"torch"}
    assert "routed experts on torch" in summary(made)[0]
    first = next(iter(moe_layers(made).values()))
    first.plan = dataclasses.replace(first.plan, backend=name)
    assert "2 layers on torch" in summary(made)[0]
