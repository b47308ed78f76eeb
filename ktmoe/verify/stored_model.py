"""A saved model whose routed experts are rewritten into a checkpoint's low-bit format, as such models are released."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from ktmoe_reference import pack_int4, quantize_fp8, quantize_int4
from safetensors.torch import load_file, save_file
from torch import Tensor


_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_SAID = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": None}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    },
}


def store_experts(folder: Path, stored: str) -> None:
    """Quantises every matrix of the routed experts, in place, and says so in config.json.

    Args:
        folder: written by `save_pretrained`.
        stored: the format, as `ExpertWeights.stored`.
    """
    write = _fp8 if stored == "fp8" else _int4
    where: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        written: dict[str, Tensor] = {}
        for key, tensor in load_file(file).items():
            written |= write(key, tensor) if _EXPERT.search(key) else {key: tensor}
        save_file(written, file, {"format": "pt"})
        where |= dict.fromkeys(written, file.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": _SAID[stored]}
    path.write_text(json.dumps(config), encoding="utf-8")


def _fp8(key: str, tensor: Tensor) -> dict[str, Tensor]:
    matrix, scales = quantize_fp8(tensor)
    return {key: matrix, f"{key}_scale_inv": scales}


def _int4(key: str, tensor: Tensor) -> dict[str, Tensor]:
    q, scales = quantize_int4(tensor)
    words = pack_int4(q).view(torch.int32)
    return {f"{key}_packed": words, f"{key}_scale": scales, f"{key}_shape": torch.tensor(tensor.shape)}
