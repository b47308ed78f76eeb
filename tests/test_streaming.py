"""Around `load_model`: where the rest goes, what is shown, what a failure leaves behind, and what cannot be saved."""

import json

import families
import pytest
import torch
import transformers
from families import logits, model
from helpers import BF16_KERNELS
from safetensors.torch import load_file, save_file
from test_models import REFERENCE, lora
from transformers import Trainer, TrainingArguments

import ktmoe
from ktmoe import KTConfig, KTError
from ktmoe.checkpoints.reader import Checkpoint
from ktmoe.models import attach, moe_layers


def saved(family, folder, change=None, **changes):
    """A checkpoint in one file, with its tensors changed by a function."""
    made = model(family, **changes)
    made.save_pretrained(folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return made


PARTS = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", PARTS | {"model.layers": "disk"}], ids=str)
def test_device_map_of_the_rest(device_map, tmp_path):
    made = saved("Qwen3-MoE", tmp_path / "model")
    streamed = ktmoe.load_model(
        tmp_path / "model", REFERENCE, r=4, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits(streamed), logits(made), rtol=1e-5, atol=1e-5)
    for experts in moe_layers(streamed).values():
        assert all(p.device.type == "cpu" for p in experts.parameters())


def test_a_device_map_without_weights_is_refused(tmp_path):
    saved("Qwen3-MoE", tmp_path)
    for device_map in ("meta", {"": "meta"}):
        with pytest.raises(KTError, match=r"device_map: .* there are no weights"):
            ktmoe.load_model(tmp_path, REFERENCE, r=4, device_map=device_map)


@pytest.mark.parametrize("family", ["DeepSeek-V3", "GLM4-MoE"])
def test_layers_for_multi_token_prediction_are_skipped(family, tmp_path):
    """They are in the files as one layer more, which transformers does not build."""

    def add(tensors):
        tensors |= {k.replace("layers.2.", "layers.3."): v + 1 for k, v in tensors.items() if "layers.2." in k}
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)

    made = saved(family, tmp_path, add)
    streamed = ktmoe.load_model(tmp_path, REFERENCE, r=4)
    assert len(moe_layers(streamed)) == 2
    torch.testing.assert_close(logits(streamed), logits(made), rtol=1e-5, atol=1e-5)


def test_configurations_of_later_releases(tmp_path):
    """5.23 writes num_local_experts where others write num_experts; transformers 4 builds its default number then."""
    made = saved("Qwen3-MoE", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("num_experts", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": families.E}))
    if transformers.__version__.startswith("4."):
        with pytest.raises(
            KTError, match=r"mlp\.gate\.weight is \(4, 64\); the model's configuration says \(128, 64\)"
        ):
            ktmoe.load_model(tmp_path, REFERENCE, r=4)
        return
    torch.testing.assert_close(logits(ktmoe.load_model(tmp_path, REFERENCE, r=4)), logits(made), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["self_attn.q_proj", "mlp.gate"])
def test_a_tensor_outside_the_experts_is_mis_shaped(key, tmp_path):
    key = f"model.layers.1.{key}.weight"
    saved("Qwen3-MoE", tmp_path, lambda tensors: tensors.update({key: torch.zeros(3, 64)}))
    with pytest.raises(KTError, match=rf"model\.safetensors: {key} is \(3, 64\); the model's configuration says"):
        ktmoe.load_model(tmp_path, REFERENCE, r=4)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    """Reading a memory map behind the end of its file kills the process; no exception can be caught."""
    saved("Qwen3-MoE", tmp_path)
    checkpoint, file = Checkpoint(tmp_path), tmp_path / "model.safetensors"
    with open(file, "r+b") as shard:
        shard.truncate(file.stat().st_size // 2)
    with torch.device("meta"):
        skeleton = families.build("Qwen3-MoE", families.config("Qwen3-MoE"))
    with pytest.raises(KTError, match=r"model\.safetensors: \S+ cannot be read: the file has"):
        attach(skeleton, REFERENCE, r=4, checkpoint=checkpoint)


@pytest.mark.parametrize("name", BF16_KERNELS)
def test_a_failure_leaves_no_kernel_object_behind(name, tmp_path):
    """The last layer's weights are NaN, which only its load probe finds: what the others packed is used again."""
    config = KTConfig(kt_backend=name, kt_num_threads=2, kt_max_len=96, kt_share_backward="on")

    def spoil(tensors):
        tensors["model.layers.2.mlp.experts.3.down_proj.weight"][:] = float("nan")

    saved("Qwen3-MoE", tmp_path / "bad", spoil)
    made = saved("Qwen3-MoE", tmp_path / "good")
    with pytest.raises(KTError, match=r"weights: expert 3 gives NaN") as failure:
        ktmoe.load_model(tmp_path / "bad", config, r=4)
    good = ktmoe.load_model(tmp_path / "good", config, r=4)
    assert [m.load(4).reloaded for m in moe_layers(good).values()] == [True, True, True]
    assert failure.tb is not None  # kept until here, as an interactive session keeps it: it holds what was loaded
    assert (logits(good) - logits(made)).abs().mean() < 0.05 * logits(made).abs().mean()


@pytest.mark.parametrize("targets", [["gate_proj"], ["no_such_module"]])
def test_a_refused_adapter_leaves_the_model_as_it_was(targets):
    made = model()
    types = {n: type(m) for n, m in made.named_modules()}
    with pytest.raises(ValueError, match=r"target_modules: got|not found in the base model"):
        attach(made, REFERENCE, lora=lora(target_modules=targets))
    assert {n: type(m) for n, m in made.named_modules()} == types
    assert type(made).save_pretrained is made.save_pretrained.__func__


def test_the_bar_says_what_it_does_and_how_fast(tmp_path, capfd):
    saved("Qwen3-MoE", tmp_path, num_hidden_layers=8)
    ktmoe.load_model(tmp_path, KTConfig(kt_backend="torch"), r=4)
    shown = capfd.readouterr().err
    assert "Mapping experts from disk: 100%" in shown
    assert "MB/s" in shown or "GB/s" in shown


def writes(wrapped, folder):
    """Every way that a user has to write the base model, by name."""
    base = wrapped.get_base_model()
    trainer = Trainer(base, TrainingArguments(str(folder), report_to="none", use_cpu=True))
    return {
        "save_pretrained": lambda: base.save_pretrained(folder),
        "of the model in it": lambda: base.model.save_pretrained(folder),
        "by its place in peft": lambda: wrapped.base_model.model.save_pretrained(folder),
        "in torch's format": lambda: base.save_pretrained(folder, safe_serialization=False),
        "with a state dict": lambda: base.save_pretrained(folder, state_dict=base.state_dict()),
        "to the hub": lambda: base.push_to_hub("someone/something"),
        "by Trainer": lambda: trainer.save_model(str(folder)),
        "without the adapter": lambda: wrapped.unload().save_pretrained(folder),
    }


def test_no_checkpoint_without_experts(tmp_path):
    saved("Qwen3-MoE", tmp_path / "model")
    targets = lora("q_proj", "experts")
    for wrapped in (
        attach(model(), REFERENCE, lora=targets),
        ktmoe.load_model(tmp_path / "model", REFERENCE, targets),
    ):
        out = tmp_path / "out"
        for way in writes(wrapped, out):
            with pytest.raises(KTError, match="without experts"):
                writes(wrapped, out)[way]()
            assert not list(out.glob("*.safetensors")) + list(out.glob("*.bin")), way


def test_trainer_saves_the_adapter_alone(tmp_path):
    wrapped = attach(model(), REFERENCE, lora=lora("q_proj", "experts"))
    Trainer(wrapped, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)).save_model()
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not list(tmp_path.glob("model*.safetensors"))
