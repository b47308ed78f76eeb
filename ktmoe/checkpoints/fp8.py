"""FP8 matrices with block scales, as DeepSeek-V3 is released, dequantised one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ktmoe.types import KTError


class BlockFP8(Sequence[Tensor]):
    """E matrices held as FP8 with block scales, each dequantised to bf16 when it is asked for.

    Attributes:
        shape: [E, out, in].
        dtype: bf16.
    """

    dtype = torch.bfloat16

    def __init__(self, matrices: Sequence[Tensor], scales: Sequence[Tensor], block: tuple[int, int]) -> None:
        """Holds what the file holds.

        Args:
            matrices: E of [out, in], float8_e4m3fn.
            scales: E of [ceil(out / rows), ceil(in / columns)]; weight = fp8 * scale, block by block.
            block: rows and columns that share a scale.

        Raises:
            KTError: scales for another block size.
        """
        self._matrices, self._scales, self._block = matrices, scales, block
        self.shape = (len(matrices), *matrices[0].shape)
        expected = tuple(-(-n // b) for n, b in zip(matrices[0].shape, block, strict=True))
        for scale in scales:
            if tuple(scale.shape) != expected:
                raise KTError(
                    f"FP8 scales: got {tuple(scale.shape)} for a matrix of {tuple(matrices[0].shape)}; expected "
                    f"{expected}, one for each block of {block[0]} x {block[1]} (weight_block_size in config.json)."
                )

    def __len__(self) -> int:
        """E."""
        return len(self._matrices)

    def __getitem__(self, e: Any) -> Any:
        """[out, in] bf16 of expert `e`."""
        if isinstance(e, slice):
            return [self[n] for n in range(*e.indices(len(self)))]
        matrix = self._matrices[e].float()
        rows, columns = matrix.shape
        scale = self._scales[e].float().repeat_interleave(self._block[0], 0)[:rows]
        return matrix.mul_(scale.repeat_interleave(self._block[1], 1)[:, :columns]).to(self.dtype)

    def row(self, e: int, n: int) -> Tensor:
        """[in] bf16: row `n` of expert `e`, without the rest of its matrix."""
        scale = self._scales[e][n // self._block[0]].float().repeat_interleave(self._block[1])
        return self._matrices[e][n].float().mul_(scale[: self.shape[2]]).to(self.dtype)
