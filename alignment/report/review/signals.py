"""What the records of a run say of it, as figures with intervals; nothing is judged here.

d is the chosen minus the rejected mean log-probability per token, whatever the objective. It is compared between step 0 and
the last step, never with a step chosen on the same pairs: the best of ten evaluations makes 11 % of null runs "generalize".
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # scipy.stats is read when it is used: it takes half a second, and every run reads this file
from scipy.special import expit

from .conventions import FEWEST_MATCHED, REPLY_BYTES, SAME_LENGTH
from .logs import LogSignals
from .pairs import Pairs, Scores
from .statistics import (
    Estimate,
    Matched,
    ShareChange,
    change_of_order,
    change_of_share,
    difference,
    length_matched,
    mean_of,
    number_of,
    share_of,
)


@dataclass(frozen=True)
class LengthGroup:
    """Accuracy of the pairs whose chosen response is longer, shorter or as long, before and after."""

    name: str
    before: Estimate | None
    after: Estimate


@dataclass(frozen=True)
class Lengths:
    """What length has to do with it. `longer_wins`: accuracy of preferring whichever is longer (equal ones count half)."""

    groups: tuple[LengthGroup, ...]
    longer_wins: float
    shorter_wins: float
    rank_before: float | None  # Spearman, of chosen - rejected tokens and d; None where one of the two does not vary
    rank_after: float | None


@dataclass(frozen=True)
class OwnReward:
    """The run's own measure. Log-ratios are 0 at step 0: then there is no change, and accuracy is held against one half."""

    accuracy: Estimate
    change: ShareChange | None
    margin: Estimate  # mean, in units of reward


@dataclass(frozen=True)
class Saturation:
    """What -log sigmoid(margin - gamma) has left to pull at, before and after."""

    beyond: Estimate  # share of pairs with margin > gamma
    gradient_before: float | None  # mean sigmoid(gamma - margin)
    gradient_after: float


@dataclass(frozen=True)
class PairSignals:
    """What one set of pairs says; nats per token. What needs step 0 is None without it."""

    n: int
    prompts: int
    truncated: int
    accuracy_after: Estimate
    own: OwnReward
    saturation: Saturation | None
    matched: Matched  # the length-matched change of d
    accuracy_before: Estimate | None = None
    accuracy_change: ShareChange | None = None  # D
    d_change: Estimate | None = None  # H on held-out pairs, P on the probe
    chosen_change: Estimate | None = None  # C
    rejected_change: Estimate | None = None
    chosen_fell: Estimate | None = None  # share of pairs
    spread: float | None = None  # s: standard deviation of d at step 0
    order_change: Estimate | None = None  # of M


@dataclass(frozen=True)
class Replies:
    """Sampled replies to the same prompts before and after."""

    length_before: float  # mean, in `unit`
    length_after: float
    unit: str
    n: int
    ratio_change: Estimate | None  # of the zlib ratio, both cut to one length; None where none is long enough


@dataclass(frozen=True)
class Signals:
    """All that a verdict is made of."""

    held_out: PairSignals | None = None
    probe: PairSignals | None = None
    gap: Estimate | None = None  # K = H - P / 2
    replies: Replies | None = None
    log: LogSignals | None = None
    is_chosen_step: bool = False  # the last records are of a checkpoint that was chosen on these pairs


def signals_of(
    held_out: Pairs | None,
    probe: Pairs | None = None,
    *,
    gamma: float | None = None,
    replies: Replies | None = None,
    log: LogSignals | None = None,
    is_chosen_step: bool = False,
) -> Signals:
    """gamma: the margin that the loss asks for, in units of reward; None where the loss is no sigmoid of the reward margin."""
    seen, probed = held_out and pair_signals(held_out, gamma), probe and pair_signals(probe, gamma)
    gap = None
    if seen and probed and seen.d_change and probed.d_change:
        gap = difference(seen.d_change, probed.d_change, weight=0.5)
    return Signals(seen, probed, gap, replies, log, is_chosen_step)


def pair_signals(pairs: Pairs, gamma: float | None = None) -> PairSignals:
    after, before, prompts = pairs.after, pairs.before, pairs.prompts
    shared = {
        "n": len(pairs),
        "prompts": number_of(prompts),
        "truncated": 0 if pairs.truncated is None else int(pairs.truncated.sum()),
        "accuracy_after": share_of(after.d > 0, prompts),
        "own": own_reward(pairs),
        "saturation": None if gamma is None else saturation(pairs, gamma),
        "matched": matched_of(pairs),
    }
    if before is None:
        return PairSignals(**shared)
    chosen_change = after.chosen - before.chosen
    return PairSignals(
        **shared,
        accuracy_before=share_of(before.d > 0, prompts),
        accuracy_change=change_of_share(before.d > 0, after.d > 0, prompts),
        d_change=mean_of(after.d - before.d, prompts),
        chosen_change=mean_of(chosen_change, prompts),
        rejected_change=mean_of(after.rejected - before.rejected, prompts),
        chosen_fell=share_of(chosen_change < 0, prompts),
        spread=float(before.d.std(ddof=1)) if len(pairs) > 1 else 0.0,
        order_change=change_of_order(before.d, after.d, prompts) if len(pairs) > 1 else None,
    )


def own_reward(pairs: Pairs) -> OwnReward:
    right, prompts = pairs.after.margin > 0, pairs.prompts
    change = None
    if pairs.before is not None and not pairs.has_reference:
        change = change_of_share(pairs.before.margin > 0, right, prompts)
    return OwnReward(share_of(right, prompts), change, mean_of(pairs.after.margin, prompts))


def saturation(pairs: Pairs, gamma: float) -> Saturation:
    def left(scores: Scores) -> float:
        return float(expit(gamma - scores.margin).mean())

    beyond = share_of(pairs.after.margin > gamma, pairs.prompts)
    return Saturation(beyond, pairs.before and left(pairs.before), left(pairs.after))


def matched_of(pairs: Pairs) -> Matched:
    """The length-matched change of d, if there are enough pairs to tell it by."""
    change = np.zeros(len(pairs)) if pairs.before is None else pairs.after.d - pairs.before.d
    found = length_matched(change, pairs.chosen_tokens, pairs.rejected_tokens, pairs.prompts)
    return found if pairs.before is not None and found.pairs >= FEWEST_MATCHED else Matched(None, found.pairs)


def lengths_of(pairs: Pairs) -> Lengths:
    """For a reader; no verdict depends on it."""
    chosen, rejected = pairs.chosen_tokens, pairs.rejected_tokens
    log_ratio = np.log(chosen / rejected)
    groups = (
        ("chosen longer", log_ratio > SAME_LENGTH),
        ("chosen shorter", log_ratio < -SAME_LENGTH),
        ("within 10 %", np.abs(log_ratio) <= SAME_LENGTH),
    )
    found = []
    for name, members in groups:
        if members.any():
            of_group = pairs.take(np.flatnonzero(members))
            before = of_group.before and share_of(of_group.before.d > 0, of_group.prompts)
            found.append(LengthGroup(name, before, share_of(of_group.after.d > 0, of_group.prompts)))
    ties = (chosen == rejected).mean() / 2
    return Lengths(
        groups=tuple(found),
        longer_wins=float((chosen > rejected).mean() + ties),
        shorter_wins=float((chosen < rejected).mean() + ties),
        rank_before=pairs.before and rank_correlation(chosen - rejected, pairs.before.d),
        rank_after=rank_correlation(chosen - rejected, pairs.after.d),
    )


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(scipy.stats.spearmanr(first, second).statistic)


def replies_of(
    before: Sequence[str], after: Sequence[str], tokens: tuple[Sequence[int], Sequence[int]] | None
) -> Replies | None:
    """Replies to the same prompts, in one order, a prompt each; tokens of each, where they were recorded (else characters).

    A text that repeats itself compresses further. Both of a pair are cut to the shorter one's bytes, since the ratio falls with
    length; pairs of fewer than 200 bytes are left out.
    """
    if not before:
        return None
    lengths = tokens or ([len(text) for text in before], [len(text) for text in after])
    changes = []
    for old, new in zip(before, after, strict=True):
        first, second = (text.encode(errors="backslashreplace") for text in (old, new))
        size = min(len(first), len(second))
        if size >= REPLY_BYTES:
            changes.append(zlib_ratio(second[:size]) - zlib_ratio(first[:size]))
    change = mean_of(np.array(changes), np.arange(len(changes))) if changes else None
    means = [float(np.mean(length)) for length in lengths]
    return Replies(*means, "tokens" if tokens else "characters", len(before), change)


def zlib_ratio(text: bytes) -> float:
    return len(zlib.compress(text, 9)) / len(text)
