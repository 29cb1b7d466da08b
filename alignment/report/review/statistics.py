"""Estimates with their 95 % intervals. Prompts are the unit: pairs of one prompt are not independent.

Distributions are scipy's; scipy has no clustered or paired intervals of shares, so those are written out here, and
benchmarks/review_coverage.py measures what they cover.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from .conventions import LENGTH_EDGES, LEVEL

Z = float(ndtri(0.5 + LEVEL / 2))


class Estimate(NamedTuple):
    """A figure with its interval; p of its null hypothesis (0, or one half for a share) from inverting that interval."""

    value: float
    low: float
    high: float
    p: float
    n: int  # pairs
    prompts: int
    se: float = math.nan
    df: float = math.inf


class ShareChange(NamedTuple):
    """How a share changed: gained (b) pairs turned right, lost (c) turned wrong; inflation (e) is what prompts cost."""

    change: Estimate
    gained: int
    lost: int
    inflation: float


def number_of(prompts: np.ndarray) -> int:
    return int((np.bincount(prompts) > 0).sum())


def variance_of_mean(values: np.ndarray, prompts: np.ndarray) -> tuple[float, int, float]:
    """Of the mean of n values: variance from the sums within prompts, the number of prompts, and e.

    prompts: (n,) int, from 0, which prompt each value belongs to. e = max(1, variance from prompt sums / variance from
    pairs), by how much n overstates the evidence. Where no prompt repeats, the variance is the usual one and e is 1; where
    no value differs, nothing tells prompts from pairs, and only prompts are taken to count: e = n / prompts.
    """
    n = len(values)
    residuals = values - values.mean()
    from_pairs = residuals @ residuals / (n * max(n - 1, 1))
    count = number_of(prompts)
    if count == n:
        return from_pairs, count, 1.0
    sums = np.bincount(prompts, weights=residuals)
    from_sums = count / max(count - 1, 1) * (sums @ sums) / n**2
    return from_sums, count, max(1.0, from_sums / from_pairs) if from_pairs > 0 else n / count


def critical(df: float) -> float:
    """Half the width of an interval in standard errors; z for df = inf."""
    return Z if math.isinf(df) else float(stdtrit(df, 0.5 + LEVEL / 2))


def p_of(statistic: float, df: float) -> float:
    """Two-sided."""
    if math.isnan(statistic):
        return 1.0
    return float(2 * (ndtr(-abs(statistic)) if math.isinf(df) else stdtr(df, -abs(statistic))))


def ratio(value: float, se: float) -> float:
    """value / se, where both may be 0: nothing moved, so nothing is shown."""
    return 0.0 if value == 0 else math.inf if se == 0 else value / se


def around(value: float, se: float, df: float, n: int, prompts: int) -> Estimate:
    """value with t's interval. One prompt tells nothing of others: then it is unbounded."""
    if df < 1:
        return Estimate(value, -math.inf, math.inf, 1.0, n, prompts, math.nan, df)
    half = critical(df) * se
    return Estimate(value, value - half, value + half, p_of(ratio(value, se), df), n, prompts, se, df)


def mean_of(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Mean of (n,) values, with t of prompts - 1 degrees of freedom."""
    variance, count, _ = variance_of_mean(values, prompts)
    return around(float(values.mean()), math.sqrt(variance), count - 1, len(values), count)


def share_of(hits: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Share of (n,) bool, with Wilson's interval of n / e pairs; p against one half.

    z where no prompt repeats (scipy's binomtest(...).proportion_ci(method="wilson")), else t of prompts - 1 degrees of freedom.
    """
    n, share = len(hits), float(hits.mean())
    _, count, inflation = variance_of_mean(hits.astype(float), prompts)
    df = math.inf if count == n else count - 1
    if df < 1:
        return Estimate(share, 0.0, 1.0, 1.0, n, count, math.nan, df)
    return Estimate(share, *wilson(share, n / inflation, df), n, count, math.nan, df)


def wilson(share: float, n: float, df: float = math.inf) -> tuple[float, float, float]:
    """Low, high, and p of one half, of a share of n observations (Wilson 1927); n need not be whole."""
    z = critical(df)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half), p_of((share - 0.5) / math.sqrt(0.25 / n), df)


def change_of_share(before: np.ndarray, after: np.ndarray, prompts: np.ndarray) -> ShareChange:
    """How a share changed between two looks at the same pairs, (n,) bool each, by Bonett and Price (2012).

    b and c flips of n: p = (b + 1) / (n + 2), q = (c + 1) / (n + 2), interval p - q +- z sqrt((p + q - (p - q)^2) / (n + 2)).
    Where prompts repeat, b, c and n are divided by e and t of prompts - 1 degrees of freedom takes z's place.
    """
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    flips = after.astype(float) - before
    _, count, inflation = variance_of_mean(flips, prompts)
    df = math.inf if count == n else count - 1
    value = (gained - lost) / n
    if df < 1:
        return ShareChange(Estimate(value, -1.0, 1.0, 1.0, n, count, math.nan, df), gained, lost, inflation)
    low, high, p = bonett_price(gained / inflation, lost / inflation, n / inflation, df)
    return ShareChange(Estimate(value, low, high, p, n, count, math.nan, df), gained, lost, inflation)


def bonett_price(b: float, c: float, n: float, df: float = math.inf) -> tuple[float, float, float]:
    """Low, high, and p of no change, of (b - c) / n; the counts need not be whole."""
    p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
    se = math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    half = critical(df) * se
    return max(-1.0, p - q - half), min(1.0, p - q + half), p_of(ratio(p - q, se), df)


def difference(first: Estimate, second: Estimate, weight: float = 1.0) -> Estimate:
    """first - weight x second, of independent samples (Welch)."""
    variances = (first.se**2, (weight * second.se) ** 2)
    total = sum(variances)
    parts = sum(variance**2 / df for variance, df in zip(variances, (first.df, second.df), strict=True) if df >= 1)
    df = total**2 / parts if parts > 0 else min(first.df, second.df)
    if min(first.df, second.df) < 1:
        df = 0.0
    return around(first.value - weight * second.value, math.sqrt(total), df, first.n, first.prompts)


# ---- A finer measure of order than a share ----


def order_of(d: np.ndarray) -> tuple[float, np.ndarray]:
    """M = probit(W) / sqrt(2), and its influence values (n,), where W is the share of couples i, j with d_i + d_j > 0.

    Of a normal d, M is its mean over its standard deviation. W is kept half a couple away from 0 and 1, where M is infinite.
    """
    n = len(d)
    above = n - np.searchsorted(np.sort(d), -d, side="right")  # how many j, i itself among them, have d_j > -d_i
    shares = (above - (d > 0)) / (n - 1)
    rim = 1 / (n * (n - 1))
    share = min(max(float(shares.mean()), rim), 1 - rim)
    probit = float(ndtri(share))
    density = math.exp(-(probit**2) / 2) / math.sqrt(2 * math.pi)
    return probit / math.sqrt(2), 2 * (shares - share) / (math.sqrt(2) * density)


def change_of_order(before: np.ndarray, after: np.ndarray, prompts: np.ndarray) -> Estimate:
    """The change of M between two looks at the same pairs; in standard deviations of d."""
    (old, old_influence), (new, new_influence) = order_of(before), order_of(after)
    variance, count, _ = variance_of_mean(new_influence - old_influence, prompts)
    return around(new - old, math.sqrt(variance), count - 1, len(before), count)


# ---- Length ----


class Matched(NamedTuple):
    """The length-matched change, where there are pairs to tell it by: `pairs` on the thinner sides of all bins."""

    change: Estimate | None
    pairs: int


def length_matched(change: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, prompts: np.ndarray) -> Matched:
    """The mean change of d that length cannot explain: (n,) changes, tokens of either response, prompts.

    Pairs are binned by |log(chosen / rejected length)|. In a bin, half the sum of the mean change where chosen is longer and
    where it is shorter: what a model gained by preferring length of either kind has opposite signs there. Bins are weighed by
    n+ n- / (n+ + n-). Equally long pairs belong half to each side. A side of one pair says nothing of its spread: no weight.
    """
    log_ratio = np.log(chosen / rejected)
    bins = np.searchsorted(LENGTH_EDGES, np.abs(log_ratio), side="right")
    halves = np.stack([np.where(log_ratio == 0, 0.5, log_ratio > 0), np.where(log_ratio == 0, 0.5, log_ratio < 0)])  # (2, n)
    parts: list[tuple[float, float, np.ndarray]] = []
    thinner, used = 0.0, np.zeros(len(change), dtype=bool)
    for number in range(len(LENGTH_EDGES) + 1):
        sides = halves * (bins == number)
        sizes = sides.sum(1)
        thinner += sizes.min()
        if sizes.min() <= 1:
            continue
        means = sides @ change / sizes
        # A mean takes up one residual of its n: the others are scaled to make up for it.
        influence = sum(
            side * (change - mean) / size * math.sqrt(size / (size - 1))
            for side, mean, size in zip(sides, means, sizes, strict=True)
        )
        parts.append((sizes.prod() / sizes.sum(), means.mean(), influence / 2))
        used |= bins == number
    if not parts:
        return Matched(None, int(thinner))
    total = sum(weight for weight, _, _ in parts)
    value = sum(weight * mean for weight, mean, _ in parts) / total
    influence = sum(weight * residuals for weight, _, residuals in parts) / total
    sums = np.bincount(prompts[used], weights=influence[used])
    count = number_of(prompts[used])
    scale = count / max(count - 1, 1) if count < used.sum() else 1.0
    estimate = around(float(value), math.sqrt(scale * (sums @ sums)), count - 1, int(used.sum()), count)
    return Matched(estimate, int(thinner))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979); scipy has Benjamini and Hochberg's only, which allow for more errors."""
    order = np.argsort(p)
    adjusted = np.minimum(1.0, np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order)].tolist()
