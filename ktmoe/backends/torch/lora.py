"""The LoRA of one expert: what it adds to the products, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ktmoe.types import Lora


@dataclass
class LowRows:
    """The rows of one expert between A and B, times alpha / r; fp32."""

    gate_up: Tensor  # [n, 2 r], gate's half first
    down: Tensor  # [n, r]


class ExpertLora:
    """One expert's six matrices, and what its gradients need of the forward and the backward that it takes part in.

    In fp32, as peft keeps them: products with so few columns are no faster in bf16. Gate and up take the same rows, so
    their A are one matrix [2 r, H]. Every product writes what the LoRA adds to the frozen weights' into `out`, in its
    dtype. The low-rank rows of the backward lack the routing weights until `add_gradients`.
    """

    x: Tensor  # [n, H], what gate and up take
    mid: Tensor  # [n, I], what down takes
    low: LowRows
    _grad: Tensor  # [n, H] of what down gave
    _d_gate_up: Tensor  # [n, 2 I] of what gate and up gave
    _grad_low_down: Tensor
    _grad_low_gate_up: Tensor

    def __init__(self, matrices: Sequence[Tensor], scaling: float, device: torch.device) -> None:
        """Reads the six matrices, in the order of `LORA_NAMES`, as they are now: nothing can be stale."""
        a_gate, b_gate, a_up, b_up, a_down, b_down = (t.to(device, torch.float32) for t in matrices)
        self.scaling = scaling
        self.a_gate_up = torch.cat((a_gate, a_up))  # [2 r, H]
        self.b_gate, self.b_up = b_gate, b_up  # [I, r]
        self.a_down, self.b_down = a_down, b_down  # [r, I], [H, r]

    def gate_up(self, x: Tensor, out: Tensor) -> Tensor:
        """[n, H] -> out [n, 2 I]; returns the low-rank rows."""
        low = (x @ self.a_gate_up.T).mul_(self.scaling)
        for b, low_half, half in zip((self.b_gate, self.b_up), low.chunk(2, 1), out.chunk(2, 1), strict=True):
            _multiply(low_half, b.T, half)
        return low

    def low_down(self, mid: Tensor) -> Tensor:
        """[n, I] -> [n, r]."""
        return (mid @ self.a_down.T).mul_(self.scaling)

    def down(self, low: Tensor, out: Tensor) -> None:
        """[n, r] -> out [n, H]."""
        _multiply(low, self.b_down.T, out)

    def down_backward(self, grad: Tensor, out: Tensor) -> None:
        """[n, H] -> out [n, I], the gradient of what down takes."""
        self._grad, self._grad_low_down = grad, _narrow(grad, self.b_down).mul_(self.scaling)
        _multiply(self._grad_low_down, self.a_down, out)

    def gate_up_backward(self, d_gate_up: Tensor, out: Tensor) -> None:
        """[n, 2 I] -> out [n, H], the gradient of what gate and up take."""
        d_gate, d_up = d_gate_up.chunk(2, 1)
        low = torch.cat((_narrow(d_gate, self.b_gate), _narrow(d_up, self.b_up)), 1).mul_(self.scaling)
        self._d_gate_up, self._grad_low_gate_up = d_gate_up, low
        _multiply(low, self.a_gate_up, out)

    def add_gradients(self, gradients: Sequence[Tensor], weight: Tensor) -> None:
        """Adds to this expert's six gradients, fp32. `weight` [n, 1] holds the routing weights."""
        (low_gate, low_up), low_down = (self.low.gate_up * weight).chunk(2, 1), self.low.down * weight
        grad_low_gate, grad_low_up = (self._grad_low_gate_up * weight).chunk(2, 1)
        d_gate, d_up = self._d_gate_up.chunk(2, 1)
        a_gate, b_gate, a_up, b_up, a_down, b_down = gradients
        for gradient, low, wide in (
            (a_gate, grad_low_gate, self.x),
            (a_up, grad_low_up, self.x),
            (a_down, self._grad_low_down * weight, self.mid),
            (b_gate.T, low_gate, d_gate),
            (b_up.T, low_up, d_up),
            (b_down.T, low_down, self._grad),
        ):
            gradient.add_(low.T @ wide)  # [r, H] or [r, I]; a product with eight columns took up to five times as long


def by_expert(tensors: Lora | Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Six stacked tensors -> the six matrices of every expert, as views."""
    return list(zip(*(t.unbind(0) for t in tensors), strict=True))


def _narrow(rows: Tensor, b: Tensor) -> Tensor:
    """[n, m] x [m, r] -> [n, r]. From b's transpose in memory, which a copy of so few numbers makes twice as fast."""
    return rows @ b.T.contiguous().T


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
