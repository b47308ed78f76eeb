"""What the kernel's classes for FP8 and INT4 ask for, beyond what those for BF16 and INT8 do."""

from __future__ import annotations

from dataclasses import replace

from ktmoe.backends import TABLE
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.gate import contract
from ktmoe.verify.probes.trap import SHAPE, drawn, forward, load, refused, trap, wrong


@trap(30, "FP8, a layer's own backward weights: no object is made")
def _own_backward_weights(name: str) -> list[str]:
    case = drawn(name)
    config = KTConfig(kt_backend=name, kt_share_backward="off", kt_max_len=96)
    if TABLE[name].own_backward:
        return wrong(load(name, case, share_backward=False), case)
    return refused(
        "kt_share_backward: off", "kt_share_backward", lambda: MoEExperts(case.weights, top_k=2, r=4, config=config)
    )


@trap(31, "INT4, another rank than 8: no object is made")
def _any_rank(name: str) -> list[str]:
    case = drawn(name, replace(SHAPE, rank=3))
    return wrong(load(name, case), case)


@trap(32, "INT4, two saving forwards before a backward: abort")
def _abandoned_forwards(name: str) -> list[str]:
    case = drawn(name)
    backend = load(name, case)
    for _ in range(3):
        forward(backend, case)
    return wrong(backend, case)


@trap(33, "INT4, experts times H or I no multiple of 512: segfault")
def _number_of_experts(name: str) -> list[str]:
    shape = replace(SHAPE, num_experts=6, hidden_size=128, intermediate_size=128)
    case = contract.draw_case(shape, 24, 0, TABLE[name].stored)
    if not TABLE[name].refuse_shape(shape):
        return wrong(load(name, case), case)
    config = KTConfig(kt_backend=name, kt_max_len=96)
    return refused("six experts", "num_experts", lambda: MoEExperts(case.weights, top_k=2, r=4, config=config))


@trap(34, "FP8 and INT4, other weights in the same object: the scales of the old ones")
def _scales_of_a_reload(name: str) -> list[str]:
    found = []
    for seed in (3, 4):
        case = drawn(name, replace(SHAPE, rank=6), seed=seed)
        backend = load(name, case)
        found += wrong(backend, case)
        backend.close()
    return found
