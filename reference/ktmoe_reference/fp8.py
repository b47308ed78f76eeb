"""What FP8 weights with block scales mean: each e4m3 number times the scale of its block, as DeepSeek-V3 is released.

Source: DeepSeek-V3's `config.json` (`quantization_config`: e4m3, weight_block_size [128, 128]) and its tensors
`*.weight` and `*.weight_scale_inv`, where weight = fp8 * scale.
"""

import torch
from torch import Tensor


_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize_fp8(weight: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """`scale = max|w| / 448` over each block, `fp8 = w / scale` rounded to the nearest.

    Args:
        weight: [out, in], floating point.
        block: rows and columns that share a scale; the last blocks may be smaller.

    Returns:
        float8_e4m3fn [out, in], and fp32 [ceil(out / rows), ceil(in / columns)].
    """
    rows, columns = block
    parts = [band.split(columns, 1) for band in weight.float().split(rows)]
    scale = torch.stack([torch.stack([part.abs().amax() for part in band]) for band in parts]) / _LARGEST
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight.float() / _spread(scale, weight, block)).to(torch.float8_e4m3fn), scale


def dequantize_fp8(matrix: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """`fp8 * scale`, block by block, in fp32.

    Args:
        matrix: [out, in], float8_e4m3fn.
        scale: [ceil(out / rows), ceil(in / columns)].
        block: rows and columns that share a scale.

    Returns:
        [out, in] fp32.
    """
    return matrix.float().mul_(_spread(scale.float(), matrix, block))


def _spread(scale: Tensor, matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """[out, in]: every block's scale at each of its elements."""
    out, width = matrix.shape
    return scale.repeat_interleave(block[0], 0)[:out].repeat_interleave(block[1], 1)[:, :width]
