"""One expert with the rows routed to it: its four products, LoRA included."""

from __future__ import annotations

import torch
from torch import Tensor

from ktmoe.backends.torch.buffers import BUFFERS
from ktmoe.backends.torch.lora import ExpertLora
from ktmoe.backends.torch.products import Products
from ktmoe.backends.torch.rows import Part, Rows
from ktmoe.types import MoEShape


class Scratch:
    """Intermediate values of one expert, in memory that the next expert and the next layer write again."""

    def __init__(self, shape: MoEShape, rows: int, like: Tensor) -> None:
        """For up to `rows` rows of an expert, of the dtype and on the device of `like`."""
        self._most, self._like, self._wide = rows, like, like.new_empty(0, dtype=torch.float32)
        h, i = shape.hidden_size, shape.intermediate_size
        self.x, self.grad = self._get("x", h), self._get("grad", h)
        self.gate_up, self.d_gate_up = self._get("gate_up", 2 * i), self._get("d_gate_up", 2 * i)
        self.act, self.mid, self.d = self._get("act", i), self._get("mid", i), self._get("d", i)

    def wide(self, name: str, values: Tensor) -> Tensor:
        """The values in fp32."""
        if values.dtype == torch.float32:
            return values
        space = BUFFERS.workspace(f"wide {name}", (self._most, values.shape[1]), self._wide)
        return space[: len(values)].copy_(values)

    def _get(self, name: str, columns: int) -> Tensor:
        return BUFFERS.workspace(name, (self._most, columns), self._like)


class Expert:
    """Its products overwrite `out`: the LoRA writes first, and the frozen weights' product adds to that.

    So both are rounded once, together, and the LoRA costs no pass of its own over the results.
    """

    def __init__(
        self,
        part: Part,
        rows: Rows,
        hidden_states: Tensor,
        products: Products,
        scratch: Scratch,
        lora: ExpertLora | None,
    ) -> None:
        """One expert in one call: the tokens' hidden states [T, H] are gathered when they are needed."""
        self.part, self.scratch, self.lora = part, scratch, lora
        self._rows, self._hidden_states, self._products = rows, hidden_states, products

    def gather(self) -> Tensor:
        """Hidden states of the expert's rows [n, H]."""
        return self._rows.gather(self._hidden_states, self.part, self.scratch.x)

    def gate_up(self, out: Tensor) -> Tensor | None:
        """Gate and up -> out [n, 2 I]; returns the low-rank rows of the LoRA."""
        x, low = self.gather(), None
        if self.lora:
            self.lora.x = self.scratch.wide("x", x)
            low = self.lora.gate_up(self.lora.x, out)
        self._products.gate_up(self.part.expert, x, out, add=self.lora is not None)
        return low

    def down(self, mid: Tensor, out: Tensor) -> Tensor | None:
        """[n, I] -> out [n, H]; returns the low-rank rows of the LoRA."""
        low = None
        if self.lora:
            low = self.lora.low_down(self.scratch.wide("mid", mid))
            self.lora.down(low, out)
        self._products.down(self.part.expert, mid, out, add=self.lora is not None)
        return low

    def down_backward(self, grad: Tensor, out: Tensor) -> None:
        """[n, H] -> out [n, I]."""
        if self.lora:
            self.lora.down_backward(self.scratch.wide("grad", grad), out)
        self._products.down_backward(self.part.expert, grad, out, add=self.lora is not None)

    def gate_up_backward(self, grad: Tensor, out: Tensor) -> None:
        """[n, 2 I] -> out [n, H]."""
        if self.lora:
            self.lora.gate_up_backward(self.scratch.wide("d_gate_up", grad), out)
        self._products.gate_up_backward(self.part.expert, grad, out, add=self.lora is not None)
