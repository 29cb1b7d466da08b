"""Figures as they are read: each with its unit, its interval and its sample."""

import math
from typing import NamedTuple

from .logs import Ends, Half
from .statistics import Estimate, ShareChange

NONE = "-"


class Table(NamedTuple):
    """What a page and a review.md show alike. Rows are as long as the header; note stands below."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def sample(n: int, prompts: int) -> str:
    """250 pairs, or 250 pairs of 60 prompts."""
    return counted(n, "pair") if prompts == n else f"{counted(n, 'pair')} of {counted(prompts, 'prompt')}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def share(estimate: Estimate | None) -> str:
    """62.0 % (55.8 to 67.8; 250 pairs)"""
    return NONE if estimate is None else f"{100 * estimate.value:.1f} % ({spanned(estimate, 100, '.1f')})"


def points(estimate: Estimate | None) -> str:
    """+4.0 points (+0.1 to +7.8; 250 pairs)"""
    return NONE if estimate is None else f"{100 * estimate.value:+.1f} points ({spanned(estimate, 100, '+.1f')})"


def nats(estimate: Estimate | None, unit: str = "nats per token") -> str:
    """+0.120 nats per token (+0.020 to +0.220; 250 pairs)"""
    if estimate is None:
        return NONE
    digits = decimals(estimate)
    return f"{estimate.value:+.{digits}f} {unit} ({spanned(estimate, 1, f'+.{digits}f')})"


def factor(estimate: Estimate | None) -> str:
    """exp(-change): by how much perplexity grew."""
    if estimate is None:
        return NONE
    low, high = (exp(-bound) for bound in (estimate.high, estimate.low))
    return f"x {exp(-estimate.value):.3g} ({low:.3g} to {high:.3g}; {sample(estimate.n, estimate.prompts)})"


def exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def flips(change: ShareChange | None) -> str:
    """Which pairs turned right and which wrong."""
    if change is None:
        return NONE
    inflation = f"; e = {change.inflation:.2f}" if change.inflation > 1 else ""
    return (
        f"{change.gained:,} turned right, {change.lost:,} wrong, of {sample(change.change.n, change.change.prompts)}{inflation}"
    )


def spanned(estimate: Estimate, scale: float, form: str) -> str:
    if math.isinf(estimate.low) or math.isinf(estimate.high):
        return f"no interval: {sample(estimate.n, estimate.prompts)}"
    low, high = (format(scale * bound, form) for bound in (estimate.low, estimate.high))
    return f"{low} to {high}; {sample(estimate.n, estimate.prompts)}"


def decimals(estimate: Estimate) -> int:
    """So many that the interval's width shows."""
    width = estimate.high - estimate.low
    return min(6, max(3, 1 - math.floor(math.log10(width)))) if 0 < width < math.inf else 3


def probability(p: float) -> str:
    """p = 0.031, or p < 0.0001"""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.3g}"


def half(mean: Half | None, unit: str = "") -> str:
    return NONE if mean is None else f"{mean.mean:.4g}{unit} ({counted(mean.n, 'record')})"


def half_share(mean: Half | None) -> str:
    return NONE if mean is None else f"{100 * mean.mean:.1f} % ({counted(mean.n, 'record')})"


def ends(found: Ends | None, unit: str = "", scale: float = 1.0) -> str:
    """0.80 at step 0 -> 8.35 at step 120 (5 records)"""
    if found is None:
        return NONE
    first, last = (f"{scale * value:.4g}{unit}" for value in (found.first, found.last))
    if found.n == 1:
        return f"{last} at {found.counted_by} {found.last_step:g} (1 record)"
    start, end = (f"{found.counted_by} {step:g}" for step in (found.first_step, found.last_step))
    return f"{first} at {start} -> {last} at {end} ({counted(found.n, 'record')})"
