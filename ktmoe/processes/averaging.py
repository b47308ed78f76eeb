"""LoRA of the routed experts under DistributedDataParallel: averaged over the processes when DDP averages the rest."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Averaging:
    """Of one layer's LoRA.

    DDP cannot do it: its parameters must be on one kind of device, and these stay on the CPU. Each gradient is
    averaged in the backward in which it came, as DDP does it; what came within `no_sync` before is in it.
    """

    def __init__(self, everyone: dist.ProcessGroup) -> None:
        """Nothing is averaged yet.

        Args:
            everyone: all processes, by gloo.
        """
        self._everyone = everyone
        self._wrapper: Any = lambda: None  # the DDP module of the last forward, if it went through one
        self._known: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def follow(self, parameters: Iterable[Tensor]) -> bool:
        """To be called in every forward that may be trained on, on every process.

        When a DDP module first comes along, the first process's numbers are given to all, as it does for its own.

        Returns:
            Whether the gradients of this forward will be averaged, by whom ever.
        """
        wrapper: Any = DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None:
            self._wrapper = weakref.ref(wrapper)
            for parameter in parameters:
                if parameter.requires_grad and self._known.get(id(parameter)) is not parameter:
                    self._add(parameter, wrapper)
        elif torch._C._current_graph_task_id() == -1:  # else it is the recompute of a forward that went through one
            self._wrapper = lambda: None
        return self._wrapper() is not None

    def _add(self, parameter: Tensor, wrapper: Any) -> None:
        self._known[id(parameter)] = parameter
        if any(p is parameter for p in wrapper._module_parameters):
            return  # DDP does it: nothing else trains, or the model was put into another before it was wrapped
        dist.broadcast(parameter.data, src=0, group=self._everyone)
        parameter.register_post_accumulate_grad_hook(self._average)

    def _average(self, parameter: Tensor) -> None:
        wrapper = self._wrapper()
        if wrapper is None or not wrapper.require_backward_grad_sync or parameter.grad is None:
            return
        gradient = parameter.grad
        work: Any = dist.all_reduce(gradient, group=self._everyone, async_op=True)

        def finish() -> None:
            work.wait()
            gradient.div_(dist.get_world_size(self._everyone))

        torch.autograd.Variable._execution_engine.queue_callback(finish)  # when this backward is at its end
