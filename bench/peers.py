"""One layer of experts as each contestant runs it: ktmoe's backends, the bare kernel, transformers with peft.

`contestant(...)` builds one in this process. What it gives computes a call forward, or forward and backward with LoRA
on every expert, through autograd as in a model; only the bare kernel has no autograd around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ktmoe
from ktmoe.autograd import run_experts
from ktmoe.backends.kt import lora as kernel_lora
from ktmoe.gate.contract import Case
from ktmoe.types import ExpertWeights


@dataclass(frozen=True)
class Call:
    """What a layer is called with, and the gradient that comes back."""

    hidden_states: Tensor  # [T, H] bf16
    index: Tensor  # [T, K]
    weights: Tensor  # [T, K] float32
    grad: Tensor  # [T, H] bf16


Run = Callable[[Call], Any]


@dataclass(frozen=True)
class Contestant:
    """How one computes. A backward goes to the hidden states, the routing weights and the LoRA."""

    forward: Run  # as in training, with LoRA; what it gives is for `backward`
    backward: Callable[[Any, Call], None]
    output: Callable[[Any], Tensor]
    checkpointed: Run | None = None  # forward, recompute and backward
    forward_without_lora: Run | None = None
    bare: Contestant | None = None  # the kernel that it is a module around


def contestant(name: str, case: Case, threads: int) -> Contestant:
    """Builds it from a case's weights and LoRA.

    Args:
        name: a backend, eager or grouped_mm.
        case: the layer.
        threads: of the kernel.
    """
    return _transformers(name, case) if name in ("eager", "grouped_mm") else _ktmoe(name, case, threads)


def _ktmoe(name: str, case: Case, threads: int) -> Contestant:
    s = case.shape
    config = ktmoe.KTConfig(kt_backend=name, kt_num_threads=threads or None, kt_share_backward="auto")
    alpha = case.lora.scaling * s.rank
    experts = ktmoe.MoEExperts(case.weights, top_k=s.top_k, r=s.rank, lora_alpha=alpha, config=config)
    for parameter, value in zip(experts.lora.values(), case.lora, strict=True):
        parameter.data.copy_(value)
    backend = experts.load(s.rank)

    def forward(call: Call) -> Any:
        leaves = _leaves(call)
        return experts(leaves[0], call.index, leaves[1]), leaves

    def without(call: Call) -> Any:
        x, w = _leaves(call)
        return run_experts(backend, x, call.index, w, None)

    bare = _bare(backend.backend, case) if name != "torch" else None  # type: ignore[attr-defined]
    return _differentiable(experts, forward, without, bare)


def _bare(backend: Any, case: Case) -> Contestant:
    """The extension's own tasks on the object that the module around it uses: LoRA refreshed, forward, backward."""
    made = backend._object
    gradients = [torch.empty_like(t) for t in kernel_lora.gradient_buffers(backend.shape)]

    def forward(call: Call) -> Tensor:
        kernel_lora.fill(made.lora, case.lora, case.lora.scaling)
        made.refresh_lora()
        out = torch.empty_like(call.hidden_states)
        made.forward(call.hidden_states, call.index, call.weights, out, save=True)
        return out

    def backward(_: Tensor, call: Call) -> None:
        made.backward(call.grad, torch.empty_like(call.grad), gradients, torch.empty_like(call.weights))
        backend._cached = 0  # the module must not believe that its activations are still there

    return Contestant(forward, backward, lambda out: out)


def _transformers(implementation: str, case: Case) -> Contestant:
    """transformers' own experts module, with peft's LoRA on its two stacked parameters."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    s = case.shape
    config = Qwen3MoeConfig(
        hidden_size=s.hidden_size,
        moe_intermediate_size=s.intermediate_size,
        num_experts=s.num_experts,
        num_experts_per_tok=s.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        model = nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    model.config = config  # type: ignore[assignment]
    model.to(torch.bfloat16)
    experts: Any = model["experts"]
    experts.gate_up_proj = nn.Parameter(_fused(case.weights), requires_grad=False)
    experts.down_proj = nn.Parameter(torch.stack(list(case.weights.down_proj)), requires_grad=False)
    wanted = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=s.rank, lora_alpha=case.lora.scaling * s.rank, target_modules=[], target_parameters=wanted)
    tuned: Any = get_peft_model(model, lora)  # type: ignore[arg-type]
    wrapped = tuned.base_model.model["experts"]

    def forward(call: Call) -> Any:
        leaves = _leaves(call)
        return wrapped(leaves[0], call.index, leaves[1].to(leaves[0].dtype)), leaves

    return _differentiable(wrapped, forward, None, None)


def _differentiable(module: Any, forward: Run, without: Run | None, bare: Contestant | None) -> Contestant:
    trained = [p for p in module.parameters() if p.requires_grad]

    def backward(done: Any, call: Call) -> None:
        torch.autograd.grad(done[0], [*done[1], *trained], call.grad)

    def checkpointed(call: Call) -> None:
        x, w = _leaves(call)

        def run(x: Tensor, w: Tensor) -> Tensor:
            return module(x, call.index, w.to(x.dtype) if bare is None and without is None else w)

        out = torch.utils.checkpoint.checkpoint(run, x, w, use_reentrant=False)
        torch.autograd.grad(out, [x, w, *trained], call.grad)

    return Contestant(forward, backward, lambda done: done[0], checkpointed, without, bare)


def _leaves(call: Call) -> tuple[Tensor, Tensor]:
    return call.hidden_states.detach().requires_grad_(), call.weights.detach().requires_grad_()


def _fused(weights: ExpertWeights) -> Tensor:
    return torch.stack([torch.cat((g, u)) for g, u in zip(weights.gate_proj, weights.up_proj, strict=True)])
