"""The LoRA of one expert: what it adds to the products, and its gradients."""

from __future__ import annotations

import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor

from ktmoe.types import Lora


class ExpertLora:
    """One expert's six matrices in the dtype of the products.

    Gate and up take the same rows, so their A are one matrix [2 r, H]: few large products instead of many small ones.
    Everything inside of rank r is scaled by alpha / r, in both directions.
    """

    def __init__(self, lora: Lora, e: int, like: Tensor) -> None:
        """Reads the tensors as they are now: whatever an optimizer did to them, nothing is stale."""
        a_gate, b_gate, a_up, b_up, a_down, b_down = (t[e].to(like.device, like.dtype) for t in lora)
        self.e, self.scaling = e, lora.scaling
        self.a_gate_up = torch.cat((a_gate, a_up))  # [2 r, H]
        self.b_gate, self.b_up = b_gate, b_up  # [I, r]
        self.a_down, self.b_down = a_down, b_down  # [r, I], [H, r]

    def low_gate_up(self, x: Tensor) -> Tensor:
        """[n, H] -> [n, 2 r], gate's half first."""
        return (x @ self.a_gate_up.T).mul_(self.scaling)

    def low_down(self, mid: Tensor) -> Tensor:
        """[n, I] -> [n, r]."""
        return (mid @ self.a_down.T).mul_(self.scaling)

    def add_gate_up(self, base: Tensor, low: Tensor, out: Tensor) -> None:
        """`base` [n, 2 I] and the LoRA of both halves -> out."""
        (i, r), both = self.b_gate.shape, (self.b_gate, self.b_up)
        for half, b in enumerate(both):
            at, rank = slice(half * i, (half + 1) * i), slice(half * r, (half + 1) * r)
            torch.addmm(base[:, at], low[:, rank], b.T, out=out[:, at])

    def add_down(self, base: Tensor, low: Tensor, out: Tensor) -> None:
        """`base` [n, H] and the LoRA -> out."""
        torch.addmm(base, low, self.b_down.T, out=out)

    def backward_down(self, grad: Tensor, base: Tensor, out: Tensor) -> Tensor:
        """Adds to `base`, the gradient [n, I] of what the down projection takes; returns the low gradient [n, r]."""
        low = (grad @ self.b_down).mul_(self.scaling)
        torch.addmm(base, low, self.a_down, out=out)
        return low

    def backward_gate_up(self, grad: Tensor, base: Tensor, out: Tensor) -> Tensor:
        """Adds to `base`, the gradient [n, H] of the rows; returns the low gradient [n, 2 r]."""
        i = len(self.b_gate)
        low = torch.cat((grad[:, :i] @ self.b_gate, grad[:, i:] @ self.b_up), 1).mul_(self.scaling)
        torch.addmm(base, low, self.a_gate_up, out=out)
        return low


class LoraGradients:
    """The six fp32 gradients of a call, zero for experts without a token."""

    def __init__(self, lora: Lora, device: torch.device) -> None:
        """Zero."""
        self.tensors = [torch.zeros(t.shape, dtype=torch.float32, device=device) for t in lora]

    def add(self, name: str, e: int, outer: Tensor, inner: Tensor) -> None:
        """Adds outer.T @ inner [m, n] to one expert's matrix, in fp32."""
        grad = self.tensors[LORA_NAMES.index(name)][e]
        torch.addmm(grad, outer.T, inner, out=grad)
