"""A model whose routed experts ktmoe runs: which layers they are, and what it refuses because it would lose them."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ktmoe.adapters import LoraExperts, refuse_expert_adapter
from ktmoe.experts import MoEExperts
from ktmoe.models.families import expert_modules
from ktmoe.types import KTError


_SAVING = ("save_pretrained", "push_to_hub")
_LOADING = "load_adapter"


def moe_layers(model: nn.Module) -> dict[str, MoEExperts]:
    """The layers that ktmoe runs, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoEExperts)}


def unwrapped_layers(model: nn.Module) -> list[str]:
    """Names of routed experts that are not ktmoe's."""
    ours = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, (MoEExperts, LoraExperts)))
    return [
        name
        for name, holders in expert_modules(model).items()
        if not isinstance(model.get_submodule(holders[0]), (MoEExperts, LoraExperts))
        and not name.startswith(ours or ("\0",))
    ]


def refuse_saving(model: nn.Module) -> None:
    """Has the model refuse what would leave its routed experts out: to write itself, or to load an adapter of theirs.

    Every model inside that has routed experts does the same.
    """
    for module in model.modules():
        if not moe_layers(module):
            continue
        for method in _SAVING:
            if hasattr(module, method):
                setattr(module, method, functools.partial(_refuse_save, f"{type(module).__name__}.{method}"))
        if load := getattr(type(module), _LOADING, None):
            setattr(module, _LOADING, functools.partial(refuse_expert_adapter, module, load))


def allow_saving(model: nn.Module) -> None:
    for module in model.modules():
        for method in (*_SAVING, _LOADING):
            vars(module).pop(method, None)


def _refuse_save(name: str, *args: Any, **kwargs: Any) -> None:
    raise KTError(
        f"{name}: this model's routed experts are not among its parameters, so a checkpoint without experts would be "
        "written. Save the adapter (PeftModel.save_pretrained); `ktmoe merge` writes a checkpoint with it merged in. "
        "A model that was in memory when it was attached saves after ktmoe.detach."
    )
