"""The torch backend: grouped by expert, backward written by hand, straight from the weights without a copy.

It serves CPUs that the kernel has no training classes for, and computes exactly what the kernel cannot
(tokens with non-finite values or extreme gate activations).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from ktmoe.backends.row import Limits, Row
from ktmoe.interface import STATELESS, Backend
from ktmoe.types import ExpertWeights, Gradients, Inputs, Lora, MoEShape


class TorchBackend(Backend):
    """Stateless: the backward computes gate and up again instead of keeping them."""

    name = "torch"

    def __init__(self, weights: ExpertWeights, shape: MoEShape, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        """Holds the weights as they are.

        Args:
            weights: computed from in place where they are in `compute_dtype`, else cast expert by expert.
            shape: what it is built for.
            compute_dtype: of products; routing weights, sums over experts and LoRA gradients are fp32.
        """
        self.weights = weights
        self.shape = shape
        self.compute_dtype = compute_dtype

    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        out = torch.zeros(inputs.hidden_states.shape, dtype=torch.float32)  # [T, H]
        for expert in self._visit(inputs):
            y = expert.down(silu(expert.gate()) * expert.up())  # [n, H]
            out.index_add_(0, expert.token, y.float() * expert.routing_weight)
        return out.to(self.compute_dtype), STATELESS

    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`."""
        grad_x = torch.zeros(inputs.hidden_states.shape, dtype=torch.float32)  # [T, H]
        grad_w = torch.zeros(inputs.top_k_weights.shape, dtype=torch.float32)  # [T, K]
        grad_lora = [torch.zeros(t.shape, dtype=torch.float32) for t in inputs.lora or ()]
        for expert in self._visit(inputs):
            gate, up = expert.gate(), expert.up()  # [n, I]
            sigmoid = torch.sigmoid(gate.float())
            act = (gate.float() * sigmoid).to(gate.dtype)
            mid = act * up
            grad = grad_output[expert.token]  # [n, H]
            grad_w[expert.token, expert.slot] = (expert.down(mid).float() * grad.float()).sum(-1)
            grad_y = (grad.float() * expert.routing_weight).to(grad.dtype)
            grad_mid = expert.backward("down_proj", mid, grad_y, grad_lora)  # [n, I]
            # d silu(g) / dg = s (1 + g (1 - s)), s = sigmoid(g); in fp32, since it cancels for g near -1.28
            d_silu = sigmoid * (1 + gate.float() * (1 - sigmoid))
            grad_gate = (grad_mid.float() * up.float() * d_silu).to(grad.dtype)
            grad_h = expert.backward("gate_proj", expert.x, grad_gate, grad_lora).float()
            grad_h += expert.backward("up_proj", expert.x, grad_mid * act, grad_lora).float()
            grad_x.index_add_(0, expert.token, grad_h)
        return Gradients(grad_x.to(self.compute_dtype), grad_w, grad_lora or None)

    def _visit(self, inputs: Inputs) -> Iterator[_Expert]:
        """Every expert that has a token, in order, with its tokens."""
        flat = inputs.top_k_index.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat + 1, minlength=self.shape.num_experts + 1).tolist()
        start = counts[0]  # skipped slots (-1) come first
        for e, n in enumerate(counts[1:]):
            if n:
                yield _Expert(e, order[start : start + n], inputs, self.weights, self.compute_dtype)
            start += n


class _Expert:
    """One expert with the tokens routed to it."""

    def __init__(self, e: int, positions: Tensor, inputs: Inputs, weights: ExpertWeights, dtype: torch.dtype) -> None:
        k = inputs.top_k_index.shape[1]
        self.e = e
        self.token = positions // k  # [n]
        self.slot = positions % k  # [n]
        self.x = inputs.hidden_states[self.token]  # [n, H]
        self.routing_weight = inputs.top_k_weights[self.token, self.slot].unsqueeze(-1)  # [n, 1] fp32
        gate, up, down = (w.to(dtype) for w in weights.expert(e))
        self.weight = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        self.lora: Lora | None = inputs.lora

    def _ab(self, name: str) -> tuple[Tensor, Tensor]:
        assert self.lora is not None
        tensors, dtype = self.lora.tensors, self.x.dtype
        return tensors[f"{name}.lora_A"][self.e].to(dtype), tensors[f"{name}.lora_B"][self.e].to(dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weight[name].T
        if self.lora is not None:
            a, b = self._ab(name)
            y = torch.add(y, x @ a.T @ b.T, alpha=self.lora.scaling)
        return y

    def gate(self) -> Tensor:
        return self._linear("gate_proj", self.x)

    def up(self) -> Tensor:
        return self._linear("up_proj", self.x)

    def down(self, mid: Tensor) -> Tensor:
        return self._linear("down_proj", mid)

    def backward(self, name: str, x: Tensor, grad_y: Tensor, grad_lora: list[Tensor]) -> Tensor:
        """Gradient [n, in] of one projection's input; writes this expert's rows of the LoRA gradients."""
        grad_x = grad_y @ self.weight[name]
        if self.lora is not None:
            a, b = self._ab(name)
            at = 2 * ("gate_proj", "up_proj", "down_proj").index(name)
            scaled = (grad_y @ b).float() * self.lora.scaling  # [n, r]
            grad_lora[at][self.e] = scaled.T @ x.float()
            grad_lora[at + 1][self.e] = (grad_y.T.float() @ (x @ a.T).float()) * self.lora.scaling
            grad_x = grad_x + scaled.to(x.dtype) @ a
        return grad_x


ROW = Row(
    "torch",
    lambda plan, weights, shape, scaling, packed: TorchBackend(weights, shape),
    required=Limits(0.05, 0.10, 0.005),
    expected=Limits(0.01, 0.015, 0.005),
    aimed_at=Limits(0.05, 0.10, 0.005),
    describe=lambda: "PyTorch on the CPU",
)
