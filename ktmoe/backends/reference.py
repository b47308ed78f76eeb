"""The specification as a backend: `ktmoe_reference` in fp32, its gradients by autograd."""

from __future__ import annotations

import torch
from ktmoe_reference import LORA_NAMES, experts_forward
from torch import Tensor

from ktmoe.backends.row import Limits, Row
from ktmoe.interface import STATELESS, Backend
from ktmoe.types import ExpertWeights, Gradients, Inputs, MoEShape


class ReferenceBackend(Backend):
    """Slow and plain. Keeps nothing between forward and backward: the backward runs the forward again."""

    name = "reference"
    compute_dtype = torch.float32

    def __init__(self, weights: ExpertWeights, shape: MoEShape) -> None:
        """Holds the weights as they are; each expert is cast to fp32 when it is used."""
        self.weights = weights
        self.shape = shape

    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        with torch.no_grad():
            return self._run(inputs.hidden_states, inputs.top_k_weights, inputs, list(inputs.lora or ())), STATELESS

    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`."""
        with torch.enable_grad():
            x = inputs.hidden_states.detach().requires_grad_()
            w = inputs.top_k_weights.detach().requires_grad_()
            lora = [t.detach().float().requires_grad_() for t in inputs.lora or ()]
            out = self._run(x, w, inputs, lora)
            if not out.requires_grad:  # no token met an expert
                grads = [torch.zeros_like(t) for t in (x, w, *lora)]
            else:
                found = torch.autograd.grad(out, [x, w, *lora], grad_output, allow_unused=True)
                grads = [torch.zeros_like(t) if g is None else g for t, g in zip((x, w, *lora), found, strict=True)]
        return Gradients(grads[0], grads[1], grads[2:] or None)

    def _run(self, x: Tensor, w: Tensor, inputs: Inputs, lora: list[Tensor]) -> Tensor:
        tensors = dict(zip(LORA_NAMES, lora, strict=True)) if lora else None
        scaling = inputs.lora.scaling if inputs.lora else 1.0
        projections = (self.weights.gate_proj, self.weights.up_proj, self.weights.down_proj)
        return experts_forward(x, inputs.top_k_index, w, *projections, tensors, scaling)


ROW = Row(
    "reference",
    lambda plan, weights, shape, scaling, packed: ReferenceBackend(weights, shape),
    required=Limits(1e-5, 1e-5, 1e-5),
    expected=Limits(1e-5, 1e-5, 1e-5),
    aimed_at=Limits(1e-5, 1e-5, 1e-5),
    describe=lambda: "the fp32 reference on the CPU",
)
