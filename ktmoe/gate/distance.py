"""How far an 8-bit format is from the exact formula, in a sentence. The format's own distance, no kernel's error."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ktmoe.backends import TABLE
from ktmoe.interface import Backend


def sentence(layers: Mapping[str, Backend]) -> str:
    """What the load probes of a model found; "" where no layer computes in 8 bits, or nobody looked.

    Args:
        layers: its loaded layers by name.
    """
    found = {name: backend for name, backend in layers.items() if backend.distance}
    if not found:
        return ""
    kind = next(iter(found.values())).name
    limits = TABLE[kind].aimed_at
    means, worst, above = [], (0.0, ""), 0
    for name, backend in found.items():
        output = backend.distance[0]
        means.append(output.mean().item())
        e = int(output.argmax())
        worst = max(worst, (output[e].item(), f"{name}, expert {e}"))
        far = output > limits.forward
        for gradient in backend.distance[1:]:
            far |= gradient > limits.backward
        above += int(far.sum())
    experts = sum(len(backend.distance[0]) for backend in found.values())
    text = (
        f"{kind} is {100 * torch.tensor(means).mean():.1f} % from bf16 on these weights (mean of {experts} experts in "
        f"{len(found)} layers, one drawn token each; at most {100 * worst[0]:.1f} %: {worst[1]}). That is the "
        f"format's own distance, the kernel does what 8 bits mean; aimed at: {100 * limits.forward:.0f} % forward, "
        f"{100 * limits.backward:.0f} % backward."
    )
    if above:
        text += f" {above} experts are above that. `ktmoe verify MODEL` measures each with more tokens."
    return text
