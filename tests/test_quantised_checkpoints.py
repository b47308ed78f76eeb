"""Checkpoints that somebody has quantised: refused by name, with the remedy, before anything is loaded."""

import json
import shutil

import pytest
import torch
from families import build, config, model
from safetensors.torch import load_file, save_file
from test_models import REFERENCE, lora, moved
from transformers import AutoConfig, PreTrainedModel

import ktmoe
from ktmoe import KTError
from ktmoe.checkpoints.reader import Checkpoint
from ktmoe.convert import quantize
from ktmoe.models import attach


METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "bitsandbytes": {"load_in_4bit": True},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "torchao": {"quant_method": "torchao"},
    "hqq": {"quant_method": "hqq"},
    "mxfp4": {"quant_method": "mxfp4"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "modelopt": {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}},
    "of_next_year": {"quant_method": "of_next_year"},
    "by a method that it does not name": {"bits": 4},
}
PLACES = {
    **{name: {"quantization_config": method} for name, method in METHODS.items()},
    "MLX": {"quantization": {"group_size": 64, "bits": 4}},
    "inner gptq": {"text_config": {"quantization_config": METHODS["gptq"]}},
    "older compressed-tensors": {"compression_config": METHODS["compressed-tensors"]},
}
WHAT = "experts.2.up_proj.weight"
KEY = f"model.layers.1.mlp.{WHAT}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    model().save_pretrained(root / "model")
    moved(attach(model(), REFERENCE, lora=lora("q_proj", "experts"))).save_pretrained(root / "adapter")
    return root


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made / "model", tmp_path / "model")


def make_skeleton():
    with torch.device("meta"):
        return build("Qwen3-MoE", config("Qwen3-MoE"))


def ways(folder, made):
    """Everything that reads a model."""
    return {
        "load": lambda: ktmoe.load_model(folder, REFERENCE, r=4),
        "merge": lambda: ktmoe.merge_adapter(folder, made / "adapter", folder.parent / "out"),
        "quantize": lambda: quantize.quantize_model(folder, folder.parent / "packed"),
        "attach": lambda: attach(make_skeleton(), REFERENCE, r=4, checkpoint=Checkpoint(folder)),
    }


def refused(folder, made, said, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)  # nothing is loaded
    for way, call in ways(folder, made).items():
        with pytest.raises(KTError, match=said):
            pytest.fail(f"{way}: {call()}")
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", PLACES)
def test_by_the_configuration(name, folder, made, monkeypatch):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PLACES[name]))
    method = name.split()[-1] if " " in name and "by" not in name else name
    what = ", no config_groups" if method == "compressed-tensors" else ""
    said = rf"model: the checkpoint is quantised \({method}{what}\)"
    refused(folder, made, rf"{said}; expected .* Take the unquantised checkpoint", monkeypatch)


def test_by_a_configuration_that_is_given(folder):
    given = AutoConfig.from_pretrained(folder)
    given.quantization_config = METHODS["awq"]
    with pytest.raises(KTError, match=r"quantised \(awq\)"):
        ktmoe.load_model(folder, given, kt_config=REFERENCE)


NAMES = {
    "GPTQ or AWQ": {".weight": ".qweight", "+": ".g_idx"},
    "compressed-tensors": {".weight": ".weight_packed"},
    "ModelOpt": {"+": ".weight_scale"},
    "bitsandbytes": {"+": ".SCB"},
    "bitsandbytes ": {"+": ".weight.quant_state.bitsandbytes__nf4"},
    "quanto": {".weight": ".weight._data"},
    "hqq": {".weight": ".W_q"},
    "MLX": {"+": ".scales"},
}


@pytest.mark.parametrize("module", [KEY, "model.layers.0.self_attn.q_proj.weight"], ids=["experts", "attention"])
@pytest.mark.parametrize("name", NAMES)
def test_by_what_the_tensors_are_called(name, module, folder, made, monkeypatch):
    """Older files say it in a file beside, or nowhere."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for old, new in NAMES[name].items():
        if old == "+":
            tensors[module.removesuffix(".weight") + new] = torch.zeros(4)
        else:
            tensors[module.replace(old, new)] = tensors.pop(module).to(torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    refused(
        folder, made, rf"quantised \(.*{name.strip()}.*, by the name of {module.removesuffix('.weight')}", monkeypatch
    )


@pytest.mark.parametrize("module", [KEY, "model.layers.0.self_attn.q_proj.weight"], ids=["experts", "attention"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_by_their_numbers(dtype, module, folder, made, monkeypatch):
    """Which transformers would take for the weights themselves."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[module] = tensors[module].to(dtype)
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", None)
    said = rf"model\.safetensors: {module} is (I8|U8|I32|FP8 without block scales)"
    with pytest.raises(KTError, match=said):
        ktmoe.load_model(folder, REFERENCE, r=4)
    with pytest.raises(KTError, match=said):
        ktmoe.merge_adapter(folder, made / "adapter", folder.parent / "out")
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("scale", [(), (1,), (2, 2)])
def test_fp8_with_other_scales(scale, folder, made, monkeypatch):
    """One scale a tensor, for example."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors |= {key: tensors[key].to(torch.float8_e4m3fn), f"{key}_scale_inv": torch.ones(scale)}
    save_file(tensors, file, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    refused(folder, made, rf"{key}_scale_inv: FP8 scales: got .* for a matrix of", monkeypatch)
