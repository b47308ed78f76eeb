"""A backend made in one file and one row: every expert computes every token, in fp64. A pytest plugin, see
`test_backends.py`."""

import torch
from helpers import BACKENDS, SLACK
from ktmoe_reference import LORA_NAMES
from torch.nn.functional import one_hot, silu

from ktmoe.backends import TABLE, Limits, Row
from ktmoe.interface import STATELESS, Backend
from ktmoe.types import Gradients


class DenseBackend(Backend):
    name = "dense"
    compute_dtype = torch.float64

    def __init__(self, weights, shape):
        self.shape = shape
        self.stacks = [
            torch.stack([m.double() for m in stack])
            for stack in (weights.gate_proj, weights.up_proj, weights.down_proj)
        ]

    def forward(self, inputs, *, save):
        with torch.no_grad():
            return self._out(
                inputs, inputs.hidden_states, inputs.top_k_weights.double(), self._lora(inputs)
            ), STATELESS

    def backward(self, ticket, inputs, grad_output):
        leaves = [inputs.hidden_states.clone(), inputs.top_k_weights.double(), *self._lora(inputs)]
        with torch.enable_grad():
            x, w, *lora = (t.detach().requires_grad_() for t in leaves)
            grads = torch.autograd.grad(
                self._out(inputs, x, w, lora), [x, w, *lora], grad_output, materialize_grads=True
            )
        return Gradients(grads[0], grads[1].float(), [g.float() for g in grads[2:]] or None)

    def _lora(self, inputs):
        return [inputs.lora.tensors[name].double() for name in LORA_NAMES] if inputs.lora else []

    def _out(self, inputs, x, w, lora):
        def linear(at, x):  # [E, T, in] -> [E, T, out]
            y = x @ self.stacks[at].mT
            return y + inputs.lora.scaling * (x @ lora[2 * at].mT @ lora[2 * at + 1].mT) if lora else y

        chosen = one_hot(inputs.top_k_index + 1, self.shape.num_experts + 1)[..., 1:]  # [T, K, E]
        share = torch.einsum("tk,tke->te", w, chosen.double())
        x = x.expand(self.shape.num_experts, *x.shape)
        return torch.einsum("te,eth->th", share, linear(2, silu(linear(0, x)) * linear(1, x)))


TABLE["dense"] = Row(
    "dense",
    lambda plan, weights, shape, scaling, packed: DenseBackend(weights, shape),
    required=Limits(1e-6, 1e-6, 1e-6),
    expected=Limits(1e-6, 1e-6, 1e-6),
    aimed_at=Limits(1e-6, 1e-6, 1e-6),
    describe=lambda: "every expert for every token",
)
BACKENDS.append("dense")
SLACK["dense"] = 1e-5
