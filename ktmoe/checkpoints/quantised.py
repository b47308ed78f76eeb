"""Quantised checkpoints: known by their configuration, or by what their tensors are called, and refused.

transformers loads what its quantisers know, whose experts are modules and bytes of their own; what no quantiser knows
it reads as plain numbers. Two are read here (`ktmoe.stored`): FP8 with block scales as DeepSeek-V3 is released, and
compressed-tensors' INT4 in groups as Kimi K2 is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ktmoe.stored import GROUP
from ktmoe.types import KTError


# "compression_config" is compressed-tensors' older name, "quantization" MLX's.
_KEYS = ("quantization_config", "compression_config", "quantization")
_NAMES = {
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)",
    "compressed-tensors or ModelOpt": r"\.(weight_packed|weight_scale|weight_scale_2|weight_zero_point|input_scale)",
    "bitsandbytes": r"\.(SCB|weight\.(absmax|quant_map|nested_absmax|quant_state\..+))",
    "quanto": r"\.weight\._(data|scale|shift)",
    "hqq": r"\.W_q",
    "mxfp4": r"_proj_(blocks|scales)",
    "torchao": r"\.weight(_qdata|:_data|:_scale)",
    "MLX": r"_proj\.(scales|biases)",
}


# What compressed-tensors may say of the weights that are read.
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}


def is_stored(config: Any) -> bool:
    """Whether a configuration says a quantisation that is read here."""
    return bool(list(_found(config))) and all(_why_not(found, key) == "" for found, key in _found(config))


def stored_format(config: Any) -> str:
    """What `ExpertWeights.stored` will be, as far as a configuration says."""
    if not is_stored(config):
        return ""
    found, key = next(_found(config))
    if _method(found, key) == "compressed-tensors":
        return "int4"
    return "fp8" if found.get("weight_block_size") in (None, [128, 128], (128, 128)) else ""


def refuse_quantised(path: Any, config: Any) -> None:
    """Refuses a model by its configuration alone.

    Args:
        path: for the message.
        config: transformers' configuration, or what config.json says.

    Raises:
        KTError: names the method and the remedy.
    """
    for found, key in _found(config):
        if why := _why_not(found, key):
            raise _error(path, why)


def refuse_quantised_names(path: Any, keys: Iterable[str]) -> None:
    """Refuses tensors that only a quantiser can read, whatever the configuration says.

    Raises:
        KTError: names one of them.
    """
    known = re.compile(f"(?:{'|'.join(_NAMES.values())})$")
    for key in keys:
        if known.search(key):
            method = next(m for m, p in _NAMES.items() if re.search(f"(?:{p})$", key))
            raise _error(path, f"{method}, by the name of {key}")


def _error(path: Any, method: str) -> KTError:
    return KTError(
        f"{path}: the checkpoint is quantised ({method}); expected bf16, fp16 or fp32, FP8 with block scales as "
        "DeepSeek-V3 has it, or compressed-tensors' INT4 in groups of 32 as Kimi K2 has it. Take the unquantised "
        "checkpoint; kt_backend: AMXInt8 quantises its experts while loading."
    )


def _why_not(found: Mapping[str, Any], key: str) -> str:
    """The name of a quantisation that is not read, and of what about it; "" for one that is."""
    method = _method(found, key)
    if method == "fp8":
        return ""
    if method != "compressed-tensors" or found.get("format") not in ("pack-quantized", None):
        return f"{method}, {found['format']}" if method == "compressed-tensors" else method
    groups = [g if isinstance(g, Mapping) else vars(g) for g in (found.get("config_groups") or {}).values()]
    for group in groups:
        weights = group.get("weights") or {}
        weights = weights if isinstance(weights, Mapping) else vars(weights)
        for name, value in _INT4.items():
            if getattr(weights.get(name), "value", weights.get(name)) != value:
                return f"{method}, {name}: {weights.get(name)}"
        for name in ("input_activations", "output_activations"):
            if group.get(name):
                return f"{method}, {name}"
        if weights.get("actorder"):
            return f"{method}, actorder: {weights['actorder']}"
    return "" if groups else f"{method}, no config_groups"


def _found(config: Any) -> Iterator[tuple[Mapping[str, Any], str]]:
    """What a configuration says of a quantisation, and under which key."""
    content: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    inner = [v for k, v in content.items() if k.endswith("_config") and k not in _KEYS and isinstance(v, Mapping)]
    for part in (content, *inner):
        for key in _KEYS:
            found = part.get(key)
            if found:
                yield found if isinstance(found, Mapping) else vars(found), key


def _method(found: Mapping[str, Any], key: str) -> str:
    method = found.get("quant_method")
    if method:
        return str(getattr(method, "value", method)).lower()
    if any(found.get(name) for name in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")):
        return "bitsandbytes"
    return "MLX" if key == "quantization" else "by a method that it does not name"
