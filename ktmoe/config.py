"""The configuration keys of the mission, checked; and what to write instead of the keys of older stacks."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ktmoe import counts
from ktmoe.backends import TABLE
from ktmoe.backends.kt import PackedModel
from ktmoe.types import KTError


# Keys of LLaMA-Factory 0.9.4's KTransformers integration, of the first fork, and of 0.9.5's own unused fields.
OLD_KEYS = {
    "kt_optimize_rule": "delete it: the experts of every supported model are found without rules",
    "cpu_infer": "write kt_num_threads",
    "chunk_size": "delete it, or write kt_max_len (tokens per kernel call)",
    "mode": "delete it",
    "kt_maxlen": "write kt_max_len, or delete it",
    "kt_use_cuda_graph": "delete it: training has no CUDA graph",
    "kt_mode": "write kt_backend: AMXBF16 | AMXInt8 | AMXFP8 | AMXInt4 | torch | reference | auto",
    "kt_force_think": "delete it: it concerned chat only",
    "kt_expert_checkpoint_path": "delete it: the experts come from model_name_or_path",
    "kt_use_lora_experts": "delete it: the routed experts have LoRA when lora_target covers them",
    "kt_lora_expert_num": "delete it: the routed experts have LoRA when lora_target covers them",
    "kt_lora_expert_intermediate_size": "delete it: the routed experts have LoRA when lora_target covers them",
}


_LIST = re.compile(r"[\[\]\s\d,]*")  # ids, as a command line has them


def _backends() -> tuple[str, ...]:
    """As the table is when it is asked: a row may be added."""
    return *TABLE, "auto"


def _one_of(*words: str) -> Callable[[], tuple[str, ...]]:
    return lambda: words


_ANYTHING = _one_of()


def _key(default: Any, help: str, *, choices: Callable[[], tuple[str, ...]] = _ANYTHING, most: int = 0) -> Any:
    """A field: one of some words, or a whole number from 1 to `most`, or what its type says."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "most": most})


@dataclass(frozen=True)
class KTConfig:
    """How the routed experts run. Every field is a key of a LLaMA-Factory YAML under the same name.

    Raises:
        KTError: a value that is unknown, of the wrong type, out of range, or that does not go with another key.

    Examples:
        >>> config = ktmoe.KTConfig(kt_backend="amxint8", kt_num_threads=16)
        >>> config.kt_backend  # upper or lower case
        'AMXInt8'
    """

    kt_backend: str = _key(
        "auto",
        "What computes the routed experts: the kernel (AMXBF16, AMXInt8, or as the checkpoint stores them AMXFP8 and "
        "AMXInt4), torch, reference, or auto.",
        choices=_backends,
    )
    kt_num_threads: int | None = _key(
        None,
        "CPU threads of the routed experts. Default: the kernel's are measured, up to the physical cores that the "
        "process may use; the other backends take as many as torch has.",
        most=1024,
    )
    kt_tp_enabled: bool = _key(
        False, "One pool of threads per NUMA node (at most 4), each holding a slice of every expert."
    )
    kt_numa_nodes: Sequence[int] | None = _key(
        None,
        "NUMA nodes that the kernel's threads and weights are on, by their ids, e.g. [0, 2]; more than one with "
        "kt_tp_enabled. Default: those where the process has most cores.",
    )
    kt_num_gpu_experts: int = _key(
        0, "Experts of each layer that are on the GPU, in bf16; the others take so much less host memory and time."
    )
    kt_gpu_experts: Sequence[int] | str | None = _key(
        None,
        "Which ones: a list of ids, the same for every layer, or a file of ktmoe calibrate: those with most tokens, "
        "layer by layer. Default: the first ones.",
    )
    kt_weight_path: str | None = _key(
        None, "Folder of packed INT8 weights, made by ktmoe quantize; needs kt_backend: AMXInt8."
    )
    kt_max_len: int | None = _key(
        None, "Tokens per kernel call; longer inputs run in chunks. Default: 4096.", most=2**20
    )
    kt_share_backward: str = _key(
        "auto",
        "One repacked backward buffer for all layers (on, less memory) or a copy per layer (off, faster). auto: a "
        "copy where memory is there.",
        choices=_one_of("auto", "on", "off"),
    )
    kt_cpu_activation: str = _key(
        "auto",
        "Whether a layer keeps its experts' input and output, so that gradient checkpointing does not compute them "
        "again: retain, recompute, or auto (keep while a tenth of the memory is free).",
        choices=_one_of("auto", "retain", "recompute"),
    )
    kt_torch_packing: str = _key(
        "auto",
        "Copies of the weights that the torch backend makes to compute faster: both (forward and backward, 2.0 x "
        "their size in bf16), forward (1.0 x), off (none), or auto (as many as leave a quarter of the memory free).",
        choices=_one_of("auto", "both", "forward", "off"),
    )
    kt_plan: str = _key(
        "on",
        "Whether memory is looked at before anything is loaded: on (what cannot fit is refused), off.",
        choices=_one_of("on", "off"),
    )
    kt_verify: str = _key(
        "quick",
        "How the kernel is checked before it is used: quick (seconds, once per shape, then each layer as it is "
        "loaded), full (eight larger cases at every start), off (not at all: wrong gradients would go unnoticed).",
        choices=_one_of("quick", "full", "off"),
    )
    kt_fallback: str = _key(
        "error",
        "When the kernel fails its checks: stop (error), or go on with the torch backend (torch).",
        choices=_one_of("error", "torch"),
    )

    def __post_init__(self) -> None:
        """Checks and normalises every field: LLaMA-Factory's parser does not (it lets any YAML value through)."""
        for field in dataclasses.fields(self):
            name, value, most = field.name, getattr(self, field.name), field.metadata["most"]
            if choices := field.metadata["choices"]():
                object.__setattr__(self, name, _choice(name, value, choices))
            whole = isinstance(value, int) and not isinstance(value, bool)
            if most and value is not None and not (whole and 0 < value <= most):
                raise KTError(f"{name}: got {value!r}; expected a whole number from 1 to {most}, or nothing.")
        if not isinstance(self.kt_tp_enabled, bool):
            raise KTError(f"kt_tp_enabled: got {self.kt_tp_enabled!r}; expected true or false.")
        if self.kt_numa_nodes is not None:
            object.__setattr__(self, "kt_numa_nodes", _ids("kt_numa_nodes", "NUMA nodes", self.kt_numa_nodes))
        self._check_gpu_experts()
        if self.kt_weight_path is not None:
            self._check_weight_path()

    def _check_gpu_experts(self) -> None:
        n, named = self.kt_num_gpu_experts, self.kt_gpu_experts
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise KTError(f"kt_num_gpu_experts: got {n!r}; expected a whole number: experts of each layer, or 0.")
        if n and self.kt_weight_path is not None:
            raise KTError(
                f"kt_num_gpu_experts: got {n} with kt_weight_path, which holds all experts packed for the CPU. Leave "
                "kt_weight_path out: the others are packed while loading."
            )
        if named is None:
            return
        if not n:
            raise KTError(f"kt_gpu_experts: got {named!r}; it says which, and kt_num_gpu_experts (0) how many.")
        if isinstance(named, (str, os.PathLike)) and not _LIST.fullmatch(os.fspath(named)):
            counts.read(named)
            object.__setattr__(self, "kt_gpu_experts", os.fspath(named))
            return
        ids = _ids("kt_gpu_experts", "experts", named)
        if len(ids) != n:
            raise KTError(f"kt_gpu_experts: got {len(ids)} ids; kt_num_gpu_experts is {n}. Write as many.")
        object.__setattr__(self, "kt_gpu_experts", ids)

    def _check_weight_path(self) -> None:
        if not isinstance(self.kt_weight_path, (str, os.PathLike)):
            raise KTError(f"kt_weight_path: got {self.kt_weight_path!r}; expected the folder of packed weights.")
        object.__setattr__(self, "kt_weight_path", os.fspath(self.kt_weight_path))
        takers = [name for name, row in TABLE.items() if row.takes_packed]
        if self.kt_backend not in takers:
            raise KTError(
                f"kt_weight_path: got {self.kt_weight_path!r} with kt_backend: {self.kt_backend}; packed weights are "
                f"INT8, which only AMXInt8 computes with. Write kt_backend: {' or '.join(takers)}, or leave "
                "kt_weight_path out."
            )
        PackedModel(self.kt_weight_path)

    @classmethod
    def field_help(cls) -> dict[str, tuple[str, Any, str]]:
        """`{name: (type as text, default, help)}` of every key, for argument parsers and documentation."""
        return {f.name: (str(f.type), f.default, f.metadata["help"]) for f in dataclasses.fields(cls)}

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """A JSON schema of a YAML file with these keys, for editors; LLaMA-Factory's own keys are let through."""
        properties: dict[str, Any] = {
            "use_kt": {"type": "boolean", "default": False, "description": "The routed experts run on the CPU."}
        }
        for field in dataclasses.fields(cls):
            rules = field.metadata
            about: dict[str, Any] = {"description": rules["help"], "default": field.default}
            if choices := rules["choices"]():
                words = {"on": True, "off": False}  # as YAML 1.1 reads them
                about["enum"] = [*choices, *(words[c] for c in choices if c in words)]
            elif rules["most"]:
                about |= {"type": ["integer", "null"], "minimum": 1, "maximum": rules["most"]}
            elif isinstance(field.default, bool):
                about["type"] = "boolean"
            elif isinstance(field.default, int):
                about |= {"type": "integer", "minimum": 0}
            elif field.name in ("kt_numa_nodes", "kt_gpu_experts"):
                ids = {"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True, "minItems": 1}
                about["anyOf"] = [ids, {"type": ["integer", "string", "null"]}]
            else:
                about["type"] = ["string", "null"]
            properties[field.name] = about
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "LLaMA-Factory with use_kt: true",
            "type": "object",
            "properties": properties,
            "propertyNames": {"anyOf": [{"not": {"pattern": "^kt_"}}, {"enum": [*properties, "kt_config"]}]},
        }


def _ids(key: str, what: str, value: Any) -> tuple[int, ...]:
    """A list of ids, one id, or either as a command line has it."""
    parts: Any = value
    if isinstance(value, str):
        parts = [int(part) if part.strip().isdigit() else part for part in value.strip(" []").split(",")]
    elif isinstance(value, int) and not isinstance(value, bool):
        parts = [value]
    whole = isinstance(parts, (list, tuple)) and all(type(p) is int and p >= 0 for p in parts)
    if not whole or not parts or len(set(parts)) < len(parts):
        raise KTError(f"{key}: got {value!r}; expected ids of {what}, each once, e.g. [0, 1].")
    return tuple(parts)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    by_lower = {c.lower(): c for c in choices}
    found = by_lower.get(value.lower()) if isinstance(value, str) else None
    if found is None and isinstance(value, bool):  # YAML 1.1 reads on and off as booleans
        found = by_lower.get("on" if value else "off")
    if found is None:
        near = difflib.get_close_matches(str(value).lower(), list(by_lower), n=1, cutoff=0.5)
        hint = f" Did you mean {by_lower[near[0]]}?" if near else ""
        raise KTError(f"{name}: got {value!r}; expected one of {', '.join(choices)} (upper or lower case).{hint}")
    return found


def check_keys(names: Iterable[str]) -> None:
    """Refuses keys of older stacks.

    Args:
        names: the keys as the user wrote them, with or without leading dashes.

    Raises:
        KTError: names every old key and says what to write now.
    """
    old = [n for n in (name.lstrip("-") for name in names) if n in OLD_KEYS]
    if old:
        raise KTError("Keys that ktmoe does not know any more:\n" + "\n".join(f"  {n}: {OLD_KEYS[n]}." for n in old))
