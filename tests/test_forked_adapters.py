"""Adapters of the forked training stack: expert LoRA in a file of its own; and what else lies beside an adapter."""

import hashlib
import json

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from test_models import REFERENCE, logits, lora, model, moved

import ktmoe
from ktmoe import KTError
from ktmoe.adapters.beside import EXPERTS_FILE, MANIFEST
from ktmoe.models import attach


def forked(folder, manifest=True, alpha=8):
    """The adapter of a model, as the forked stack would have saved it: the model, with numbers that matter."""
    trained = moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts")))
    trained.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if ".experts." not in k}, path, metadata={"format": "pt"})
    tensors = {}
    for name, module in trained.named_modules():
        if type(module).__name__ == "LoraExperts":
            layer = name.split(".layers.")[1].split(".")[0]
            for key, parameter in module.stacked("default").items():
                projection, side = key.split(".")
                short = f"{projection.removesuffix('_proj')}_{side.lower()}"
                tensors[f"layers.{layer}.experts.{short}"] = parameter.detach().clone()
    save_file(tensors, folder / EXPERTS_FILE)
    if manifest:
        digest = hashlib.sha256((folder / EXPERTS_FILE).read_bytes()).hexdigest()
        written = {"lora": {"rank": 4, "alpha": alpha}, "artifacts": {EXPERTS_FILE: {"sha256": digest}}}
        (folder / MANIFEST).write_text(json.dumps(written))
    return trained, tensors


@pytest.mark.parametrize("manifest", [True, False])
def test_it_is_read_and_saved_again_in_peft_s_format(manifest, tmp_path):
    trained, _ = forked(tmp_path, manifest)
    again = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(trained))
    again.save_pretrained(tmp_path)  # into the same folder: the stale file goes
    assert not (tmp_path / EXPERTS_FILE).exists()
    assert not (tmp_path / MANIFEST).exists()
    assert any(".experts.3.up_proj.lora_B" in k for k in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)), logits(trained))


def test_the_manifest_s_alpha_scales_the_experts(tmp_path):
    forked(tmp_path, alpha=32)
    made = ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    scales = {type(m).__name__: m.scaling["default"] for m in made.modules() if isinstance(m, LoraLayer)}
    assert scales == {"Linear": 2.0, "LoraExperts": 8.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop("layers.1.experts.up_lora_b"), r"up_proj.lora_B of model.layers.1.mlp.experts is missing"),
        (lambda t, c: [t.pop(k) for k in list(t) if "layers.2" in k], "layers.2.mlp.experts is missing"),
        (lambda t, c: t.update({"layers.1.experts.up_lora_a": torch.zeros(4, 5, 64)}), r"\(4, 5, 64\), expected"),
        (lambda t, c: t.update({"layers.9.experts.up_lora_a": torch.zeros(4, 4, 64)}), "layers.9.* not of this model"),
        (lambda t, c: t.update({"layers.1.router.weight": torch.zeros(4)}), "router.weight is not of this model"),
        (lambda t, c: c.update(use_rslora=True), "use_rslora"),
    ],
)
def test_what_does_not_fit_is_refused_whole(change, message, tmp_path):
    _, tensors = forked(tmp_path, manifest=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / EXPERTS_FILE)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = attach(model(), REFERENCE)
    before = logits(base)
    with pytest.raises(KTError, match=message):
        ktmoe.load_adapter(base, tmp_path)
    assert torch.equal(logits(base), before)


def test_damage_and_ambiguity(tmp_path):
    trained, tensors = forked(tmp_path)
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / EXPERTS_FILE)
    with pytest.raises(KTError, match=f"not the file that {MANIFEST} was written for"):
        ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    (tmp_path / MANIFEST).write_text("[")
    with pytest.raises(KTError, match=f"{MANIFEST}: damaged"):
        ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    (tmp_path / EXPERTS_FILE).write_bytes(b"short")
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(KTError, match=f"{EXPERTS_FILE}: damaged"):
        ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)
    trained.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / EXPERTS_FILE)
    with pytest.raises(KTError, match=f"in adapter_model.safetensors and in {EXPERTS_FILE}"):
        ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)


@pytest.mark.parametrize("name", ["expert_lora.safetensors", "non_lora_trainables.bin", "router.pt"])
def test_trained_numbers_that_nothing_reads_are_refused_by_name(name, tmp_path):
    attach(model(), REFERENCE, lora=lora("experts")).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"numbers")
    with pytest.raises(KTError, match=f"{name} beside the adapter"):
        ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)


def test_what_a_trainer_and_a_model_leave_there_is_none_of_them(tmp_path):
    attach(model(), REFERENCE, lora=lora("experts")).save_pretrained(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "training_args.bin", "README.md",
                 "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    ktmoe.load_adapter(attach(model(), REFERENCE), tmp_path)


def test_it_is_merged_too(tmp_path):
    from helpers import relative
    from transformers import AutoModelForCausalLM

    trained, _ = forked(tmp_path / "adapter")
    model().save_pretrained(tmp_path / "model")
    ktmoe.merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(merged), logits(trained)) < 1e-5
