"""The modules that choose experts, and whether LoRA around one of them would be felt.

transformers 4 has linear layers there. transformers 5 has modules with a `weight` of their own, which peft adapts by
that parameter.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ktmoe.types import KTError


def linear_routers(modules: Mapping[str, nn.Module], experts: Mapping[str, int]) -> list[str]:
    """Names of the linear layers that choose experts: one output per expert, beside the routed experts.

    Args:
        modules: a model's own modules by name, without what adapters put around them.
        experts: experts per layer, by the name of the routed experts' module.
    """
    found = []
    for name, count in experts.items():
        block = name.rpartition(".")[0]
        for beside, module in modules.items():
            of_an_mlp = beside.startswith(f"{name}.") or beside.endswith("_proj")
            chooses = isinstance(module, nn.Linear) and module.out_features == count and not of_an_mlp
            if chooses and beside.startswith(f"{block}." if block else ""):
                found.append(beside)
    return found


def by_weight(name: str, module: nn.Module, experts: Iterable[str]) -> bool:
    """Whether a module is a router that peft has no layer for: with a matrix of its own, in a block with experts."""
    inside = any(name.startswith(f"{e.rpartition('.')[0]}.") for e in experts if "." in e)
    weight = module._parameters.get("weight")
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return inside and weight is not None and weight.dim() == 2 and not plain and not _quantised(module)


def check_felt(name: str, model: nn.Module) -> None:
    """Refuses LoRA around a router whose block does more with it than call it: that passes by what is around it.

    DeepSeek-V2's block multiplies by `self.gate.weight` itself, and trains nothing; DeepSeek-V3's reads
    `self.gate.e_score_correction_bias`, which peft's wrapper does not have.

    Raises:
        KTError: names the router and what is read.
    """
    parent, _, leaf = name.rpartition(".")
    block: Any = type(model.get_submodule(parent))
    try:
        source = inspect.getsource(block)
    except (OSError, TypeError):
        return
    read = re.search(rf"self\.{re.escape(leaf)}\.(?!weight\.(?:dtype|device|shape)\b)\w+", source)
    if read:
        raise KTError(
            f"target_modules: reaches the router {name}, and {block.__name__} reads {read.group()} past any LoRA that "
            f"peft puts around it: it would fail or train nothing. Leave {leaf!r} out; modules_to_save: [{leaf}] "
            "trains the router in full."
        )


def _quantised(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith(("torch.", "transformers."))
