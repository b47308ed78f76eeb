"""What takes each guard of docs/kernel.md away. Called in a process that is about to be thrown away."""

import contextlib
import dataclasses
import functools
import itertools

import torch

from ktmoe import autograd, experts, validation
from ktmoe.backends import TABLE
from ktmoe.backends.kt import extension, formats, kernel, lora, objects, packed
from ktmoe.backends.kt import sizes as kernel_sizes
from ktmoe.backends.kt.extension import Host
from ktmoe.backends.kt.kernel import KernelBackend
from ktmoe.gate import contract
from ktmoe.split.backend import _Part
from ktmoe.types import Inputs
from ktmoe.verify.probes import layers


def wrap(owner, name):
    """Replaces `owner.name` by a function that is given the original first."""

    def decorator(function):
        setattr(owner, name, functools.partialmethod(function, getattr(owner, name)))
        return function

    return decorator


def nothing(*args, **kwargs):
    pass


def chunks():
    @wrap(KernelBackend, "_create")
    def create(self, real, *args):
        made = real(self, *args)
        self.max_len = 10**9  # the kernel was built for less
        return made


def sizes():
    kernel_sizes.check_shape = nothing


def casts():
    autograd.make_inputs = lambda x, index, w, lora, shape, dtype: Inputs(
        x.to(dtype).contiguous(), index.contiguous(), w.contiguous(), lora
    )


def top_k():
    experts.check_call = nothing


def huge_ids():
    def make(x, index, w, lora, shape, dtype):
        inputs = validation.make_inputs(x, index, w, lora, shape, dtype)
        return Inputs(inputs.hidden_states, index.contiguous(), inputs.top_k_weights, lora)

    contract.make_inputs = make


def rows():
    autograd.check_unchanged = nothing


def tickets():
    @wrap(KernelBackend, "_backward")
    def backward(self, real, ticket, *args):
        self._cached = ticket
        return real(self, ticket, *args)


def setting(name, value):
    objects._SETTINGS[name] = value


def layer_ids():
    objects._LAYER_IDS = itertools.repeat(1)


def refresh():
    @wrap(KernelBackend, "_refresh")
    def once(self, real, inputs):
        if not hasattr(self, "refreshed"):
            self.refreshed = True
            real(self, inputs)


def masters():
    experts.stay_fp32_on_cpu = lambda fn: fn


class Proxy:
    """A kernel object, between which and the backend something is changed."""

    def __init__(self, moe, backward):
        self.moe, self.backward = moe, backward

    def __getattr__(self, name):
        return getattr(self.moe, name)

    def backward_task(self, *args):
        return self.moe.backward_task(*self.backward(*args))


def null_gradients():
    @wrap(KernelBackend, "_create")
    def create(self, real, *args):
        made = real(self, *args)
        made.moe = Proxy(made.moe, lambda grad, grad_x, *rest: (grad, grad_x, *[0] * 6, *rest[6:]))
        return made


def sound_rows():
    kernel._sound_rows = lambda inputs, grad_output, grads: torch.ones(len(grad_output), dtype=torch.bool)


def most_parts():
    kernel_sizes._MAX_TP = 8


def fitting_parts():
    kernel_sizes.valid_tp = layers.valid_tp = lambda kind, shape, wanted: wanted


def remapped_ids():
    real = _Part.__init__

    def unmapped(self, *args):
        real(self, *args)
        self._own_ids.clamp_(min=0)  # an expert that is elsewhere is the first one here

    _Part.__init__ = unmapped


def hashes():
    packed.check_hash = nothing


def expert_map():
    kernel.permutation = torch.tensor([1, 0, 2, 3])
    setting("physical_to_logical_map", kernel.permutation.data_ptr())


def reuse():
    class Finalize:
        def __init__(self, *args):
            pass

        def __call__(self):
            pass

    kernel.weakref.finalize = Finalize


def backward_buffer():
    KernelBackend._take_backward_buffer_over = nothing


def weight_pointers():
    @wrap(KernelBackend, "_create")
    def create(self, real, share_backward, pointers):
        return real(self, share_backward, dict.fromkeys(pointers, 0))


def lock():
    Host.lock = contextlib.nullcontext()


def evaluation_ends_tickets():
    @wrap(KernelBackend, "forward")
    def forward(self, real, inputs, *, save):
        kept = self._cached
        found = real(self, inputs, save=save)
        self._cached = self._cached if save else kept
        return found


def cleared_buffers():
    """Whatever lay in the buffers becomes the gradient of an expert without tokens."""
    lora.clear = lambda buffers: [t.fill_(7.0) for t in buffers]


def default_gradients():
    """Buffers cleared every time would do as well; so this is the mode alone, with buffers that a caller keeps."""
    setting("authoritative_optimizer_grads", False)
    real = lora.gradient_buffers
    lora.gradient_buffers = functools.cache(lambda shape: [t.zero_() for t in real(shape)])
    lora.clear = nothing


def task_arguments():
    extension._TASKS_LEAK = False


def format_without(**changes):
    """A requirement of a format forgotten, everywhere that it is looked up."""
    for name, one in formats.FORMATS.items():
        formats.FORMATS[name] = dataclasses.replace(one, **changes)
        TABLE[name] = dataclasses.replace(TABLE[name], own_backward=formats.FORMATS[name].own_backward)


def scales_of_reloads():
    real = kernel.KernelBackend._copy_scales

    def once(self, made):
        if not self.reloaded:
            real(self, made)

    KernelBackend._copy_scales = once


GUARDS = {
    1: chunks,
    2: sizes,
    3: casts,
    4: top_k,
    5: huge_ids,
    6: rows,
    7: rows,
    8: tickets,
    9: functools.partial(setting, "share_cache_pool", True),
    10: layer_ids,
    11: refresh,
    12: default_gradients,
    13: masters,
    14: null_gradients,
    15: sound_rows,
    16: sound_rows,
    17: most_parts,
    18: fitting_parts,
    19: remapped_ids,
    20: expert_map,
    21: functools.partial(setting, "lora_dropout", 0.5),
    22: reuse,
    23: backward_buffer,
    24: hashes,
    25: weight_pointers,
    26: lock,
    27: evaluation_ends_tickets,
    28: cleared_buffers,
    29: task_arguments,
    30: functools.partial(format_without, own_backward=True),
    31: functools.partial(format_without, rank=None),
    32: functools.partial(format_without, cache_depth=1),
    33: functools.partial(format_without, all_experts=1),
    34: scales_of_reloads,
}
