"""The algorithm: expert by expert over rows sorted by expert, with a backward written by hand.

For one expert with rows x [n, H], routing weights w [n, 1] and output gradients g [n, H] (before weighting):

    gate, up = x G^T, x U^T          mid = silu(gate) * up            y = mid D^T           out = sum of w y
    d = g D                          grad of w = row sums of mid * d  (no y is kept or computed again for it)
    d_up = silu(gate) * d            d_gate = silu'(gate) * up * d    grad of x = sum of w (d_gate G + d_up U)

where every projection includes its LoRA. w multiplies what is summed or small anyway: the sums over a token's
experts, in both directions, and the low-rank rows of the LoRA.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ktmoe.backends.torch.buffers import BUFFERS, Space, nbytes
from ktmoe.backends.torch.expert import Expert, Scratch
from ktmoe.backends.torch.lora import ExpertLora, LowRows, by_expert
from ktmoe.backends.torch.products import FromSource, Products
from ktmoe.backends.torch.rows import Rows
from ktmoe.interface import STATELESS, Backend
from ktmoe.types import ExpertWeights, Gradients, Inputs, KTError, MoEShape, device_of


_CHUNK = 256 * 2**20  # bytes of all rows' outputs that one pass may need; longer calls run in chunks of tokens
_TICKETS = itertools.count(STATELESS + 1)


@dataclass(eq=False)
class _Kept:
    """What is kept of a chunk of tokens, from its forward to its backward."""

    rows: Rows
    space: Space
    gate_up: Tensor  # [R, 2 I]
    low: list[LowRows]  # of every part; none without LoRA


class TorchBackend(Backend):
    """One layer's experts. Keeps gate and up of its last saving forward, as far as memory allows."""

    name = "torch"
    bets = True

    def __init__(
        self,
        weights: ExpertWeights,
        shape: MoEShape,
        compute_dtype: torch.dtype = torch.bfloat16,
        products: Products | None = None,
    ) -> None:
        """Costs nothing by itself: the weights are neither read nor copied.

        Args:
            weights: stay the caller's.
            shape: what it is built for.
            compute_dtype: of rows and products. Routing weights, LoRA and sums over slots are fp32.
            products: with copies of the weights; by default straight from `weights`, cast block by block where they
                have another dtype.
        """
        self.weights, self.shape, self.compute_dtype = weights, shape, compute_dtype
        self._products: Products | None = products or FromSource(weights)
        self._device = device_of(weights.gate_proj)
        # bf16 products on the CPU are oneDNN's, which compiles one for every number of rows.
        self._pad = compute_dtype == torch.bfloat16 and self._device.type == "cpu"
        self._ticket = STATELESS
        self._kept: list[_Kept] = []
        BUFFERS.join(self)

    @torch.no_grad()
    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        with BUFFERS.lock:
            out = torch.empty_like(inputs.hidden_states)  # [T, H]
            if save:
                self._forget()
            for tokens, chunk in self._chunks(inputs):
                rows = self._rows(chunk)
                kept = self._keep(rows) if save else None
                save = kept is not None  # all chunks or none
                out[tokens] = self._forward(rows, chunk, kept)
            if save:
                self._ticket = next(_TICKETS)
            elif self._ticket == STATELESS:
                self._forget()
            return out, self._ticket if save else STATELESS

    @torch.no_grad()
    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`."""
        with BUFFERS.lock:
            grad_x = torch.empty_like(inputs.hidden_states)  # [T, H]
            grad_w = torch.empty_like(inputs.top_k_weights)  # [T, K]
            lora = [torch.zeros(t.shape, dtype=torch.float32, device=self._device) for t in inputs.lora or ()]
            gradients = by_expert(lora)
            all_kept: Sequence[_Kept] = self._kept if ticket == self._ticket != STATELESS else ()
            for (tokens, chunk), kept in itertools.zip_longest(self._chunks(inputs), all_kept):
                grad = grad_output[tokens].to(self._device)
                rows = kept.rows if kept else self._rows(chunk)
                grad_x[tokens], grad_w[tokens] = self._backward(rows, chunk, grad, kept, gradients)
            if all_kept:
                self._forget()
            return Gradients(grad_x, grad_w, [t.to(grad_x.device) for t in lora] or None)

    def holds(self, ticket: int) -> bool:
        """See `Backend.holds`."""
        return ticket in (STATELESS, self._ticket)

    def close(self) -> None:
        """Releases packed weights, kept activations and, with the last backend, the workspaces."""
        with BUFFERS.lock:
            self._forget()
            self._products = None
            BUFFERS.leave(self)

    def _chunks(self, inputs: Inputs) -> Iterator[tuple[slice, Inputs]]:
        """Some tokens at a time, where the weights are."""
        step = max(64, _CHUNK // (self.shape.top_k * self.shape.hidden_size * self.compute_dtype.itemsize))
        for start in range(0, len(inputs.hidden_states), step):
            tokens = slice(start, start + step)
            some = inputs.rows(tokens)
            x, index, w = (t.to(self._device) for t in (some.hidden_states, some.top_k_index, some.top_k_weights))
            yield tokens, Inputs(x, index, w, inputs.lora)

    def _rows(self, chunk: Inputs) -> Rows:
        return Rows(chunk.top_k_index, chunk.top_k_weights, self.shape.num_experts, self._pad)

    def _forward(self, rows: Rows, chunk: Inputs, kept: _Kept | None) -> Tensor:
        """[T, H] of one chunk; writes what is kept."""
        y = self._all_rows(rows)
        for expert in self._experts(rows, chunk):
            part, n, scratch = expert.part, expert.part.size, expert.scratch
            gate_up = kept.gate_up[part.rows] if kept else scratch.gate_up[:n]
            low_gate_up = expert.gate_up(gate_up)
            gate, up = gate_up.chunk(2, 1)  # [n, I]
            mid = torch.ops.aten.silu.out(gate, out=scratch.mid[:n]).mul_(up)
            low_down = expert.down(mid, y[part.rows])
            if kept and low_gate_up is not None and low_down is not None:
                kept.low.append(LowRows(low_gate_up, low_down))
        return rows.combine(y)

    def _backward(
        self, rows: Rows, chunk: Inputs, grad_output: Tensor, kept: _Kept | None, gradients: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the hidden states [T, H] and the routing weights [T, K] of one chunk; adds the LoRA's."""
        grad_rows = self._all_rows(rows)
        grad_weight = rows.weight.new_zeros(rows.total + 1)
        for at, expert in enumerate(self._experts(rows, chunk)):
            part, n, scratch, lora = expert.part, expert.part.size, expert.scratch, expert.lora
            low_gate_up = None
            if kept:
                gate_up = kept.gate_up[part.rows]
            else:
                gate_up = scratch.gate_up[:n]
                low_gate_up = expert.gate_up(gate_up)
            gate, up = gate_up.chunk(2, 1)  # [n, I]
            act = torch.ops.aten.silu.out(gate, out=scratch.act[:n])
            mid = torch.mul(act, up, out=scratch.mid[:n])
            if lora:
                lora.mid = scratch.wide("mid", mid)
                if low_gate_up is not None:
                    lora.low = LowRows(low_gate_up, lora.low_down(lora.mid))
                elif kept:
                    lora.x, lora.low = scratch.wide("x", expert.gather()), kept.low[at]

            grad = rows.gather(grad_output, part, scratch.grad)  # [n, H]
            d = scratch.d[:n]  # [n, I]
            expert.down_backward(grad, d)
            d_gate_up = scratch.d_gate_up[:n]
            d_gate, d_up = d_gate_up.chunk(2, 1)
            torch.mul(act, d, out=d_up)
            grad_weight[part.rows] = torch.mul(mid, d, out=act).sum(-1, dtype=torch.float32)
            torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=d_gate)
            expert.gate_up_backward(d_gate_up, grad_rows[part.rows])
            if lora:
                lora.add_gradients(gradients[part.expert], rows.weight[part.rows])
        return rows.combine(grad_rows), rows.per_slot(grad_weight)

    def _experts(self, rows: Rows, chunk: Inputs) -> Iterator[Expert]:
        """Every expert that has rows."""
        if self._products is None:
            raise KTError(
                "These experts were closed, or their model detached, and cannot compute any more. Run every backward "
                "before that."
            )
        x, lora = chunk.hidden_states, chunk.lora
        scratch = Scratch(self.shape, rows.most, x)
        matrices = by_expert(lora) if lora else []
        for part in rows.parts:
            mine = ExpertLora(matrices[part.expert], lora.scaling, self._device) if lora else None
            yield Expert(part, rows, x, self._products, scratch, mine)

    def _all_rows(self, rows: Rows) -> Tensor:
        """[R + 1, H] for the results of all experts, the last row zero."""
        like = torch.empty(0, dtype=self.compute_dtype, device=self._device)
        found = BUFFERS.workspace("rows", (rows.total + 1, self.shape.hidden_size), like)
        found[rows.total].zero_()
        return found

    def _keep(self, rows: Rows) -> _Kept | None:
        """Room for what the backward of a chunk needs, or None."""
        shape = (rows.total, 2 * self.shape.intermediate_size)
        space = BUFFERS.borrow(nbytes(shape, self.compute_dtype), self._device)
        if space is None:
            return None
        self._kept.append(_Kept(rows, space, space.tensor(shape, self.compute_dtype), []))
        return self._kept[-1]

    def _forget(self) -> None:
        for kept in self._kept:
            BUFFERS.give_back(kept.space)
        self._ticket, self._kept = STATELESS, []
