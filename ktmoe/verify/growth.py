"""Does a measured series grow? A slope with an interval that holds for samples that depend on one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Trend:
    """A straight line through a series, and how sure its slope is.

    Attributes:
        level: mean of the series.
        slope: per unit of x.
        margin: half of the slope's 95 % confidence interval.
        span: the range of x.
    """

    level: float
    slope: float
    margin: float
    span: float

    @property
    def growth(self) -> float:
        """How far the line rises over the whole series."""
        return self.slope * self.span

    @property
    def sure_growth(self) -> float:
        """The lower end of the growth's 95 % confidence interval."""
        return (self.slope - self.margin) * self.span


def trend(x: Sequence[float], y: Sequence[float]) -> Trend:
    """Fits a line by least squares.

    Memory moves in steps and stays there: samples resemble their neighbours, and the textbook interval would be
    several times too narrow. This is the equal-weighted cosine estimator that Lazarus, Lewis, Stock and Watson
    recommend (HAR Inference, Journal of Business & Economic Statistics 36, 2018). The slope's error is a sum of
    scores, z = (x - mean x) * residual; the variance of that sum is read off its B = 0.4 T^(2/3) slowest cosine waves,
    which dependent samples make large, and B waves mean Student's t with B degrees of freedom. It is simpler than
    Newey-West and less optimistic. Simulated, it leaves the true slope out in 6 to 19 % of the cases for correlations
    between neighbours of up to 0.9, and in half of them for a random walk: whoever judges by it has to allow for that.

    Args:
        x: T numbers, not all the same; the samples in their order.
        y: T numbers.

    Returns:
        The line.

    Raises:
        ValueError: fewer than 10 samples, or all at the same x.
    """
    count = len(x)
    if count < 10 or min(x) == max(x):
        raise ValueError(f"a trend needs at least 10 samples at different places, got {count}")
    at, values = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)  # [T]
    centred = at - at.mean()
    spread = (centred * centred).sum()
    slope = (centred * values).sum() / spread
    scores = centred * (values - values.mean() - slope * centred)
    waves = max(2, int(0.4 * count ** (2 / 3)))  # B
    phase = math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    cosines = torch.cos(torch.arange(1, waves + 1, dtype=torch.float64).unsqueeze(-1) * phase)  # [B, T]
    variance = 2 * (cosines @ scores).square().mean()  # of the sum of the scores
    margin = _t_quantile(waves) * variance.sqrt() / spread
    return Trend(values.mean().item(), slope.item(), margin.item(), max(x) - min(x))


def _t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion around the normal one: 2 % off for 4, 0.3 % for 8."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def late_rise(values: Sequence[float]) -> float:
    """By how much the last quarter's maximum exceeds the first quarter's; at most 0 for what does not pile up."""
    quarter = max(1, len(values) // 4)
    return max(values[-quarter:]) - max(values[:quarter])
