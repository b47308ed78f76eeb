"""A saved model whose routed experts are rewritten into a checkpoint's low-bit format, as such models are released."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from ktmoe_reference import quantize_fp8
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktmoe.convert import quantize_int4_model


_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def store_experts(folder: Path, stored: str) -> None:
    """Quantises every matrix of the routed experts, in place, and says so in config.json.

    Args:
        folder: written by `save_pretrained`.
        stored: the format, as `ExpertWeights.stored`.
    """
    if stored == "int4":
        made = folder.with_name(f"{folder.name}.int4")
        quantize_int4_model(folder, made)
        shutil.rmtree(folder)
        made.rename(folder)
        return
    where: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        written: dict[str, Tensor] = {}
        for key, tensor in load_file(file).items():
            written |= _fp8(key, tensor) if _EXPERT.search(key) else {key: tensor}
        save_file(written, file, {"format": "pt"})
        where |= dict.fromkeys(written, file.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": _FP8}
    path.write_text(json.dumps(config), encoding="utf-8")


def _fp8(key: str, tensor: Tensor) -> dict[str, Tensor]:
    matrix, scales = quantize_fp8(tensor)
    return {key: matrix, f"{key}_scale_inv": scales}
