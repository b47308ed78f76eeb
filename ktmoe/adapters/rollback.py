"""All or nothing: whatever is refused, fails or is interrupted leaves a model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PretrainedConfig

from ktmoe.experts import MoEExperts


# What a layer of experts computes with. A backend that was loaded meanwhile may stay: it changes no result.
_LOADED = ("_backend", "plan", "weights")


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Whatever is raised within leaves modules, adapters, flags and configurations of a model as they were.

    Tensors are not copied: those whose numbers are about to be overwritten are named first, by appending them to the
    list that this yields.

    Args:
        model: with adapters or without.

    Yields:
        A list; tensors appended to it get their numbers of that moment back.
    """
    before = [_Module(m) for m in model.modules()]
    parameters = [(p, p.requires_grad, p.data) for p in model.parameters()]
    kept = _Kept()
    try:
        yield kept
    except BaseException:
        for module in before:
            module.restore()
        with torch.no_grad():
            for parameter, requires_grad, data in parameters:
                parameter.data = data
                parameter.requires_grad_(requires_grad)
            for tensor, numbers in kept.numbers:
                tensor.copy_(numbers)
        raise


class _Kept(list[Tensor]):
    """Tensors, and their numbers when they were appended."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[tuple[Tensor, Tensor]] = []

    def append(self, tensor: Tensor) -> None:
        super().append(tensor)
        self.numbers.append((tensor, tensor.detach().clone()))


class _Module:
    """What one module consists of: its attributes, and the entries of those that are containers."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.attributes = _attributes(module)
        self.containers = [(v, v.copy()) for v in self.attributes.values() if isinstance(v, (dict, list, set))]
        configs = [v for v in self.attributes.values() if isinstance(v, PretrainedConfig)]
        configs += [v for v in (self.attributes.get("peft_config") or {}).values() if isinstance(v, PeftConfig)]
        self.configs = [(c, dict(vars(c))) for c in configs]

    def restore(self) -> None:
        loaded = {k: v for k, v in vars(self.module).items() if k not in _attributes(self.module)}
        self.module.__class__ = self.cls
        vars(self.module).clear()
        vars(self.module).update(self.attributes | loaded)
        for container, entries in self.containers:
            container.clear()
            container.extend(entries) if isinstance(container, list) else container.update(entries)
        for config, attributes in self.configs:
            vars(config).clear()
            vars(config).update(attributes)


def _attributes(module: nn.Module) -> dict[str, Any]:
    left = _LOADED if isinstance(module, MoEExperts) else ()
    return {k: v for k, v in vars(module).items() if k not in left}
