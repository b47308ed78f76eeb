"""The two checks that stand before the kernel. What fails them never computes a gradient.

(a) The contract gate, once per shape on this host: every output and gradient against fp64, in a process of its own,
    since a kernel that is wrong may also crash. Its pass is a certificate in the user's cache directory.
(b) The load probe, on every layer at every load: each expert's output and input gradient on the real weights against
    fp32. It finds what (a) cannot: a mis-read shard, a swapped expert.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs
import torch

from ktmoe import contract
from ktmoe.backends import Plan, build, kernel, say_once
from ktmoe.backends.torch import TorchBackend
from ktmoe.config import KTConfig
from ktmoe.interface import Backend
from ktmoe.types import ExpertWeights, KernelError, MoEShape
from ktmoe.validation import make_inputs


_TIMEOUT = 600  # seconds; a gate takes one to ten
TOKENS = 16


def ensure_verified(plan: Plan, shape: MoEShape, config: KTConfig) -> Plan:
    """Passes the contract gate for what the plan would run, or finds its certificate.

    Returns:
        The plan; the torch backend's if the gate failed and `kt_fallback` is `torch`.

    Raises:
        KernelError: the gate failed and `kt_fallback` is `error`.
    """
    if not plan.is_kernel:
        return plan
    subject = _subject(plan, contract.reduced(shape))
    path = _cache_dir() / f"{hashlib.sha256(_canonical(subject)).hexdigest()[:32]}.json"
    if _certified(path, subject):
        return plan
    problems = _run_gate(subject)
    if not problems:
        _write(path, subject)
        return plan
    return _fall_back(plan, config, "the contract gate", problems)


def probe(backend: Backend, plan: Plan, weights: ExpertWeights, config: KTConfig) -> tuple[Backend, Plan]:
    """Checks a loaded layer on its own weights: one token per expert, output and input gradient.

    Returns:
        The backend and its plan; a torch backend and its plan if the probe failed and `kt_fallback` is `torch`.

    Raises:
        KernelError: the probe failed and `kt_fallback` is `error`.
    """
    problems = probe_problems(backend, weights, contract.HARD[plan.backend])
    if not problems:
        return backend, plan
    backend.close()
    fallen = _fall_back(plan, config, "the load probe", problems)
    return build(fallen, weights, backend.shape, 1.0), fallen


def probe_problems(backend: Backend, weights: ExpertWeights, limits: contract.Limits) -> list[str]:
    """What the load probe finds wrong with each expert, as sentences."""
    shape = backend.shape
    g = torch.Generator().manual_seed(shape.num_experts)
    x = torch.randn(shape.num_experts, shape.hidden_size, generator=g).to(torch.bfloat16)  # [E, H]
    grad = torch.randn(shape.num_experts, shape.hidden_size, generator=g).to(torch.bfloat16)
    index = torch.full((shape.num_experts, shape.top_k), -1)
    index[:, 0] = torch.arange(shape.num_experts)
    routing = torch.ones(shape.num_experts, shape.top_k)
    answers = []
    for b in (backend, TorchBackend(weights, shape, torch.float32)):
        inputs = make_inputs(x, index, routing, None, shape, b.compute_dtype)
        out, ticket = b.forward(inputs, save=True)
        answers.append((out.float(), b.backward(ticket, inputs, grad.to(b.compute_dtype)).hidden_states.float()))
    problems = []
    for name, limit, got, expected in zip(
        ("output", "input gradient"), (limits.forward, limits.backward), *answers, strict=True
    ):
        error = (got - expected).abs().mean(-1) / expected.abs().mean(-1).clamp_min(1e-30)  # [E]
        wrong = (~(error <= limit)).nonzero().flatten().tolist()
        problems += [f"{name} of expert {e}: relative error {error[e]:.4g}, limit {limit}" for e in wrong]
    return problems


def run_contract(subject: dict[str, Any]) -> list[str]:
    """Runs the contract in this process and returns what breaks it. The child process of the gate calls this."""
    shape, plan = MoEShape(**subject["shape"]), Plan(**subject["plan"])
    case = contract.draw_case(shape, TOKENS, seed=0)
    backend = build(plan, case.weights, shape, case.lora.scaling)
    expected = contract.specification(case)
    rows = contract.measure(case, contract.answer(backend, case), expected)
    return contract.violations(rows, contract.HARD[plan.backend], contract.baseline(plan.backend, case, expected))


def _run_gate(subject: dict[str, Any]) -> list[str]:
    command = [sys.executable, "-m", "ktmoe.gate", json.dumps(subject)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return [f"no answer within {_TIMEOUT} s"]
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    tail = "\n".join(done.stderr.strip().splitlines()[-5:])
    ended = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"exited with {done.returncode}"
    return [f"the checking process {ended}. {tail}"]


def _fall_back(plan: Plan, config: KTConfig, check: str, problems: list[str]) -> Plan:
    shown = "\n".join(f"  {p}" for p in problems[:10])
    more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
    message = f"kt_backend: {plan.backend} ({kernel.variant()}) failed {check} on this machine:\n{shown}{more}"
    if config.kt_fallback == "torch":
        say_once(f"ktmoe: {message}\nkt_fallback: torch, so the routed experts run on the torch backend.")
        return replace(plan, backend="torch")
    raise KernelError(
        f"{message}\nNothing was trained with it. Use kt_backend: torch, or kt_fallback: torch to let this "
        "happen by itself."
    )


def _subject(plan: Plan, shape: MoEShape) -> dict[str, Any]:
    """Everything that a certificate speaks of. Any difference asks for a new gate."""
    return {
        "shape": asdict(shape),
        "plan": asdict(plan),
        "extension": _extension_hash(),
        "variant": kernel.variant(),
        "cpu": _cpu_model(),
        "ktmoe": _version("ktmoe"),
        "torch": torch.__version__,
    }


@functools.cache
def _extension_hash() -> str:
    path = kernel.extension_path()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


@functools.cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "cpu family", "model", "stepping")
    return "; ".join(sorted({line.replace("\t", "") for line in lines if line.split("\t")[0].strip() in keys}))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return "source"


def _cache_dir() -> Path:
    return Path(os.environ.get("KTMOE_CACHE_DIR") or platformdirs.user_cache_dir("ktmoe")) / "gate"


def _canonical(subject: dict[str, Any]) -> bytes:
    return json.dumps(subject, sort_keys=True).encode()


def _certified(path: Path, subject: dict[str, Any]) -> bool:
    try:
        return json.loads(path.read_text()) == subject
    except (OSError, ValueError):
        return False


def _write(path: Path, subject: dict[str, Any]) -> None:
    """Atomically: a certificate is whole or absent. A read-only cache costs a gate per process, not a failure."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(subject, sort_keys=True, indent=1))
        part.replace(path)
    except OSError as error:
        say_once(f"ktmoe: the gate's certificate cannot be kept ({error}); the check runs again in the next process.")


if __name__ == "__main__":
    print(json.dumps(run_contract(json.loads(sys.argv[1]))))
