"""The algorithm: expert by expert over rows sorted by expert, with a backward written by hand.

For one expert with rows x [n, H], routing weights w [n, 1] and output gradients g [n, H] (before weighting):

    gate, up = x G^T, x U^T          mid = silu(gate) * up           y = mid D^T           out = sum of w y
    d = g D                          grad of w = row sums of mid * d  (no y is kept or computed again for it)
    d_up = silu(gate) * d            d_gate = silu'(gate) * up * d    grad of x = w (d_gate G + d_up U)

where every projection includes its LoRA. w multiplies what is small or summed anyway: the sums over experts, in both
directions, and the LoRA's low-rank rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ktmoe.backends.torch.buffers import BUFFERS, Space, nbytes
from ktmoe.backends.torch.lora import ExpertLora, LoraGradients
from ktmoe.backends.torch.products import FromSource, Products
from ktmoe.backends.torch.rows import Part, Rows
from ktmoe.interface import STATELESS, Backend
from ktmoe.types import ExpertWeights, Gradients, Inputs, KTError, MoEShape


_CHUNK = 256 * 2**20  # bytes of all rows' outputs that one pass may need; longer calls run in chunks of tokens
_TICKETS = itertools.count(STATELESS + 1)


@dataclass(eq=False)
class _Chunk:
    """What is kept of some tokens, from their forward to their backward."""

    rows: Rows
    space: Space
    gate_up: Tensor  # [R, 2 I]
    low: list[
        tuple[Tensor, Tensor]
    ]  # by part: low-rank rows of gate and up [n, 2 r], of down [n, r]; without LoRA none


class TorchBackend(Backend):
    """One layer's experts. Keeps the gate and up of its last saving forward, as far as memory allows."""

    name = "torch"
    bets = True

    def __init__(
        self,
        weights: ExpertWeights,
        shape: MoEShape,
        compute_dtype: torch.dtype = torch.bfloat16,
        products: Products | None = None,
    ) -> None:
        """Costs nothing by itself: no copy of the weights is made.

        Args:
            weights: stay the caller's.
            shape: what it is built for.
            compute_dtype: of rows and products. Routing weights, sums over slots and LoRA gradients are fp32.
            products: with copies of the weights; by default straight from `weights`, cast block by block where they
                have another dtype.
        """
        self.weights, self.shape, self.compute_dtype = weights, shape, compute_dtype
        self._products: Products | None = products or FromSource(weights)
        self._device = device_of(weights)
        # bf16 products on the CPU are oneDNN's, which compiles one for every number of rows.
        self._pad = compute_dtype == torch.bfloat16 and self._device.type == "cpu"
        self._ticket = STATELESS
        self._kept: list[_Chunk] = []
        BUFFERS.join(self)

    @torch.no_grad()
    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        with BUFFERS.lock:
            if save:
                self._forget()
            out = torch.empty_like(inputs.hidden_states)  # [T, H]
            room = save
            for tokens, chunk in self._chunks(inputs):
                rows = self._rows(chunk)
                keep = self._keep(rows, chunk) if room else None
                room = keep is not None
                out[tokens] = self._forward(rows, chunk, keep)
            if not room:  # all chunks are kept or none
                if save:
                    self._forget()
                return out, STATELESS
            self._ticket = next(_TICKETS)
            return out, self._ticket

    @torch.no_grad()
    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`."""
        with BUFFERS.lock:
            grad_x = torch.empty_like(inputs.hidden_states)  # [T, H]
            grad_w = torch.empty_like(inputs.top_k_weights)  # [T, K]
            lora = LoraGradients(inputs.lora, self._device) if inputs.lora else None
            kept: Sequence[_Chunk | None] = self._kept if ticket == self._ticket != STATELESS else []
            for (tokens, chunk), keep in itertools.zip_longest(self._chunks(inputs), kept):
                grad = grad_output[tokens].to(self._device)
                rows = keep.rows if keep else self._rows(chunk)
                grad_x[tokens], grad_w[tokens] = self._backward(rows, chunk, grad, keep, lora)
            if kept:
                self._forget()
            return Gradients(grad_x, grad_w, [t.cpu() for t in lora.tensors] if lora else None)

    def holds(self, ticket: int) -> bool:
        """See `Backend.holds`."""
        return ticket in (STATELESS, self._ticket)

    def close(self) -> None:
        """Releases packed weights, kept activations and, with the last backend, the workspaces."""
        with BUFFERS.lock:
            self._forget()
            self._products = None
            BUFFERS.leave(self)

    @property
    def _step(self) -> int:
        """Tokens of one chunk."""
        row = self.shape.top_k * self.shape.hidden_size * self.compute_dtype.itemsize
        return max(64, _CHUNK // row)

    def _chunks(self, inputs: Inputs) -> Iterator[tuple[slice, Inputs]]:
        for start in range(0, len(inputs.hidden_states), self._step):
            tokens = slice(start, start + self._step)
            some = inputs.rows(tokens)
            x, index, w = (t.to(self._device) for t in (some.hidden_states, some.top_k_index, some.top_k_weights))
            yield tokens, Inputs(x, index, w, inputs.lora)

    def _rows(self, chunk: Inputs) -> Rows:
        return Rows(chunk.top_k_index, chunk.top_k_weights, self.shape.num_experts, self._pad)

    def _forward(self, rows: Rows, chunk: Inputs, keep: _Chunk | None) -> Tensor:
        """[T, H] of one chunk; writes what is kept."""
        x, products = chunk.hidden_states, self._open()
        scratch = _Scratch(self.shape, rows.most, x)
        y = BUFFERS.workspace("rows", (rows.total + 1, self.shape.hidden_size), x)
        y[rows.total].zero_()
        for part in rows.parts:
            lora = ExpertLora(chunk.lora, part.expert, x) if chunk.lora else None
            gate_up = keep.gate_up[part.rows] if keep else scratch.gate_up[: part.size]
            low = self._gate_up(part, rows, x, lora, scratch, gate_up)
            gate, up = gate_up.chunk(2, 1)  # [n, I]
            mid = torch.ops.aten.silu.out(gate, out=scratch.mid[: part.size]).mul_(up)
            out = y[part.rows]
            base = products.down(part.expert, mid, out)
            if lora is None:
                _move(base, out)
                continue
            low_down = lora.low_down(mid)
            lora.add_down(base, low_down, out)
            if keep:
                keep.low.append((low, low_down))
        return rows.combine(y)

    def _gate_up(
        self, part: Part, rows: Rows, x: Tensor, lora: ExpertLora | None, scratch: _Scratch, out: Tensor
    ) -> Tensor | None:
        """Gate and up of one expert -> out [n, 2 I]; returns the LoRA's low-rank rows [n, 2 r]."""
        mine = rows.gather(x, part, scratch.x)  # [n, H]
        base = self._open().gate_up(part.expert, mine, out)
        if lora is None:
            _move(base, out)
            return None
        low = lora.low_gate_up(mine)
        lora.add_gate_up(base, low, out)
        return low

    def _backward(
        self, rows: Rows, chunk: Inputs, grad_output: Tensor, keep: _Chunk | None, gradients: LoraGradients | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the hidden states [T, H] and the routing weights [T, K] of one chunk; adds the LoRA's."""
        x, products = chunk.hidden_states, self._open()
        scratch = _Scratch(self.shape, rows.most, x)
        grad_rows = BUFFERS.workspace("rows", (rows.total + 1, self.shape.hidden_size), x)
        grad_rows[rows.total].zero_()
        grad_weight = rows.weight.new_zeros(rows.total + 1)
        for at, part in enumerate(rows.parts):
            n, e = part.size, part.expert
            lora = ExpertLora(chunk.lora, e, x) if chunk.lora else None
            low = low_down = None
            if keep:
                gate_up = keep.gate_up[part.rows]
                if lora:
                    low, low_down = keep.low[at]
            else:
                gate_up = scratch.gate_up[:n]
                low = self._gate_up(part, rows, x, lora, scratch, gate_up)
            gate, up = gate_up.chunk(2, 1)  # [n, I]
            act = torch.ops.aten.silu.out(gate, out=scratch.act[:n])
            mid = torch.mul(act, up, out=scratch.mid[:n])

            grad = rows.gather(grad_output, part, scratch.grad)  # [n, H]
            d = scratch.d[:n]  # [n, I]
            base = products.down_backward(e, grad, d)
            grad_low_down = lora.backward_down(grad, base, d) if lora else _move(base, d)

            d_gate_up = scratch.d_gate_up[:n]
            d_gate, d_up = d_gate_up.chunk(2, 1)
            torch.mul(act, d, out=d_up)
            product = torch.mul(mid, d, out=act)
            grad_weight[part.rows] = product.sum(-1, dtype=torch.float32)
            torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=d_gate)

            out = grad_rows[part.rows]
            base = products.gate_up_backward(e, d_gate_up, out)
            if lora is None or gradients is None:
                _move(base, out)
                continue
            grad_low = lora.backward_gate_up(d_gate_up, base, out)
            mine = rows.gather(x, part, scratch.x) if keep else scratch.x[:n]
            if low_down is None:
                low_down = lora.low_down(mid)
            lows = (low, grad_low, low_down, grad_low_down)
            low, grad_low, low_down, grad_low_down = (t.float() * rows.weight[part.rows] for t in lows)
            r = low_down.shape[1]
            mine, grad, mid = scratch.wide("x", mine), scratch.wide("grad", grad), scratch.wide("mid", mid)
            d_gate, d_up = scratch.wide("d_gate_up", d_gate_up).chunk(2, 1)
            gradients.add("gate_proj.lora_A", e, grad_low[:, :r], mine)
            gradients.add("gate_proj.lora_B", e, d_gate, low[:, :r])
            gradients.add("up_proj.lora_A", e, grad_low[:, r:], mine)
            gradients.add("up_proj.lora_B", e, d_up, low[:, r:])
            gradients.add("down_proj.lora_A", e, grad_low_down, mid)
            gradients.add("down_proj.lora_B", e, grad, low_down)
        return rows.combine(grad_rows), rows.per_slot(grad_weight)

    def _keep(self, rows: Rows, chunk: Inputs) -> _Chunk | None:
        """Room for what the backward of a chunk needs, or None."""
        shape, dtype = (rows.total, 2 * self.shape.intermediate_size), chunk.hidden_states.dtype
        space = BUFFERS.borrow(nbytes(shape, dtype), self._device)
        if space is None:
            return None
        self._kept.append(_Chunk(rows, space, space.tensor(shape, dtype), []))
        return self._kept[-1]

    def _forget(self) -> None:
        for chunk in self._kept:
            BUFFERS.give_back(chunk.space)
        self._ticket, self._kept = STATELESS, []

    def _open(self) -> Products:
        if self._products is None:
            raise KTError(
                "These experts were closed, or their model detached, and cannot compute any more. Run every backward "
                "before that."
            )
        return self._products


class _Scratch:
    """One expert's intermediate values, in memory that every expert and layer writes again."""

    def __init__(self, shape: MoEShape, rows: int, like: Tensor) -> None:
        """For up to `rows` rows of an expert, of the dtype and on the device of `like`."""
        self._most, self._like, self._wide = rows, like, like.new_empty(0, dtype=torch.float32)
        h, i = shape.hidden_size, shape.intermediate_size
        self.x, self.grad = self._get("x", h), self._get("grad", h)
        self.gate_up, self.d_gate_up = self._get("gate_up", 2 * i), self._get("d_gate_up", 2 * i)
        self.act, self.mid, self.d = self._get("act", i), self._get("mid", i), self._get("d", i)

    def _get(self, name: str, columns: int) -> Tensor:
        return BUFFERS.workspace(name, (self._most, columns), self._like)

    def wide(self, name: str, values: Tensor) -> Tensor:
        """The values in fp32."""
        if values.dtype == torch.float32:
            return values
        return BUFFERS.workspace(f"wide {name}", (self._most, values.shape[1]), self._wide)[: len(values)].copy_(
            values
        )


def _move(base: Tensor, out: Tensor) -> Tensor:
    """A product's result -> out, where it is not there yet."""
    return out if base is out else out.copy_(base)


def device_of(weights: ExpertWeights) -> torch.device:
    """Where the weights are, and the products run."""
    stack = weights.gate_proj
    return getattr(stack, "device", None) or stack[0].device
