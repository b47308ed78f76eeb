"""Faults planted in a kernel stand-in. Each is one line of a kernel gone wrong; the gate must reject every one.

A fault is a function of the place it sits in: the inputs, the frozen weights, the output, or the gradients.
"""

import dataclasses

import torch

from ktmoe.gate import contract
from ktmoe.retained import RetainedForwards
from ktmoe.stored import Stored
from ktmoe.types import PROJECTIONS, ExpertWeights


def lora(inputs, **changes):
    """The call with some LoRA tensors (dots written as double underscores) replaced by a function of themselves."""
    tensors = dict(inputs.lora.tensors)
    for name, change in changes.items():
        key = name.replace("__", ".")
        tensors[key] = change(tensors[key])
    return dataclasses.replace(inputs, lora=dataclasses.replace(inputs.lora, tensors=tensors))


def scaled(factor):
    return lambda i: dataclasses.replace(i, lora=dataclasses.replace(i.lora, scaling=i.lora.scaling * factor))


def weights(**changes):
    """Frozen weights with some projections replaced by a function of themselves."""
    return lambda w: ExpertWeights(*(changed(getattr(w, p), changes.get(p, torch.clone)) for p in PROJECTIONS))


def changed(stack, change):
    """A stack replaced by a function of it; stored in its own format, with scales that fit the new numbers."""
    if not isinstance(stack, Stored):
        return change(stack.clone())
    return contract.as_stored(change(torch.stack(list(stack.exact()))), stack.format)


def rows(at, value):
    def change(t):
        t = t.clone()
        t[at] = value if not callable(value) else value(t[at])
        return t

    return change


def grads(at, change):
    """One LoRA gradient (0 to 5 in the order of LORA_NAMES) replaced by a function of itself."""

    def apply(g):
        g.lora[at] = change(g.lora[at].clone())
        return g

    return apply


def field(name, change):
    def apply(g):
        setattr(g, name, change(getattr(g, name).clone()))
        return g

    return apply


def swap(t):
    return t[[1, 0, *range(2, len(t))]]


def half_zero(dim):
    def change(t):
        t = t.clone()
        t.narrow(dim, t.shape[dim] // 2, t.shape[dim] // 2).zero_()
        return t

    return change


# Before the call: what a kernel that reads its inputs wrongly computes.
INPUTS = {
    "alpha / r twice too large": scaled(2.0),
    "alpha / r missing": scaled(0.5),
    "alpha / r off by 5 %": scaled(1.05),
    "LoRA of gate left out": lambda i: lora(i, gate_proj__lora_B=torch.zeros_like),
    "LoRA of down left out": lambda i: lora(i, down_proj__lora_B=torch.zeros_like),
    "gate A in the place of up A": lambda i: lora(i, up_proj__lora_A=lambda t: i.lora.tensors["gate_proj.lora_A"]),
    "gate B in the place of up B": lambda i: lora(i, up_proj__lora_B=lambda t: i.lora.tensors["gate_proj.lora_B"]),
    "stale gate B": lambda i: lora(i, gate_proj__lora_B=lambda t: t * 0.9),
    "stale down A": lambda i: lora(i, down_proj__lora_A=lambda t: t.roll(1, 2)),
    "B read transposed": lambda i: lora(i, gate_proj__lora_B=lambda t: t.transpose(1, 2).reshape(t.shape)),
    "rank rows in the wrong order": lambda i: lora(i, up_proj__lora_A=lambda t: t.flip(1)),
    "last rank dropped": lambda i: lora(i, down_proj__lora_B=lambda t: rows((..., -1), 0.0)(t)),
    "LoRA of two experts swapped": lambda i: lora(i, gate_proj__lora_A=swap),
    "a token dropped": lambda i: dataclasses.replace(i, top_k_index=rows(3, -1)(i.top_k_index)),
    "the last token dropped": lambda i: dataclasses.replace(i, top_k_index=rows(-1, -1)(i.top_k_index)),
    "tokens shifted by one": lambda i: dataclasses.replace(i, hidden_states=i.hidden_states.roll(1, 0)),
    "one row off": lambda i: dataclasses.replace(i, hidden_states=rows(2, i.hidden_states[3])(i.hidden_states)),
    "routing weights ignored": lambda i: dataclasses.replace(i, top_k_weights=torch.ones_like(i.top_k_weights)),
    "routing weights of other slots": lambda i: dataclasses.replace(
        i, top_k_weights=i.top_k_weights.flip(1).contiguous()
    ),
    "the second slot ignored": lambda i: dataclasses.replace(i, top_k_index=rows((..., 1), -1)(i.top_k_index)),
    "ids off by one": lambda i: dataclasses.replace(
        i, top_k_index=torch.where(i.top_k_index > 0, i.top_k_index - 1, i.top_k_index)
    ),
}  # fmt: skip

# While loading.
WEIGHTS = {
    "gate and up swapped": lambda w: ExpertWeights(w.up_proj, w.gate_proj, w.down_proj),
    "two experts' up swapped": weights(up_proj=swap),
    "two experts' down swapped": weights(down_proj=swap),
    "half of I missing (a TP part)": weights(down_proj=half_zero(2)),
    "one row of gate zero": weights(gate_proj=rows((1, slice(5, 9)), 0.0)),
    "an expert's down off by 3 %": weights(down_proj=rows(2, lambda t: t * 1.03)),
    "rows of up shifted": weights(up_proj=lambda t: t.roll(1, 1)),
}


def expert_rows_from_the_33rd(inputs):
    """All but an expert's first 32 tokens dropped: the kernel works in blocks of 32 rows."""
    index = inputs.top_k_index.clone()
    for e in index.unique():
        at = (index == e).nonzero()[32:]
        index[tuple(at.T)] = -1
    return dataclasses.replace(inputs, top_k_index=index)


INPUTS["an expert's rows after the 32nd dropped"] = expert_rows_from_the_33rd
INPUTS["calls of a few tokens wrong"] = lambda i: scaled(3.0)(i) if len(i.hidden_states) <= 8 else i

# After the forward.
OUTPUT = {
    "sign of the output": torch.neg,
    "output off by 2 %": lambda t: t * 1.02,
    "a NaN in one row": rows((4, 0), float("nan")),
    "one row zero": rows(6, 0.0),
    "the last two rows swapped": lambda t: t[[*range(len(t) - 2), -1, -2]],
    "last columns not written": rows((..., slice(-16, None)), 0.0),
}

# After the backward.
GRADIENTS = {
    "sign of grad_input": field("hidden_states", torch.neg),
    "grad_input off by 2 %": field("hidden_states", lambda t: t * 1.02),
    "a row of grad_input not written": field("hidden_states", rows(5, 0.0)),
    "NaN in a row of grad_input": field("hidden_states", rows((5, 3), float("nan"))),
    "grad of routing weights not scaled": field("top_k_weights", lambda t: t * 1.3),
    "grad of routing weights in the wrong slot": field("top_k_weights", lambda t: t.flip(1)),
    "gate A gradient off by 2 %": grads(0, lambda t: t * 1.02),
    "gate B gradient off by 2 %": grads(1, lambda t: t * 1.02),
    "up A gradient off by 2 %": grads(2, lambda t: t * 1.02),
    "up B gradient off by 2 %": grads(3, lambda t: t * 1.02),
    "down A gradient off by 2 %": grads(4, lambda t: t * 1.02),
    "down B gradient off by 2 %": grads(5, lambda t: t * 1.02),
    "one expert's gradient off by 2 %": grads(3, rows(1, lambda t: t * 1.02)),
    "one expert's gradient stale": grads(0, lambda t: rows(1, t[0])(t)),
    "gradients of two experts swapped": grads(2, swap),
    "gate and up gradients swapped": lambda g: dataclasses.replace(g, lora=[*g.lora[2:4], *g.lora[:2], *g.lora[4:]]),
    "accumulated twice": grads(4, lambda t: 2 * t),
    "accumulation lost": grads(5, torch.zeros_like),
    "an idle expert not cleared": grads(1, rows((-1, 0, 0), 1e-6)),
    "NaN in one LoRA gradient": grads(2, rows((0, 0, 0), float("nan"))),
    "one rank's gradient missing": grads(0, lambda t: rows((slice(None), -1), 0.0)(t)),
}


# Around a sound backend: what answers from a forward that it kept, and does not look at everything.
STALE = {
    "a kept output answers other hidden states": "hidden_states",
    "a kept output answers other experts": "top_k_index",
    "a kept output answers other routing weights": "top_k_weights",
    "a kept output answers other LoRA": "lora",
    "a kept output answers another LoRA scale": "scaling",
}


class Stale(RetainedForwards):
    """Answers from what was kept although one thing has changed."""

    def __init__(self, backend, blind):
        super().__init__(backend, "retain")
        self.blind = blind

    def _same(self, kept, inputs):
        if self.blind in ("hidden_states", "top_k_index", "top_k_weights"):
            return super()._same(dataclasses.replace(kept, **{self.blind: getattr(inputs, self.blind)}), inputs)
        if self.blind == "scaling":
            return super()._same(dataclasses.replace(kept, scaling=inputs.lora.scaling), inputs)
        self._lora = list(inputs.lora)
        return super()._same(kept, inputs)


class Mutant:
    """A sound backend with one fault."""

    def __init__(self, backend, inputs=None, output=None, gradients=None):
        self.backend, self.inputs, self.output, self.gradients = backend, inputs, output, gradients

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def forward(self, inputs, *, save):
        inputs = self.inputs(inputs) if self.inputs else inputs
        out, ticket = self.backend.forward(inputs, save=save)
        return (self.output(out.clone()) if self.output else out), ticket

    def backward(self, ticket, inputs, grad_output):
        inputs = self.inputs(inputs) if self.inputs else inputs
        grads_ = self.backend.backward(ticket, inputs, grad_output)
        return self.gradients(grads_) if self.gradients else grads_


def mutants(case, make):
    """All mutants by name. `make(weights)` builds a sound backend."""
    sound = make(case.weights)
    found = {n: Mutant(sound, inputs=f) for n, f in INPUTS.items()}
    found |= {n: Mutant(make(f(case.weights))) for n, f in WEIGHTS.items()}
    found |= {n: Mutant(sound, output=f) for n, f in OUTPUT.items()}
    found |= {n: Mutant(sound, gradients=f) for n, f in GRADIENTS.items()}
    found |= {n: Stale(sound, blind) for n, blind in STALE.items()}
    return found
