"""What stands between a caller and a backend: checks and casts, in one place, before a pointer is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ktmoe.types import Inputs, KTError, Lora, MoEShape


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@contextmanager
def own_settings() -> Iterator[None]:
    """Keeps the caller's default device, inference mode and autocast away from a backend.

    The kernel takes pointers to host memory, and what it keeps is written again outside of inference mode. Leaving
    inference mode switches grad on, also within an autograd Function: a backend would record what it computes.
    """
    # A default device is a mode through which every operation passes in Python: only where there is another one.
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with device, torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def check_shape(shape: MoEShape) -> None:
    """Refuses numbers that no backend can take.

    Raises:
        KTError: a size below 1, or more experts per token than there are experts.
    """
    for name in ("num_experts", "hidden_size", "intermediate_size", "top_k", "rank"):
        value = getattr(shape, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            label = "r" if name == "rank" else name
            raise KTError(f"{label}: got {value!r}; expected a whole number of at least 1.")
    if shape.top_k > shape.num_experts:
        raise KTError(f"top_k: got {shape.top_k}; expected at most num_experts = {shape.num_experts}.")


def check_call(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, shape: MoEShape) -> None:
    """Refuses a call whose tensors cannot be what the experts' signature asks for.

    Args:
        hidden_states: expected [T, H], floating point.
        top_k_index: expected [T, K], integers.
        top_k_weights: expected [T, K], floating point.
        shape: what the layer was built for.

    Raises:
        KTError: names the argument, what it got and what was expected.
    """
    for name, tensor, dtypes, kind in (
        ("hidden_states", hidden_states, _FLOATS, "a floating-point tensor"),
        ("top_k_index", top_k_index, _INTEGERS, "an integer tensor"),
        ("top_k_weights", top_k_weights, _FLOATS, "a floating-point tensor"),
    ):
        if not isinstance(tensor, Tensor):
            raise KTError(f"{name}: got {type(tensor).__name__}; expected {kind}.")
        if tensor.dtype not in dtypes:
            raise KTError(f"{name}: got {tensor.dtype}; expected {kind}.")
        _check_memory(name, tensor)
    if hidden_states.dim() != 2 or hidden_states.shape[1] != shape.hidden_size:
        raise KTError(
            f"hidden_states: got shape {tuple(hidden_states.shape)}; expected [T, {shape.hidden_size}]. Flatten batch "
            "and sequence first: hidden_states.view(-1, hidden_size)."
        )
    expected = (hidden_states.shape[0], shape.top_k)
    for name, tensor in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        if tuple(tensor.shape) != expected:
            raise KTError(
                f"{name}: got shape {tuple(tensor.shape)}; expected {list(expected)}: one row per token of "
                f"hidden_states, top_k = {shape.top_k} columns."
            )


def _check_memory(name: str, tensor: Tensor) -> None:
    """Refuses a tensor whose numbers are not all there, one after the other: no backend can point to them."""
    if tensor.is_meta or tensor.layout != torch.strided:
        what = "a tensor on the meta device, which has no data" if tensor.is_meta else f"layout {tensor.layout}"
        raise KTError(f"{name}: got {what}; expected a dense tensor with data.")


def check_unchanged(
    grad_output: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: Lora | None,
    shape: MoEShape,
) -> None:
    """Refuses a backward whose inputs have other sizes than in the forward.

    `x.data = y` goes past autograd's own check, and the kernel would write out of bounds (K6, K7). A LoRA tensor that
    was replaced by a smaller one would be spread over all experts.

    Raises:
        KTError: names both shapes.
    """
    if grad_output.shape != hidden_states.shape:
        raise KTError(
            f"hidden_states: shape {tuple(grad_output.shape)} in the forward, {tuple(hidden_states.shape)} in the "
            "backward. Something replaced its data (`.data = ...`) in between; give the experts a new tensor instead."
        )
    check_call(hidden_states, top_k_index, top_k_weights, shape)
    if lora is not None:
        check_lora(lora, shape)


def check_lora(lora: Lora, shape: MoEShape) -> None:
    """Refuses LoRA tensors that do not fit the layer.

    Raises:
        KTError: a missing tensor, a wrong shape or dtype, or a rank above what the layer was built for.
    """
    missing = [name for name in LORA_NAMES if name not in lora.tensors]
    if missing:
        raise KTError(f"lora: {', '.join(missing)} missing; all six of {', '.join(LORA_NAMES)} are needed.")
    if lora.rank > shape.rank:
        raise KTError(
            f"lora: rank {lora.rank}; this layer was built for at most r = {shape.rank}. Build or attach it with "
            f"r={lora.rank}."
        )
    for name, expected in shape.lora_shapes(lora.rank).items():
        tensor = lora.tensors[name]
        if tuple(tensor.shape) != expected or tensor.dtype not in _FLOATS:
            raise KTError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}; expected floating point {expected} "
                "([E, r, in] for lora_A, [E, out, r] for lora_B)."
            )
        _check_memory(name, tensor)


def make_inputs(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: Lora | None,
    shape: MoEShape,
    compute_dtype: torch.dtype,
) -> Inputs:
    """Brings checked tensors into the one form that backends take: on the CPU, contiguous, of fixed dtypes.

    Ids outside [0, E), of any size, become -1, which every backend skips (the kernel drops -1 cleanly, but
    ids of 2^31 and more wrap around in it).

    Raises:
        KTError: under a mode that makes tensors without numbers (torch.export, FakeTensorMode).
    """
    index = top_k_index.to("cpu", torch.int64)
    inside = (index >= 0) & (index < shape.num_experts)
    if is_fake(inside):
        raise KTError(
            "The routed experts were called with tensors that have no numbers (torch.export, FakeTensorMode). They "
            "run on real tensors alone; torch.compile leaves them out by itself."
        )
    return Inputs(
        hidden_states.to("cpu", compute_dtype).resolve_neg().contiguous(),
        torch.where(inside, index, -1).contiguous(),
        top_k_weights.to("cpu", torch.float32).resolve_neg().contiguous(),
        lora,
    )
