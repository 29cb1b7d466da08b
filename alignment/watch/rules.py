"""When a run is warned of: pure functions of what it has logged and scored. Thresholds are conventions, as the review's are."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from ..report.review.conventions import COLLAPSE_NATS, DELTA
from ..report.review.pairs import Pairs
from ..report.review.statistics import Estimate, change_of_share, mean_of, share_of

SATURATED = 0.9  # of the probe's pairs are in the right order, at the lower end of the interval: 35 of 35, 240 of 256
# A gradient norm so many times the median of those logged before it. Norms of SimPO vary by a factor of three from batch to
# batch.
SPIKE, NORMS, FEWEST_NORMS = 10.0, 20, 10
# Records in a row, where only the log tells of the chosen responses: each has other pairs.
IN_A_ROW = 2


def fallen(pairs: Pairs) -> Estimate | None:
    """The change of the chosen mean log-probability, where its interval lies below -ln 2: each token half as likely."""
    if pairs.before is None:
        return None
    change = mean_of(pairs.after.chosen - pairs.before.chosen, pairs.prompts)
    return change if change.high < -COLLAPSE_NATS else None


def fallen_in_log(chosen: Sequence[float]) -> float | None:
    """The same of a training log, nats per token of each record, from the first one on; other pairs stand in each."""
    if len(chosen) <= IN_A_ROW:
        return None
    change = max(chosen[-IN_A_ROW:]) - chosen[0]
    return change if change < -COLLAPSE_NATS else None


class Still(NamedTuple):
    """Accuracies by the run's own reward, and how the held-out one changed since an earlier step."""

    probe: Estimate
    held_out: Estimate
    change: Estimate
    since: int


def stands_still(held_out: Pairs, probe: Pairs, earlier: Mapping[int, np.ndarray], step: int) -> Still | None:
    """Where all training can teach of these pairs is learned, and the held-out ones do not follow.

    The probe's accuracy is at least 90 %; the held-out one lies below it, the two intervals apart; and over the second half of
    the steps so far it did not rise by delta (3 points), which is the upper bound of its change from the last evaluation at or
    before half of them. All by 95 % intervals.

    earlier: step -> (n,) bool, which held-out pairs were right then, in the order of `held_out`.
    """
    since = max((each for each in earlier if each <= step / 2), default=None)
    if since is None:
        return None
    right, learned = right_ones(held_out), share_of(right_ones(probe), probe.prompts)
    now = share_of(right, held_out.prompts)
    if learned.low < SATURATED or now.high >= learned.low:
        return None
    change = change_of_share(earlier[since], right, held_out.prompts).change
    return Still(learned, now, change, since) if change.high < DELTA else None


def right_ones(pairs: Pairs) -> np.ndarray:
    """(n,) bool, by the run's own reward."""
    return pairs.after.margin > 0


def spike(norms: Sequence[float]) -> tuple[float, float] | None:
    """The last norm over the median of those before it, and that median; None for what is usual, or too new to know."""
    *before, last = [norm for norm in norms[-NORMS - 1 :] if math.isfinite(norm)] or [0.0]
    if len(before) < FEWEST_NORMS or (usual := median(before)) == 0 or last <= SPIKE * usual:
        return None
    return last / usual, usual
