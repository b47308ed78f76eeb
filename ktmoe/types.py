"""The vocabulary that every other module shares: weights, LoRA, shapes, gradients, and the one error class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor

from ktmoe.errors import KernelError as KernelError
from ktmoe.errors import KTError as KTError


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Stack = Union[Tensor, Sequence[Tensor]]  # noqa: UP007  (evaluated at import on Python 3.10)


@dataclass(frozen=True)
class MoEShape:
    """What a backend is built for. A certificate of the contract gate holds for one of these.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I, of one expert.
        top_k: K, experts per token.
        rank: largest LoRA rank that a call may bring.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    rank: int

    def lora_shapes(self, rank: int | None = None) -> dict[str, tuple[int, int, int]]:
        """Shapes of the six stacked LoRA tensors, by the names of `LORA_NAMES`."""
        r = self.rank if rank is None else rank
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        return dict(zip(LORA_NAMES, ((e, r, h), (e, i, r), (e, r, h), (e, i, r), (e, r, i), (e, h, r)), strict=True))


@dataclass(frozen=True)
class ExpertWeights:
    """The frozen weights of one layer of routed experts, held by somebody else and never copied here.

    The kernel packs them while loading: changes in place afterwards are not seen.

    Each projection is a stacked tensor or a sequence of E matrices (checkpoints hold the latter; stacking would copy).
    A sequence that makes its matrices when asked for them has a `shape` [E, ...] and a `dtype`, as a tensor has.

    Attributes:
        gate_proj: [E, I, H].
        up_proj: [E, I, H].
        down_proj: [E, H, I].

    Examples:
        >>> gate, up = torch.randn(2, 4, 64, 32, dtype=torch.bfloat16)
        >>> down = torch.randn(4, 32, 64, dtype=torch.bfloat16)
        >>> weights = ktmoe.ExpertWeights(gate, up, down)
        >>> weights.num_experts, weights.hidden_size, weights.intermediate_size
        (4, 32, 64)
        >>> ktmoe.ExpertWeights(list(gate), list(up), list(down)).nbytes()  # nothing is copied
        49152
    """

    gate_proj: Stack
    up_proj: Stack
    down_proj: Stack

    def __post_init__(self) -> None:
        """Refuses anything whose shapes or dtypes do not fit together, before a pointer is taken."""
        lengths = {p: len(getattr(self, p)) for p in PROJECTIONS}
        if len(set(lengths.values())) != 1 or lengths["gate_proj"] == 0:
            raise KTError(
                f"ExpertWeights: the projections hold {lengths} experts; expected one equal number above zero."
            )
        size, dtype = _matrix(self.gate_proj, 0)
        if len(size) != 2:
            raise KTError(f"ExpertWeights: gate_proj[0] has shape {size}; expected [I, H].")
        i, h = size
        if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise KTError(
                f"ExpertWeights: gate_proj is {dtype}; expected bfloat16, float16 or float32. Quantised checkpoints "
                "must be dequantised first."
            )
        if (layout := getattr(self.gate_proj, "layout", torch.strided)) != torch.strided:
            raise KTError(f"ExpertWeights: gate_proj has layout {layout}; expected dense tensors.")
        for name, shape in (("gate_proj", (i, h)), ("up_proj", (i, h)), ("down_proj", (h, i))):
            stack = getattr(self, name)
            for e in range(1 if hasattr(stack, "shape") else len(stack)):
                size, other = _matrix(stack, e)
                if size != shape or other != dtype:
                    raise KTError(
                        f"ExpertWeights: {name}[{e}] is {other} {size}; expected {dtype} {shape}, to fit gate_proj[0]."
                    )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.gate_proj)

    @property
    def hidden_size(self) -> int:
        """H."""
        return _matrix(self.gate_proj, 0)[0][1]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return _matrix(self.gate_proj, 0)[0][0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are held in."""
        return _matrix(self.gate_proj, 0)[1]

    def expert(self, e: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up [I, H] and down [H, I] of expert `e`: views, no copies."""
        return self.gate_proj[e], self.up_proj[e], self.down_proj[e]

    def some(self, experts: Sequence[int]) -> ExpertWeights:
        """The layer with these experts alone, in this order: views, no copies."""
        return ExpertWeights(*(_some(getattr(self, p), experts) for p in PROJECTIONS))

    @property
    def stored(self) -> str:
        """The format that the source holds all three in, if a kernel may take it: "fp8", or "" for any other."""
        formats = {getattr(getattr(self, p), "format", "") for p in PROJECTIONS}
        return formats.pop() if len(formats) == 1 else ""

    @property
    def is_meta(self) -> bool:
        """Whether there are no numbers: some of them are on the meta device."""
        return any(device_of(getattr(self, p)).type == "meta" for p in PROJECTIONS)

    def nbytes(self) -> int:
        """Bytes of all weights as they are held, scales left out."""
        each = self.num_experts * self.hidden_size * self.intermediate_size
        bits = sum(getattr(getattr(self, p), "bits", torch.finfo(self.dtype).bits) for p in PROJECTIONS)
        return each * bits // 8


def device_of(stack: Stack) -> torch.device:
    """Where a stack is, without making a matrix where it says it for all."""
    return getattr(stack, "device", None) or stack[0].device


def _some(stack: Stack, experts: Sequence[int]) -> Stack:
    take = getattr(stack, "some", None)  # of a quantised one
    return take(experts) if take else [stack[e] for e in experts]


def _matrix(stack: Stack, e: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Size and dtype of one expert's matrix, without making it where the stack says it for all."""
    shape = getattr(stack, "shape", None)
    one: Any = stack[e] if shape is None else stack
    return tuple(one.shape if shape is None else shape[1:]), one.dtype


@dataclass(frozen=True)
class Lora:
    """Six stacked LoRA tensors and their scale, for one call.

    Attributes:
        tensors: by the names of `LORA_NAMES`: A [E, r, in], B [E, out, r].
        scaling: alpha / r (alpha / sqrt(r) for rsLoRA).
    """

    tensors: Mapping[str, Tensor]
    scaling: float

    @property
    def rank(self) -> int:
        """r."""
        return self.tensors["gate_proj.lora_A"].shape[1]

    def delta(self, projection: str, e: int) -> Tensor:
        """scaling * B A of one expert: [out, in] float32."""
        a, b = self.tensors[f"{projection}.lora_A"][e], self.tensors[f"{projection}.lora_B"][e]
        return (b.float() @ a.float()).mul_(self.scaling)

    def __iter__(self) -> Iterator[Tensor]:
        """The six tensors in the order of `LORA_NAMES`."""
        return (self.tensors[name] for name in LORA_NAMES)


@dataclass(frozen=True)
class Inputs:
    """One call of the experts, validated, as every backend receives it.

    Attributes:
        hidden_states: [T, H] on the CPU, as all of them (for experts on a device, there), contiguous; bf16 for the
            torch and kernel backends, fp32 for the reference.
        top_k_index: [T, K] int64, contiguous; what is outside [0, E) is -1 and contributes nothing.
        top_k_weights: [T, K] float32, contiguous.
        lora: the six tensors as the user holds them (fp32 or bf16), or None.
    """

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    lora: Lora | None

    def rows(self, rows: slice | Tensor) -> Inputs:
        """The same call for some of the tokens."""
        return Inputs(self.hidden_states[rows], self.top_k_index[rows], self.top_k_weights[rows], self.lora)


@dataclass
class Gradients:
    """What a backward gives.

    Attributes:
        hidden_states: [T, H] in the dtype of the inputs.
        top_k_weights: [T, K] float32.
        lora: six float32 tensors in the order of `LORA_NAMES`, zero for experts without a token; None without LoRA.
    """

    hidden_states: Tensor
    top_k_weights: Tensor
    lora: list[Tensor] | None

    def merge_rows(self, rows: Tensor, other: Gradients) -> None:
        """Takes the gradients of the tokens `rows` from another backward, and adds its LoRA gradients."""
        self.hidden_states[rows] = other.hidden_states
        self.top_k_weights[rows] = other.top_k_weights
        if self.lora is not None and other.lora is not None:
            for mine, theirs in zip(self.lora, other.lora, strict=True):
                mine += theirs
