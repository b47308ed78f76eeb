"""How close the torch backend comes to the GEMM roofline of this host, forward and backward, with and without LoRA.

    python bench/roofline.py v2-lite qwen3 --mode both

Every repetition draws another routing and another number of tokens, as training does, and rests before it is timed.
The roofline is what must be multiplied at least, without padding and LoRA: three products of 2 x rows x H x I
operations forward and three backward, since the weights are frozen; at the rate of a large GEMM measured in the same
run. Run it on an idle machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ktmoe.backends.torch import choice
from ktmoe.backends.torch.backend import TorchBackend
from ktmoe.backends.torch.products import Packed
from ktmoe.gate import contract
from ktmoe.shapes import SHAPES
from ktmoe.types import Inputs, MoEShape


ROWS = {  # a layer, and tokens
    "smollm2": (SHAPES["SmolLM2-135M, upcycled"], 512),
    "small": (MoEShape(num_experts=64, hidden_size=1024, intermediate_size=768, top_k=6, rank=8), 512),
    "v2-lite": (SHAPES["DeepSeek-V2-Lite"], 1024),
    "v2-lite/4": (replace(SHAPES["DeepSeek-V2-Lite"], num_experts=16), 256),  # where memory or time is short
    "qwen3": (SHAPES["Qwen3-30B-A3B"], 1024),
    "mixtral": (SHAPES["Mixtral-8x7B"], 512),
    "mixtral/2": (replace(SHAPES["Mixtral-8x7B"], num_experts=4), 256),
}
REST = 0.12  # seconds


def gemm_rate(dtype: torch.dtype) -> float:
    """Operations per second of a large product, or of a small one where that already takes long."""
    for size in (256, 2048):
        a = torch.randn(size, size).to(dtype)
        seconds = statistics.median(timed(lambda a=a: a @ a) for _ in range(7))
        if seconds > 0.02:
            break
    return 2 * size**3 / seconds


def timed(run: Callable[[], object]) -> float:
    """Seconds, after a rest."""
    time.sleep(REST)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def step(backend: TorchBackend, inputs: Inputs, grad: Tensor) -> tuple[float, float]:
    """Seconds of a forward and of the backward."""
    time.sleep(REST)
    start = time.perf_counter()
    _, ticket = backend.forward(inputs, save=True)
    middle = time.perf_counter()
    backend.backward(ticket, inputs, grad)
    return middle - start, time.perf_counter() - middle


def build(mode: str, weights, shape: MoEShape) -> TorchBackend:
    """The backend as it would be built here, or made to compute in one way."""
    if mode == "auto":
        return choice.build(weights, shape)
    if mode in ("both", "forward"):
        return TorchBackend(weights, shape, products=Packed(weights, 64, mode == "both"))
    return TorchBackend(weights, shape, {"bf16": torch.bfloat16, "fp32": torch.float32}[mode])


def measure(name: str, mode: str, repetitions: int) -> None:
    """Prints a line."""
    shape, usual = ROWS[name]
    case = contract.draw_case(shape, 1, seed=0)
    backend = build(mode, case.weights, shape)
    generator = torch.Generator().manual_seed(0)
    dtype = backend.compute_dtype
    bf16, own = gemm_rate(torch.bfloat16), gemm_rate(dtype)
    found = []
    for _ in range(repetitions + 1):
        tokens = usual - int(torch.randint(usual // 8, (), generator=generator))
        index = torch.rand(tokens, shape.num_experts, generator=generator).topk(shape.top_k).indices
        routing = torch.rand(tokens, shape.top_k, generator=generator)
        x, grad = (torch.randn(tokens, shape.hidden_size, generator=generator).to(dtype) for _ in "xg")
        plain = step(backend, Inputs(x, index, routing, None), grad)
        forward, backward = step(backend, Inputs(x, index, routing, case.lora), grad)
        least = 12 * tokens * shape.top_k * shape.hidden_size * shape.intermediate_size / bf16
        total = forward + backward
        found.append((forward, total, least / total, backward / forward, forward / plain[0], total / sum(plain)))
    forward, total, part, ratio, lora, lora_both = map(statistics.median, zip(*found[1:], strict=True))
    print(
        f"{name:10} {mode:8} {str(dtype)[6:]:8} gemm {bf16 / 1e9:4.0f} ({own / 1e9:.0f})  "
        f"forward {1e3 * forward:7.1f}  "
        f"both {1e3 * total:7.1f} ms  roofline {part:.2f} ({part * bf16 / own:.2f} of own dtype)  "
        f"backward/forward {ratio:.2f}  LoRA {lora - 1:+.1%} of forward, {lora_both - 1:+.1%} of both",
        flush=True,
    )
    backend.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["smollm2", "small"], help=", ".join(ROWS))
    parser.add_argument(
        "--mode", default="auto", help="auto, or: both, forward (packed), bf16, fp32 (from the source)"
    )
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    for name in arguments.shapes:
        for mode in arguments.mode.split(","):
            measure(name, mode, arguments.repetitions)
