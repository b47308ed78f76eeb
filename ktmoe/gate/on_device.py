"""The two checks for experts on a device beside the CPU: torch's own arithmetic, but nobody has tried every device."""

from __future__ import annotations

from dataclasses import replace

import torch

from ktmoe.backends import TABLE, TorchBackend
from ktmoe.config import KTConfig
from ktmoe.gate import contract
from ktmoe.gate.gate import LEVELS, Level
from ktmoe.gate.load_probe import probe_problems
from ktmoe.interface import Backend
from ktmoe.types import PROJECTIONS, ExpertWeights, KernelError, MoEShape


_passed: set[tuple[torch.device, MoEShape, torch.dtype]] = set()  # in this process


def check_on_device(backend: Backend, weights: ExpertWeights, device: torch.device, config: KTConfig) -> None:
    """Passes the contract for a layer's sizes on the device, once, and looks at each expert on its own weights.

    Args:
        backend: loaded with the experts that are there.
        weights: of those experts, where they came from.
        device: where it computes.
        config: whose `kt_verify` says how closely to look.

    Raises:
        KernelError: something is further off than the torch backend may be.
    """
    if config.kt_verify == "off":
        return
    level = LEVELS[config.kt_verify]
    problems = _broken(backend, device, level)
    problems = problems or probe_problems(backend, weights, TABLE["torch"].required, level.probe, gradient=True)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:8])
        raise KernelError(
            f"kt_num_gpu_experts: experts on {device} do not compute what they should:\n{shown}\nNothing was trained "
            "with them. Write 0, or leave it out."
        )


def _broken(backend: Backend, device: torch.device, level: Level) -> list[str]:
    """What breaks the contract there, for drawn experts of the same sizes."""
    shape = replace(backend.shape, num_experts=-(-(backend.shape.top_k + 2) // 4) * 4)
    key = device, shape, backend.compute_dtype
    if key in _passed:
        return []
    case = contract.draw_case(shape, level.tokens, seed=0)
    drawn = ExpertWeights(*(getattr(case.weights, p).to(device, backend.compute_dtype) for p in PROJECTIONS))
    on_device = TorchBackend(drawn, shape, backend.compute_dtype)
    problems = contract.judge(on_device, case, TABLE["torch"].required)
    on_device.close()
    if not problems:
        _passed.add(key)
    return problems
