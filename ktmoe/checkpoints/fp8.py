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
        for scale in scales:
            check_scale("FP8 scales", tuple(matrices[0].shape), tuple(scale.shape), block)

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


def check_scale(what: str, matrix: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> None:
    """Refuses block scales that are not one for each block.

    Args:
        what: for the message.
        matrix: shape, [out, in].
        scale: shape, [ceil(out / rows), ceil(in / columns)].
        block: rows and columns that share a scale.

    Raises:
        KTError: another shape.
    """
    expected = tuple(-(-n // b) for n, b in zip(matrix, block, strict=True)) if len(matrix) == 2 else None
    if scale != expected:
        raise KTError(
            f"{what}: got {scale} for a matrix of {matrix}; expected {expected or 'two dimensions'}, one for each "
            f"block of {block[0]} x {block[1]} (weight_block_size in config.json)."
        )
