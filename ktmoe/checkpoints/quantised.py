"""Quantised checkpoints: known by their configuration, or by what their tensors are called, and refused.

transformers loads what its quantisers know, whose experts are modules and bytes of their own; what no quantiser knows
it reads as plain numbers. FP8 with block scales is the one that is read here (`fp8.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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


def is_fp8(config: Any) -> bool:
    """Whether a configuration says FP8, which has block scales if `Checkpoint` takes it."""
    return set(_methods(config)) == {"fp8"}


def refuse_quantised(path: Any, config: Any) -> None:
    """Refuses a model by its configuration alone.

    Args:
        path: for the message.
        config: transformers' configuration, or what config.json says.

    Raises:
        KTError: names the method and the remedy.
    """
    for method in _methods(config):
        if method != "fp8":
            raise _error(path, method)


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
        f"{path}: the checkpoint is quantised ({method}); expected bf16, fp16 or fp32, or FP8 with block scales as "
        "DeepSeek-V3 has it. Take the unquantised checkpoint; kt_backend: AMXInt8 quantises its experts while loading."
    )


def _methods(config: Any) -> Iterator[str]:
    content: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    inner = [v for k, v in content.items() if k.endswith("_config") and k not in _KEYS and isinstance(v, Mapping)]
    for part in (content, *inner):
        for key in _KEYS:
            found = part.get(key)
            if found:
                yield _method(found if isinstance(found, Mapping) else vars(found), key)


def _method(found: Mapping[str, Any], key: str) -> str:
    method = found.get("quant_method")
    if method:
        return str(getattr(method, "value", method)).lower()
    if any(found.get(name) for name in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")):
        return "bitsandbytes"
    return "MLX" if key == "quantization" else "by a method that it does not name"
