"""The two checks that stand before the kernel. What fails them never computes a gradient.

(a) The contract gate, once per shape on this host: every output and gradient against the reference, in a process of
    its own, since a kernel that is wrong may also crash. Its pass is a certificate (`ktmoe.gate.certificate`).
(b) The load probe, on every layer at every load: each expert on the real weights against torch, output and, wherever
    backward weights are kept, input gradient. It finds what (a) cannot: a mis-read shard, a swapped expert.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from ktmoe.backends import TABLE, Plan, build, is_kernel, kt
from ktmoe.config import KTConfig
from ktmoe.gate import certificate, contract
from ktmoe.gate.load_probe import Depth, probe_problems
from ktmoe.interface import Backend
from ktmoe.kept import write
from ktmoe.notices import say_once
from ktmoe.retained import RetainedForwards
from ktmoe.types import ExpertWeights, KernelError, KTError, MoEShape


_TIMEOUT = 600  # seconds; a gate takes one to ten


@dataclass(frozen=True)
class Level:
    """How much is checked.

    Attributes:
        seeds: drawn cases of the contract gate.
        tokens: in each case, besides two per expert, if `case_tokens` does not ask for more.
        every_gradient: whether the load probe computes the input gradient also where that tells nothing new.
        probe: how closely the load probe looks.
    """

    seeds: int
    tokens: int
    every_gradient: bool
    probe: Depth


# quick: what a start may cost. full: run anew at every start, for those who doubt the kernel, or this file.
LEVELS = {
    "quick": Level(1, 64, False, Depth(torch.bfloat16, 64)),
    "full": Level(8, 192, True, Depth(torch.float32, 1)),
}
_gradients_probed: set[tuple[Plan, MoEShape, bool]] = set()


def ensure_verified(plan: Plan, shape: MoEShape, config: KTConfig) -> Plan:
    """Passes the contract gate for what the plan would run, or finds its certificate.

    Returns:
        The plan; the torch backend's if the gate failed and `kt_fallback` is `torch`.

    Raises:
        KernelError: the gate failed and `kt_fallback` is `error`.
    """
    if not is_kernel(plan):
        return plan
    if config.kt_verify == "off":
        say_once(
            f"ktmoe: kt_verify: off, so nothing has checked that {plan.backend} ({kt.variant()}) computes what it "
            "should on this machine. Wrong gradients would go unnoticed."
        )
        return plan
    about = certificate.subject(plan, contract.reduced(shape))
    if config.kt_verify == "quick" and certificate.exists(about):
        return plan
    problems = _run_gate(about, config.kt_verify)
    if not problems:
        write(about)
        return plan
    return _fall_back(plan, config, "the contract gate", problems)


def probe(backend: Backend, plan: Plan, weights: ExpertWeights, config: KTConfig) -> tuple[Backend, Plan]:
    """Checks a loaded layer on its own weights: one token per expert, output and mostly the input gradient.

    With a shared backward buffer the kernel makes the backward weights from the forward's before every backward, and
    throws them away after it: there the gradient is computed for the first layer of its sizes, and the first that was
    reloaded into a used object.

    Returns:
        The backend and its plan; a torch backend and its plan if the probe failed and `kt_fallback` is `torch`.

    Raises:
        KernelError: the probe failed and `kt_fallback` is `error`.
    """
    if config.kt_verify == "off":
        return backend, plan
    level = LEVELS[config.kt_verify]
    alike = (plan, backend.shape, backend.reloaded)
    gradient = level.every_gradient or not plan.share_backward or alike not in _gradients_probed
    try:
        problems = probe_problems(backend, weights, TABLE[plan.backend].required, level.probe, gradient)
    except KTError:
        backend.close()
        raise
    except BaseException:
        backend.condemn()
        raise
    if not problems:
        if gradient:
            _gradients_probed.add(alike)
        return backend, plan
    backend.condemn()
    fallen = _fall_back(plan, config, "the load probe", problems)
    return build(fallen, weights, backend.shape, 1.0), fallen


def run_contract(about: dict[str, Any], level: str) -> list[str]:
    """Runs the contract in this process and returns what breaks it. The child process of the gate calls this."""
    shape, plan = MoEShape(**about["shape"]), Plan(**about["plan"])
    if certificate.subject(plan, shape) != about:
        return ["the checking process has another ktmoe, kernel or CPU than this one"]
    for seed in range(LEVELS[level].seeds):
        case = contract.draw_case(shape, case_tokens(level, shape), seed, TABLE[plan.backend].stored)
        backend = RetainedForwards(build(plan, case.weights, shape, case.lora.scaling), "retain")
        problems = contract.judge(backend, case, TABLE[plan.backend].required)
        backend.close()
        if problems:
            return problems
    return []


def case_tokens(level: str, shape: MoEShape) -> int:
    """Mixed tokens of a drawn case: the kernel computes in blocks of 32 rows, and some expert must begin a second."""
    return max(LEVELS[level].tokens, 40 * (shape.num_experts - 1) // shape.top_k)


def _run_gate(about: dict[str, Any], level: str) -> list[str]:
    command = [sys.executable, "-m", "ktmoe.gate", json.dumps(about), level]
    # Large shapes spend most of their time on page faults: huge pages take 8 s where 17 were, for Mixtral. glibc 2.35
    # and later know the setting, others ignore it.
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1")))
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, env=environment)
    except subprocess.TimeoutExpired:
        return [f"no answer within {_TIMEOUT} s"]
    with contextlib.suppress(ValueError, IndexError, KeyError, TypeError):
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        if done.returncode == 0 and answer["about"] == about:
            return list(answer["problems"])
    tail = "\n".join(done.stderr.strip().splitlines()[-5:])
    ended = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"exited with {done.returncode}"
    return [f"the checking process {ended}. {tail}"]


def _fall_back(plan: Plan, config: KTConfig, check: str, problems: list[str]) -> Plan:
    shown = "\n".join(f"  {p}" for p in problems[:10])
    more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
    message = f"kt_backend: {plan.backend} ({kt.variant()}) failed {check} on this machine:\n{shown}{more}"
    if config.kt_fallback == "torch":
        say_once(f"ktmoe: {message}\nkt_fallback: torch, so the routed experts run on the torch backend.")
        return replace(plan, backend="torch")
    raise KernelError(
        f"{message}\nNothing was trained with it. Use kt_backend: torch, or kt_fallback: torch to let this "
        "happen by itself."
    )
