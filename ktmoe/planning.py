"""Which backend runs a layer on this host, and how: decided before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

from ktmoe.backends import TABLE, Plan, Row, kt
from ktmoe.backends.kt import PackedLayer, PackedModel
from ktmoe.config import KTConfig
from ktmoe.cores import in_words, numa_nodes, usable_cores
from ktmoe.types import ExpertWeights, KTError, MoEShape
from ktmoe.validation import check_shape


_IN_WORDS = {
    "": "not stored so",
    "fp8": "FP8 with a scale for each block of 128 x 128 (DeepSeek-V3's)",
    "int4": "INT4 with a scale for each group of 32 (Kimi K2's)",
}

MAX_LEN = 4096  # tokens of a call of the kernel


def plan(config: KTConfig, shape: MoEShape, stored: str | None = None) -> Plan:
    """Decides what runs.

    `auto` takes the first backend of the table that can serve the shape on this host, with weights that are stored so.
    A named one that this host cannot run gives way to the torch backend; one that cannot take the shape or the weights
    is refused.

    Args:
        config: what the user wants.
        shape: what to build for.
        stored: the format of the weights, as `ExpertWeights.stored`; None while nobody has looked at the files.

    Raises:
        KTError: a shape, rank or format that the named backend cannot take, or packed weights of another shape or
            making.
    """
    check_shape(shape)
    chosen, reasons = _choose(config, shape, stored)
    row = TABLE[chosen]
    nodes = _nodes(config, row, shape)
    tp = len(nodes) or 1
    if config.kt_weight_path and row.takes_packed:
        PackedModel(config.kt_weight_path).check(shape, tp, kt.version())
    own = usable_cores(nodes=nodes)
    threads = config.kt_num_threads or (max(1, own - cores_to_leave(own)) if row.is_kernel else None)
    share = config.kt_share_backward != "off"
    return Plan(chosen, threads, tp, config.kt_max_len or MAX_LEN, share, config.kt_torch_packing, nodes, reasons)


def for_processes(config: KTConfig, number: int, shape: MoEShape, stored: str | None = None) -> KTConfig:
    """The configuration of a backend that computes the rows of several processes of this host in one call.

    Launchers set OMP_NUM_THREADS to 1, as each process were to compute for itself; the experts are computed by one.

    Args:
        config: what the user wants, for each process.
        number: of processes.
        shape: what to build for.
        stored: as `plan` takes it.
    """
    if number == 1:
        return config
    decided = replace(config, kt_max_len=number * (config.kt_max_len or MAX_LEN))
    if config.kt_num_threads or TABLE[plan(config, shape, stored).backend].is_kernel:
        return decided
    return replace(decided, kt_num_threads=usable_cores())


def _nodes(config: KTConfig, row: Row, shape: MoEShape) -> tuple[int, ...]:
    """Of the kernel's pools, one for each part that the experts are divided into."""
    if not row.is_kernel:
        return ()
    there, named = numa_nodes(), config.kt_numa_nodes
    if named and (lost := [n for n in named if n not in there]):
        raise KTError(
            f"kt_numa_nodes: got {in_words(named)}; this process has cores on {in_words(there)} (/sys and its "
            f"affinity mask say), and none on {in_words(lost)}. Name some of those, or leave it out."
        )
    if named and len(named) > 1 and not config.kt_tp_enabled:
        raise KTError(
            f"kt_numa_nodes: got {in_words(named)}; without kt_tp_enabled the experts are in the memory of one node. "
            "Write kt_tp_enabled: true too, or one node."
        )
    nodes = named or there
    tp = row.largest_tp(shape, len(nodes)) if config.kt_tp_enabled else 1
    if named and tp < len(named):
        raise KTError(
            f"kt_numa_nodes: got {in_words(named)}; experts with an intermediate size of {shape.intermediate_size} "
            f"divide into {tp} parts at most for {row.name}. Name {tp} of them."
        )
    return tuple(nodes[:tp])


def _choose(config: KTConfig, shape: MoEShape, stored: str | None) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A backend's name, and those that came before it with the reason against each."""
    wanted = config.kt_backend
    if wanted == "auto":
        against: list[tuple[str, str]] = []
        for name, row in TABLE.items():
            if row.stored not in ("", stored):
                continue
            why = row.why_not(shape) or _no_sharing(row, config) or _not_bound(row, config)
            if not why:
                return name, tuple(against)
            against.append((name, why))
        raise KTError(f"kt_backend: auto found none: {'; '.join(f'{name}: {why}' for name, why in against)}")
    if stored is not None and TABLE[wanted].stored not in ("", stored):
        raise KTError(
            f"kt_backend: {wanted} takes experts that the checkpoint holds in {_IN_WORDS[TABLE[wanted].stored]}; this "
            f"model's are {_IN_WORDS[stored]}. Write kt_backend: auto, or AMXInt8, which quantises any."
        )
    row = TABLE[wanted]
    if why := row.refuse_shape(shape) or _no_sharing(row, config) or _not_bound(row, config):
        raise KTError(why)
    if why := TABLE[wanted].refuse_host():
        unused = [key for key in ("kt_weight_path", "kt_numa_nodes") if getattr(config, key)]
        return "torch", ((wanted, why + "".join(f"; {key} is of no use here" for key in unused)),)
    return wanted, ()


def _no_sharing(row: Row, config: KTConfig) -> str:
    if config.kt_share_backward != "off" or row.own_backward:
        return ""
    return (
        f"kt_share_backward: got off; kt_backend: {row.name} has one backward buffer for all layers only. Write on, "
        "or leave it out."
    )


def _not_bound(row: Row, config: KTConfig) -> str:
    if not config.kt_numa_nodes or row.is_kernel:
        return ""
    return (
        f"kt_numa_nodes: got {in_words(config.kt_numa_nodes)}; it binds the kernel's threads, and kt_backend: "
        f"{row.name} computes with torch's. Start the process under numactl --cpunodebind instead, and leave it out."
    )


def cores_to_leave(own: int) -> int:
    """Cores that the kernel's default leaves: one for its queue, whose thread spins while the others compute, and more
    for the caller's own torch on large hosts.

    Args:
        own: the cores that there are.
    """
    return max(1, own // 16)


def find_packed(plan: Plan, weights: ExpertWeights, config: KTConfig) -> PackedLayer | None:
    """These weights in `kt_weight_path`, if it is given and the plan can load them from there.

    Raises:
        KTError: other weights were packed there.
    """
    if config.kt_weight_path is None or not TABLE[plan.backend].takes_packed:
        return None
    return PackedModel(config.kt_weight_path).find(weights)
