"""A device of its own on a machine that has none: tensors on the CPU that are said to be elsewhere.

As on a GPU, an operation on tensors of both is refused; only copies go from one to the other. Everything else of a
GPU, its kernels and its asynchrony, is not here.
"""

import torch
import torch.utils.backend_registration
from torch.utils._pytree import tree_flatten, tree_map


class _Module(torch.utils.backend_registration._DummyBackendModule):
    """What torch asks `torch.second` for."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def mem_get_info(self, device):
        return FREE, FREE


# For the process that imports this, and for good: its tests run in one of their own.
torch.utils.backend_registration._setup_privateuseone_for_python_backend("second", _Module())
FREE = 2**34  # bytes
DEVICE = torch.device("second", 0)
_BETWEEN = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class There(torch.Tensor):
    """A tensor on the second device."""

    @staticmethod
    def __new__(cls, inner):
        about = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **about)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    if there and func not in _BETWEEN and any(t.dim() and not isinstance(t, There) for t in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found two")
    to = kwargs.get("device")
    plain_kwargs = tree_map(_inner, kwargs) | ({"device": "cpu"} if to is not None else {})
    out = func(*tree_map(_inner, args), **plain_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    elsewhere = torch.device(to).type == DEVICE.type if to is not None else bool(there)
    written = {id(t.inner): t for t in there}  # of operations in place, and of out=

    def wrap(value):
        if not isinstance(value, torch.Tensor) or not elsewhere:
            return value
        return written[id(value)] if id(value) in written else There(value)

    return tree_map(wrap, out)


def _inner(value):
    return value.inner if isinstance(value, There) else value


# Tensors that are made there, or copied there.
_FACTORIES = torch.library.Library("aten", "IMPL")


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return There(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return There(torch.empty_strided(size, stride, dtype=dtype))


_FACTORIES.impl("empty.memory_format", _empty, "PrivateUse1")
_FACTORIES.impl("empty_strided", _empty_strided, "PrivateUse1")


def _copy_from(source, into, non_blocking=False):
    _inner(into).copy_(_inner(source))
    return into


_FACTORIES.impl("_copy_from", _copy_from, "PrivateUse1")
