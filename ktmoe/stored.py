"""Matrices as a quantised checkpoint stores them, each dequantised when it is asked for."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ktmoe.errors import KTError


GROUP = 32  # columns that share a scale in INT4
_AT_ONCE = 2**19  # numbers that are dequantised: a cache holds them, and the process's peak does not show them


class Stored(Sequence[Tensor]):
    """E matrices of one layer, [out, in] each: quantised numbers and their scales, views of the files.

    Attributes:
        format: its name; "" for a variant that no kernel takes.
        matrices: E of the quantised numbers.
        scales: E of their scales.
        shape: [E, out, in].
        dtype: of what is given.
        bits: that a weight takes, scales left out.
    """

    format: str
    bits: int
    shape: tuple[int, int, int]

    def __init__(self, matrices: Sequence[Tensor] | Tensor, scales: Sequence[Tensor] | Tensor) -> None:
        """Holds what the file holds.

        Raises:
            KTError: scales that are no numbers.
        """
        self.matrices, self.scales, self.dtype = matrices, scales, torch.bfloat16
        for e, scale in enumerate(scales):
            if not scale.is_meta and not scale.isfinite().all():
                raise KTError(
                    f"weights: the scales of expert {e} hold NaN or infinite numbers: the checkpoint is damaged. "
                    "Download it again."
                )

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.matrices[0].device

    @abstractmethod
    def rows(self, e: int, start: int, stop: int) -> Tensor:
        """Some rows of an expert's matrix, [stop - start, in] fp32: exactly what is stored."""

    def write(self, e: int, start: int, into: Tensor) -> None:
        """Rows of an expert's matrix, from `start` on and as many as `into` has, in its dtype."""
        step = max(1, _AT_ONCE // self.shape[2])
        for at in range(0, len(into), step):
            part = into[at : at + step]
            part.copy_(self.rows(e, start + at, start + at + len(part)))

    def exact(self) -> Stored:
        """The same in fp32, which holds every product of a quantised number and its scale to 24 bits."""
        same = copy.copy(self)
        same.dtype = torch.float32
        return same

    def some(self, experts: Sequence[int]) -> Stored:
        """These experts alone, in this order."""
        same = copy.copy(self)
        same.matrices, same.scales = [self.matrices[e] for e in experts], [self.scales[e] for e in experts]
        same.shape = (len(experts), *self.shape[1:])
        return same

    def __len__(self) -> int:
        """E."""
        return len(self.matrices)

    def __getitem__(self, e: Any) -> Any:
        """[out, in] of expert `e`."""
        if isinstance(e, slice):
            return [self[n] for n in range(*e.indices(len(self)))]
        whole = torch.empty(self.shape[1:], dtype=self.dtype, device=self.device)
        self.write(e, 0, whole)
        return whole

    def row(self, e: int, n: int) -> Tensor:
        """[in]: row `n` of expert `e`, without the rest of its matrix."""
        return self.rows(e, n, n + 1)[0].to(self.dtype)


class BlockFP8(Stored):
    """float8_e4m3fn with one fp32 scale for each block of rows and columns, as DeepSeek-V3 is released.

    Examples:
        >>> matrices = torch.randn(4, 256, 128).to(torch.float8_e4m3fn)  # as *.weight
        >>> scales = torch.rand(4, 2, 1)  # as *.weight_scale_inv: one for each block of 128 x 128
        >>> gate = ktmoe.BlockFP8(matrices, scales)
        >>> gate.shape, gate[3].dtype
        ((4, 256, 128), torch.bfloat16)
    """

    bits = 8

    def __init__(
        self,
        matrices: Sequence[Tensor] | Tensor,
        scales: Sequence[Tensor] | Tensor,
        block: tuple[int, int] = (128, 128),
    ) -> None:
        """Holds what the file holds.

        Args:
            matrices: E of [out, in], float8_e4m3fn.
            scales: E of [ceil(out / rows), ceil(in / columns)]; weight = fp8 * scale, block by block.
            block: rows and columns that share a scale.

        Raises:
            KTError: scales for another block size, or that are no numbers.
        """
        super().__init__(matrices, scales)
        self.block = block
        self.format = "fp8" if block == (128, 128) else ""
        self.shape = (len(matrices), matrices[0].shape[0], matrices[0].shape[1])
        for matrix, scale in zip(matrices, scales, strict=True):
            check_scale("FP8 scales", tuple(matrix.shape), tuple(scale.shape), block)

    def rows(self, e: int, start: int, stop: int) -> Tensor:
        """See `Stored.rows`."""
        found = _numbers(self.matrices[e][start:stop])
        scale = self.scales[e].float()[torch.arange(start, stop) // self.block[0]]  # [stop - start, in / columns]
        for at, part in enumerate(found.split(self.block[1], 1)):
            part.mul_(scale[:, at, None])
        return found


def _numbers(matrix: Tensor) -> Tensor:
    """float8_e4m3fn as fp32. Looked up: torch's own cast took 2.6 times as long on a CPU."""
    every = torch.arange(256, dtype=torch.uint8, device=matrix.device).view(torch.float8_e4m3fn).float()
    return every.index_select(0, matrix.view(torch.uint8).reshape(-1).int()).view(matrix.shape)


class GroupInt4(Stored):
    """Numbers from -8 to 7 with one bf16 scale for each group of 32 along the input, as Kimi K2 is released.

    Examples:
        >>> packed = torch.randint(256, (4, 256, 64), dtype=torch.uint8)  # two to a byte: the bytes of *.weight_packed
        >>> scales = torch.rand(4, 256, 4, dtype=torch.bfloat16)  # as *.weight_scale
        >>> gate = ktmoe.GroupInt4(packed, scales)
        >>> gate.shape, gate[3].dtype
        ((4, 256, 128), torch.bfloat16)
    """

    bits = 4
    format = "int4"

    def __init__(self, matrices: Sequence[Tensor] | Tensor, scales: Sequence[Tensor] | Tensor) -> None:
        """Holds what the file holds.

        Args:
            matrices: E of [out, in / 2] uint8: two numbers to a byte, each plus 8, the first in the lower half.
            scales: E of [out, in / 32] bf16.

        Raises:
            KTError: scales of another shape, or that are no numbers.
        """
        super().__init__(matrices, scales)
        out, half = matrices[0].shape
        self.shape = (len(matrices), out, 2 * half)
        for scale in scales:
            if tuple(scale.shape) != (out, 2 * half // GROUP) or 2 * half % GROUP:
                raise KTError(
                    f"INT4 scales: got {tuple(scale.shape)} for a matrix of {(out, 2 * half)}; expected "
                    f"{(out, 2 * half // GROUP)}, one for each group of {GROUP} columns (group_size in config.json)."
                )

    def rows(self, e: int, start: int, stop: int) -> Tensor:
        """See `Stored.rows`."""
        packed, scale = self.matrices[e][start:stop], self.scales[e][start:stop]
        found = torch.empty(stop - start, self.shape[2], device=packed.device)
        found[:, ::2], found[:, 1::2] = packed & 15, packed >> 4
        return found.sub_(8).unflatten(1, (-1, GROUP)).mul_(scale.float().unsqueeze(-1)).flatten(1)


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
