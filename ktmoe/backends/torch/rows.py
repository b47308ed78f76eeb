"""Which token goes to which expert, as rows sorted by expert, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The rows of one expert.

    Attributes:
        expert: e.
        start: its first row.
        count: its rows that hold a token.
        stop: behind its last row; rows from `start + count` on are padding and hold zeros.
    """

    expert: int
    start: int
    count: int
    stop: int

    @property
    def rows(self) -> slice:
        """All of them."""
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        """How many those are."""
        return self.stop - self.start


class Rows:
    """The (token, slot) pairs of one call, sorted by expert: [R] rows, each expert's padded to a number of `padded`.

    Padding is zeros, never a copy of a token: a NaN stays in its own row. One more row, at `total`, is for the slots
    that are skipped.
    """

    def __init__(self, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, pad: bool) -> None:
        """Sorts.

        Args:
            top_k_index: [T, K], -1 for a slot that is skipped.
            top_k_weights: [T, K] float32.
            num_experts: E.
            pad: whether to round each expert's number of rows up, so that few different numbers occur.
        """
        tokens, k = top_k_index.shape
        flat = top_k_index.flatten()
        counts = torch.bincount(flat + 1, minlength=num_experts + 1).tolist()
        skipped, shift, self.parts, self.total = counts[0], [], [], 0
        begin = 0
        for e, count in enumerate(counts[1:]):
            shift.append(self.total - begin)
            begin += count
            if count:
                stop = self.total + (padded(count) if pad else count)
                self.parts.append(Part(e, self.total, count, stop))
                self.total = stop
        pair = torch.argsort(flat, stable=True)[skipped:]  # positions in `flat`, by expert
        row = torch.arange(len(pair), device=flat.device)
        row += torch.tensor(shift, dtype=torch.int64).to(flat.device)[flat[pair]]
        self.token = flat.new_zeros(self.total).index_copy_(0, row, pair // k)  # [R]
        self.of_slot = torch.full_like(flat, self.total).index_copy_(0, pair, row).view(tokens, k)  # [T, K]
        self.weights = top_k_weights  # [T, K]
        self.weight = top_k_weights.new_zeros(self.total, 1)  # [R, 1], 0 for padding
        self.weight.index_copy_(0, row, top_k_weights.flatten()[pair].unsqueeze(-1))
        self.most = max((p.size for p in self.parts), default=0)

    def gather(self, values: Tensor, part: Part, out: Tensor) -> Tensor:
        """The rows of one expert from one value per token: [T, n] -> the first rows of `out`."""
        out = out[: part.size]
        torch.index_select(values, 0, self.token[part.rows], out=out)
        out[part.count :].zero_()
        return out

    def combine(self, rows: Tensor) -> Tensor:
        """Sums every token's rows, times the routing weights, in the order of its slots: [R + 1, n] -> [T, n].

        Sums are fp32, rounded once. Row R must be zero.
        """
        index, weights = self.of_slot, self.weights
        if rows.dtype != torch.float32:
            # The weights must have the dtype of the rows. As a sum of two they keep 16 bits; the second read of a row
            # comes from the cache.
            high = weights.to(rows.dtype)
            low = (weights - high.float()).to(rows.dtype)
            # Infinite weights have no rest.
            weights = torch.stack((high, low.nan_to_num(0.0, 0.0, 0.0)), -1).flatten(1)
            index = index.repeat_interleave(2, 1)
        return torch.nn.functional.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")

    def per_slot(self, rows: Tensor) -> Tensor:
        """One value per row -> one per slot, 0 where it is skipped: [R + 1] -> [T, K]. Element R must be zero."""
        return rows[self.of_slot]


def padded(count: int) -> int:
    """The number of rows that is computed for `count`: a multiple of 8, and of a sixteenth of the next power of two.

    oneDNN compiles a primitive for every number of rows, which takes as long as a large product. These are 16 numbers
    up to 128 and 8 for every doubling; large numbers grow by 3 %.
    """
    step = max(8, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step
