"""Confidence intervals for quality figures, in closed form, from sums over blocks of text or counts of samples.

Tokens of one text are not independent of each other; blocks of some hundred tokens nearly are. A mean over tokens is
therefore given Student's t-interval over blocks, as a ratio of sums, so that blocks may differ in length::

    mean = sum_b s_b / N        N = sum_b n_b
    se^2 = k / (k - 1) * sum_b (s_b - mean * n_b)^2 / N^2        k blocks

The median of samples lies between two of them in order, with a probability that does not depend on their distribution::

    P(x_(k) <= median <= x_(n + 1 - k)) = 1 - 2 * sum_{i < k} C(n, i) / 2^n

References: Cochran 1977, Sampling Techniques, section 6 (ratio estimate); Wilson 1927 (a proportion); Agresti & Min
2005 (difference of paired proportions); Abramowitz & Stegun 26.7 (Student's t); David & Nagaraja 2003, Order
Statistics, section 7.1 (the median).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, median

Interval = tuple[float, float]

CONFIDENCE = 0.95


def t_quantile(confidence: float, degrees: int) -> float:
    """Return t such that Student's t with ``degrees`` degrees of freedom lies in (-t, t) with this probability."""
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < confidence else (low, middle)
    return high


def _t_within(t: float, degrees: int) -> float:
    """Return P(|T| < t), a finite sum for a whole number of degrees (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def block_interval(
    sums: Sequence[float], counts: Sequence[int], confidence: float = CONFIDENCE
) -> tuple[float, Interval | None]:
    """Return the mean of a quantity a token, and its t-interval over blocks.

    Parameters
    ----------
    sums : sequence of float
        Of the quantity, by block.
    counts : sequence of int
        Tokens, by block.
    confidence : float

    Returns
    -------
    tuple
        The interval is None with fewer than two blocks.
    """
    blocks, tokens = len(sums), sum(counts)
    mean = math.fsum(sums) / tokens
    if blocks < 2:
        return mean, None
    spread = math.fsum((part - mean * count) ** 2 for part, count in zip(sums, counts, strict=True))
    half = t_quantile(confidence, blocks - 1) * math.sqrt(blocks / (blocks - 1) * spread) / tokens
    return mean, (mean - half, mean + half)


def wilson(successes: int, samples: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's interval for a proportion of independent samples."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / samples
    centre = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(share * (1 - share) / samples + (z / (2 * samples)) ** 2) / (1 + z * z / samples)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(gained: int, lost: int, samples: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval for the difference of two proportions over the same samples.

    Wald's interval after half an observation is added to each cell of the 2 x 2 table (Agresti & Min 2005, section 4).

    Parameters
    ----------
    gained, lost : int
        Samples that only the second, and only the first, got right.
    samples : int
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    b, c, n = gained + 0.5, lost + 0.5, samples + 2
    difference = (b - c) / n
    half = z * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    return max(-1.0, difference - half), min(1.0, difference + half)


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, Interval | None]:
    """Return the median of samples, and the narrowest interval between two of them that holds it with this confidence.

    Parameters
    ----------
    samples : sequence of float
        At least one; such as ratios of two times that were measured in turn.
    confidence : float

    Returns
    -------
    tuple
        The interval is None where even the smallest and the largest sample do not reach the confidence: below 6 samples
        at 95 %.
    """
    ordered, count = sorted(samples), len(samples)
    outside, rank = 0.0, 0
    while rank < count // 2:
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 1 - confidence:
            break
        rank += 1
    return median(ordered), (ordered[rank - 1], ordered[count - rank]) if rank else None
