"""Products with the frozen weights of one expert: straight from the weights, or from copies that oneDNN packed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ktmoe.backends.torch.buffers import BUFFERS
from ktmoe.stored import Stored
from ktmoe.types import ExpertWeights, Stack


_BLOCK = 16 * 2**20  # bytes of a matrix that are cast at once: few enough for a cache, many enough for a product


class Products(Protocol):
    """The four products of an expert. Each overwrites `out`, or with `add` adds to what is there."""

    def gate_up(self, e: int, x: Tensor, out: Tensor, add: bool) -> None:
        """Gate and up side by side: [n, H] -> [n, 2 I]."""

    def down(self, e: int, mid: Tensor, out: Tensor, add: bool) -> None:
        """[n, I] -> [n, H]."""

    def down_backward(self, e: int, grad: Tensor, out: Tensor, add: bool) -> None:
        """Gradient of what `down` takes: [n, H] -> [n, I]."""

    def gate_up_backward(self, e: int, grad: Tensor, out: Tensor, add: bool) -> None:
        """Gradient of what `gate_up` takes: [n, 2 I] -> [n, H]."""


class FromSource(Products):
    """Without a copy of the weights. Matrices of another dtype are cast block by block into one kept workspace."""

    def __init__(self, weights: ExpertWeights) -> None:
        """Holds the weights as they are."""
        self.weights = weights

    def gate_up(self, e: int, x: Tensor, out: Tensor, add: bool) -> None:
        """See `Products.gate_up`."""
        gate, up = out.chunk(2, 1)
        _multiply(x, self.weights.gate_proj, e, gate, add)
        _multiply(x, self.weights.up_proj, e, up, add)

    def down(self, e: int, mid: Tensor, out: Tensor, add: bool) -> None:
        """See `Products.down`."""
        _multiply(mid, self.weights.down_proj, e, out, add)

    def down_backward(self, e: int, grad: Tensor, out: Tensor, add: bool) -> None:
        """See `Products.down_backward`."""
        _multiply_transposed(grad, self.weights.down_proj, e, out, add)

    def gate_up_backward(self, e: int, grad: Tensor, out: Tensor, add: bool) -> None:
        """See `Products.gate_up_backward`."""
        grad_gate, grad_up = grad.chunk(2, 1)
        _multiply_transposed(grad_gate, self.weights.gate_proj, e, out, add)
        _multiply_transposed(grad_up, self.weights.up_proj, e, out, add=True)


class Packed(Products):
    """bf16 copies in the layout that oneDNN multiplies fastest with: 1.0 x the weights, or 2.0 x with `backward`.

    These are the calls of torch's own compiler. A matrix for the backward is packed from its transpose.
    """

    def __init__(self, weights: ExpertWeights, rows: int, backward: bool) -> None:
        """Packs.

        Args:
            weights: any dtype; read once, and again by every backward unless `backward`.
            rows: of a usual product, for oneDNN to choose the layout by.
            backward: whether the input gradient gets packed matrices too.
        """
        self._gate_up, self._down = [], []
        self._gate_up_backward: list[Tensor] = []
        self._down_backward: list[Tensor] = []
        self._source = FromSource(weights)
        h, i = weights.hidden_size, weights.intermediate_size
        # One piece of memory for what is packed, written again and again: a temporary for each matrix left a hole of
        # its size beside every copy, which malloc did not use again for aligned memory (2.5 x the weights in all).
        straight, turned = torch.empty(2, 2 * i * h, dtype=torch.bfloat16)
        for e in range(weights.num_experts):
            gate, up, down = weights.expert(e)
            matrix = straight.view(2 * i, h)
            matrix[:i], matrix[i:] = gate, up
            self._gate_up.append(_pack(matrix, rows))
            if backward:
                self._gate_up_backward.append(_pack(turned.view(h, 2 * i).copy_(matrix.T), rows))
            matrix = straight[: h * i].view(h, i).copy_(down)
            self._down.append(_pack(matrix, rows))
            if backward:
                self._down_backward.append(_pack(turned[: h * i].view(i, h).copy_(matrix.T), rows))

    def gate_up(self, e: int, x: Tensor, out: Tensor, add: bool) -> None:
        """See `Products.gate_up`."""
        _multiply_packed(x, self._gate_up[e], out, add)

    def down(self, e: int, mid: Tensor, out: Tensor, add: bool) -> None:
        """See `Products.down`."""
        _multiply_packed(mid, self._down[e], out, add)

    def down_backward(self, e: int, grad: Tensor, out: Tensor, add: bool) -> None:
        """See `Products.down_backward`."""
        if self._down_backward:
            _multiply_packed(grad, self._down_backward[e], out, add)
        else:
            self._source.down_backward(e, grad, out, add)

    def gate_up_backward(self, e: int, grad: Tensor, out: Tensor, add: bool) -> None:
        """See `Products.gate_up_backward`."""
        if self._gate_up_backward:
            _multiply_packed(grad, self._gate_up_backward[e], out, add)
        else:
            self._source.gate_up_backward(e, grad, out, add)


def _pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _multiply_packed(x: Tensor, packed: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= x @ weight.T, rounded once: oneDNN adds before it rounds."""
    if add:
        out.copy_(torch.ops.mkldnn._linear_pointwise.binary(x, out, packed, None, "add"))
    else:
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))


def _multiply(x: Tensor, stack: Stack, e: int, out: Tensor, add: bool) -> None:
    """out (+)= x @ stack[e].T: [n, in] x [out, in] -> [n, out]."""
    for rows, block in _blocks(stack, e, x):
        part = out[:, rows]
        torch.addmm(part, x, block.T, beta=int(add), out=part)


def _multiply_transposed(grad: Tensor, stack: Stack, e: int, out: Tensor, add: bool) -> None:
    """out (+)= grad @ stack[e]: [n, out] x [out, in] -> [n, in]."""
    for rows, block in _blocks(stack, e, grad):
        torch.addmm(out, grad[:, rows], block, beta=int(add or rows.start > 0), out=out)


def _blocks(stack: Stack, e: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A matrix [out, in] in the dtype of `like`: whole as it is, or block of rows by block."""
    if isinstance(stack, Stored):
        size, width = stack.shape[1:]
        write = functools.partial(stack.write, e)
    else:
        weight = stack[e]
        if weight.dtype == like.dtype:
            yield slice(0, len(weight)), weight
            return
        size, width = weight.shape
        write = functools.partial(_cast, weight)
    most = max(16, _BLOCK // (width * like.dtype.itemsize))
    for start in range(0, size, most):
        rows = slice(start, min(start + most, size))
        block = BUFFERS.workspace("weight", (rows.stop - rows.start, width), like)
        write(start, block)
        yield rows, block


def _cast(weight: Tensor, start: int, into: Tensor) -> None:
    into.copy_(weight[start : start + len(into)])
