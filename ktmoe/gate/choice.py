"""What `auto` means on this host: kernel or torch, with how many threads, and which backward buffers.

Measured once for each shape of layers, in a few seconds, and kept beside the gate's certificates.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

from ktmoe import memory
from ktmoe.backends import KERNEL_BACKENDS, TABLE, Plan, is_kernel
from ktmoe.config import KTConfig
from ktmoe.cores import usable_cores
from ktmoe.gate import certificate
from ktmoe.kept import read, write
from ktmoe.notices import say_once
from ktmoe.planning import cores_to_leave, plan
from ktmoe.types import KTError, MoEShape


_COMFORTABLE = 0.6  # of the free memory: what both copies of all weights may take
_WORTH_IT = 16 * 2**20  # bytes of a layer's experts; smaller ones are not measured
_shared: dict[int, str] = {}  # by bytes of all experts
_TOKENS = 512  # of a layer, where backends are compared
_ENOUGH = 96 * 2**20  # bytes of bf16 weights that are measured of a layer
_DENSE = 24  # operations of the dense products that are measured beside the experts, in tokens x H^2
_TIMEOUT = 120  # seconds; measuring takes three to ten


def settle(config: KTConfig, shape: MoEShape, size: int, stored: str = "") -> KTConfig:
    """The configuration with `kt_backend: auto`, `kt_num_threads` and `kt_share_backward: auto` decided, and said.

    Whatever the user gave stays. A layer that the kernel cannot take is left to `plan`, which says why.

    Args:
        config: as the user wrote it.
        shape: of the model's layers, or of most of them.
        size: bytes of all routed experts in bf16.
        stored: the format of the weights, as `ExpertWeights.stored`.
    """
    kinds = _possible(config, shape, size, stored)
    if not any(kind in KERNEL_BACKENDS for kind in kinds):
        return config
    if config.kt_share_backward == "auto":
        config = replace(config, kt_share_backward=_share(kinds, size))
    candidates = _candidates(kinds, config, shape, stored)
    if len(candidates) < 2 or bf16_bytes(shape) < _WORTH_IT:
        return config
    measured = _measured(shape, candidates, stored, _TOKENS)
    best = plan(config, shape, stored)
    if measured is not None:
        times = [sum(both) for both in measured]
        best = candidates[times.index(min(times))]
        shown = "; ".join(f"{_name(p)}: {1e3 * t:.3g} ms" for p, t in zip(candidates, times, strict=True))
        say_once(f"ktmoe: {_name(best)} is the fastest on this machine for experts of these sizes ({shown}).")
    return replace(
        config, kt_backend=best.backend, kt_num_threads=best.threads if is_kernel(best) else config.kt_num_threads
    )


def contenders(config: KTConfig, shape: MoEShape, size: int, stored: str = "") -> list[str]:
    """The backends that `settle` would measure, by name; the one that runs without. Arguments as it takes them."""
    if bf16_bytes(shape) < _WORTH_IT:
        return [plan(config, shape, stored).backend]
    return _possible(config, shape, size, stored) or [plan(config, shape, stored).backend]


def _possible(config: KTConfig, shape: MoEShape, size: int, stored: str) -> list[str]:
    kinds = _kinds(config, size, stored)
    return [kind for kind in kinds if kind not in KERNEL_BACKENDS or _kernel_can(kind, config, shape, stored)]


def bf16_bytes(shape: MoEShape) -> int:
    """Bytes of one layer's experts in bf16."""
    return 6 * shape.num_experts * shape.hidden_size * shape.intermediate_size


def _kinds(config: KTConfig, size: int, stored: str) -> list[str]:
    """Backends to compare: of `auto`, what computes with the weights as they are, or cast to bf16 where that fits."""
    if config.kt_backend != "auto":
        return [config.kt_backend]
    torch = [] if config.kt_numa_nodes else ["torch"]
    own = [name for name, row in TABLE.items() if stored and row.stored == stored]
    fits = not own or size < _COMFORTABLE * memory.available()
    return [*own, *(["AMXBF16"] if fits else []), *torch]


def _kernel_can(kind: str, config: KTConfig, shape: MoEShape, stored: str) -> bool:
    try:
        return is_kernel(plan(replace(config, kt_backend=kind), shape, stored))
    except KTError:
        return False


def _share(kinds: list[str], size: int) -> str:
    """A backward copy for each layer costs as much again as the forward's, and saves repacking at every backward.

    INT8 shares: its objects with a copy of their own cannot be reloaded (K22). Decided once for a model: objects of
    closed layers wait for the next that is built alike, and still hold their memory.
    """
    if "AMXInt8" in kinds or not all(TABLE[kind].own_backward for kind in kinds):
        return "on"
    return _shared.setdefault(size, "off" if 2 * size < _COMFORTABLE * memory.available() else "on")


def _candidates(kinds: list[str], config: KTConfig, shape: MoEShape, stored: str) -> list[Plan]:
    """Plans to compare. A kernel thread waits by spinning, and so does the queue's own: often one less is more."""
    found = []
    for kind in kinds:
        one = plan(replace(config, kt_backend=kind), shape, stored)
        if kind == "torch" or config.kt_num_threads:
            found.append(one)
            continue
        own = usable_cores(nodes=one.nodes)
        counts = {n for n in (own, own - cores_to_leave(own), own // 2, own // 4, one.tp) if n >= one.tp}
        found += [replace(one, threads=n) for n in sorted(counts, reverse=True)]
    return found


def _name(plan: Plan) -> str:
    if not is_kernel(plan):
        return plan.backend
    return f"{plan.backend} with {plan.threads} thread{'s' if plan.threads != 1 else ''}"


def part_of(shape: MoEShape, tokens: int) -> tuple[MoEShape, int]:
    """Fewer experts with as many rows each as so many tokens give all of them, and the tokens for that."""
    each = 3 * shape.hidden_size * shape.intermediate_size * 2
    experts = min(shape.num_experts, -(-max(shape.top_k, _ENOUGH // each, 2) // 4) * 4)
    part = MoEShape(experts, shape.hidden_size, shape.intermediate_size, shape.top_k, shape.rank)
    return part, max(1, tokens * experts // shape.num_experts)


@dataclass(frozen=True)
class Speed:
    """What was measured of one layer's experts.

    Attributes:
        plan: under which they ran.
        experts: seconds of a forward and a backward.
        dense: operations a second of dense products beside them.
    """

    plan: Plan
    experts: float
    dense: float


def speed(config: KTConfig, shape: MoEShape, stored: str, tokens: int) -> Speed | None:
    """How fast a layer's experts are here, from an earlier call or measured now; None, and said, if that fails.

    Args:
        config: with what is `auto` decided by the fastest of those that it leaves open.
        shape: of the layer.
        stored: the format of the weights, as `ExpertWeights.stored`.
        tokens: of the call.
    """
    kinds = _possible(config, shape, 0, stored)
    plans = _candidates(kinds, config, shape, stored)
    measured = _measured(shape, plans, stored, tokens)
    if measured is None:
        return None
    at = min(range(len(plans)), key=lambda n: sum(measured[n]))
    part, fewer = part_of(shape, tokens)
    experts, dense = measured[at]
    scale = tokens / fewer  # as many parts as the layer has
    return Speed(plans[at], experts * scale, _DENSE * fewer * part.hidden_size**2 / dense)


def _measured(shape: MoEShape, plans: list[Plan], stored: str, tokens: int) -> list[tuple[float, float]] | None:
    """Seconds as `measure` has them, from an earlier start or measured now; None, and said, if that fails."""
    about = certificate.subject(plans[0], shape) | {
        "plans": [certificate.what_runs(p) | {"torch_packing": p.torch_packing} for p in plans],
        "stored": stored,
        "tokens": tokens,
    }
    kept = read(about, "speed")
    if kept is not None:
        return [(float(a), float(b)) for a, b in kept["seconds"]]
    told = (json.dumps(asdict(shape)), json.dumps(about["plans"]), stored, str(tokens))
    command = [sys.executable, "-m", "ktmoe.gate.measuring", *told]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
        seconds = [(float(a), float(b)) for a, b in json.loads(done.stdout.strip().splitlines()[-1])]
    except (subprocess.SubprocessError, ValueError, IndexError, TypeError) as error:
        tail = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1:]
        say_once(f"ktmoe: how fast the backends are here could not be measured ({''.join(tail)}).")
        return None
    write(about, "speed", seconds=seconds)
    return seconds
