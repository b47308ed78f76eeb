"""How a layer is made: its parts, settings and weights, and what is left when it goes."""

from __future__ import annotations

import functools
import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from ktmoe.backends.kt import valid_tp
from ktmoe.config import KTConfig
from ktmoe.convert import pack
from ktmoe.experts import MoEExperts
from ktmoe.gate import contract
from ktmoe.split import split
from ktmoe.stored import Stored
from ktmoe.types import PROJECTIONS, ExpertWeights
from ktmoe.validation import make_inputs
from ktmoe.verify import usage
from ktmoe.verify.probes.trap import SHAPE, drawn, far, forward, load, refused, trap, wrong


@trap(17, "five or more parts of tensor parallelism: gradients 46 to 80 % wrong")
def _many_parts(name: str) -> list[str]:
    case = drawn(name, replace(SHAPE, intermediate_size=1280))
    tp = valid_tp(name, case.shape, 5)
    return wrong(load(name, case, tp=tp, threads=tp), case)


@trap(18, "parts of tensor parallelism that are no multiple of 32, 64 or 128: segfault")
def _odd_parts(name: str) -> list[str]:
    case = drawn(name, replace(SHAPE, intermediate_size=192))
    tp = valid_tp(name, case.shape, 4)
    return wrong(load(name, case, tp=tp, threads=tp), case)


@trap(19, "experts on the GPU: ignored")
def _experts_elsewhere(name: str) -> list[str]:
    case = drawn(name, replace(SHAPE, num_experts=8))
    here = replace(case, shape=replace(case.shape, num_experts=4), weights=case.weights.some(range(4, 8)))
    whole = split(load(name, here), case.weights, range(4), case.shape, torch.device("cpu"))
    return far(whole, case)


@trap(20, "an expert map: LoRA of other experts")
def _every_expert_in_its_place(name: str) -> list[str]:
    case = drawn(name)
    return wrong(load(name, case), case)


@trap(21, "LoRA dropout: another mask in every forward, also in evaluation")
def _dropout(name: str) -> list[str]:
    case = drawn(name)
    return wrong(load(name, case), case)


@trap(22, "destroyed objects: their packed weights leak")
def _loads_and_closes(name: str) -> list[str]:
    case = drawn(name, replace(SHAPE, hidden_size=512, intermediate_size=512))  # 6 MiB
    process, held = psutil.Process(), []
    for i in range(9):
        backend = load(name, case)
        forward(backend, case)()
        if i % 2:
            backend.close()
        del backend
        gc.collect()
        held.append(usage.measure(process)[2] / 2**20)
    grown = held[-1] - held[2]
    return [] if grown < 6 else [f"six loads after the third grew the process by {grown:.0f} MiB"]


@trap(23, "other weights in the same object: the old ones in the backward")
def _reload(name: str) -> list[str]:
    found = []
    for seed in (0, 1, 2):
        case = drawn(name, replace(SHAPE, rank=7), seed=seed)
        backend = load(name, case)
        found += wrong(backend, case)
        backend.close()
    return found


@trap(24, "a corrupted file of packed weights: loads silently")
def _packed_weights(name: str) -> list[str]:
    case = drawn("AMXInt8")
    with tempfile.TemporaryDirectory() as directory:
        (layer,) = pack({"layers.0.experts": case.weights}, Path(directory), "drawn", threads=2)
        found = []
        if name != "AMXInt8":
            path_given = functools.partial(KTConfig, kt_backend=name, kt_weight_path=directory)
            found += refused("packed INT8 weights", "kt_weight_path", path_given)
        for kind in ("quant", "scale"):
            file = next(f for f in layer.files() if f.expert == 2 and f.kind == kind)
            path = layer.folder / file.name
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            found += refused(f"one bit of {path.name}", path.name, lambda: load("AMXInt8", case, packed=layer))
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        load("AMXInt8", case, packed=layer)
        return found


@trap(25, "weights that are not there: segfault")
def _no_weights(name: str) -> list[str]:
    held = drawn(name).weights
    meta = ExpertWeights(*(_nowhere(getattr(held, p)) for p in PROJECTIONS))
    config = KTConfig(kt_backend=name, kt_max_len=96)
    found = refused("weights on the meta device", "meta", lambda: MoEExperts(meta, top_k=2, r=4, config=config))
    return found + wrong(load(name, drawn(name)), drawn(name))


def _nowhere(stack: Any) -> Any:
    if isinstance(stack, Stored):
        return type(stack)([m.to("meta") for m in stack.matrices], stack.scales)
    return stack.to("meta")


@trap(29, "every task: 100 bytes that are never freed")
def _many_tasks(name: str) -> list[str]:
    case = contract.first_rows(drawn(name), 1)
    backend, process, held = load(name, case), psutil.Process(), []
    inputs = make_inputs(
        case.hidden_states, case.top_k_index, case.top_k_weights, case.lora, case.shape, torch.bfloat16
    )
    for _ in range(3):
        for _ in range(2500):
            backend.forward(inputs, save=False)  # two tasks
        held.append(usage.measure(process)[2])
    grown = (held[-1] - held[0]) / 10_000
    return [] if grown < 20 else [f"memory grew by {grown:.0f} bytes a task"]
