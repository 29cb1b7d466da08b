"""The verdict: the first rule that holds, of signals alone. Every threshold is a convention (conventions.py)."""

import math
from dataclasses import dataclass

from .conventions import (
    COLLAPSE_NATS,
    DELTA,
    FEWEST_PROMPTS,
    FEWEST_REPLIES,
    LEAN_RANGE,
    ORDER_PER_DELTA,
    POWER_FACTOR,
    REPLY_RATIO_FALL,
    SATURATED_BELOW,
    STILL_NATS,
    TRAINING_SATURATED,
    accuracy_shift,
)
from .logs import LogSignals
from .signals import PairSignals, Replies, Signals
from .statistics import Estimate, ShareChange

COLLAPSING = "collapsing"
UNDER_TRAINED = "under-trained"
GENERALIZING = "generalizing"
OVER_OPTIMIZING = "over-optimizing"
INFLATING = "inflating"
WORSENING = "worsening"
NOT_DECIDABLE = "not decidable"
NO_VERDICT = "no verdict"
BY_ACCURACY = (GENERALIZING, OVER_OPTIMIZING, INFLATING, WORSENING)  # rules 3 to 6, in their order
MEMORIZING, SATURATED = "memorizing", "saturated"
SMALL, LENGTH = "by less than delta", "length not excluded"


@dataclass(frozen=True)
class Verdict:
    """name: the first rule that holds. qualifiers: of generalizing. flags: what else holds. missing: what would help.

    fresh_pairs: that would decide the accuracy's change with 80 % power. lean, with its qualifiers: by a finer measure, where
    no rule holds; it is never called a verdict.
    """

    name: str
    qualifiers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    fresh_pairs: int | None = None
    lean: str | None = None
    lean_qualifiers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.name, *self.qualifiers])


def verdict_of(signals: Signals, delta: float = DELTA) -> Verdict:
    """delta: the change of accuracy that matters."""
    held_out = signals.held_out
    seen = log_flags(signals.log, delta) if signals.log else ()
    if held_out is None:
        return Verdict(NOT_DECIDABLE, flags=seen, missing=("held-out pairs, scored before the first step and after the last",))
    if held_out.prompts < FEWEST_PROMPTS:
        missing = f"{FEWEST_PROMPTS} held-out prompts at least; there are {held_out.prompts}"
        return Verdict(NO_VERDICT, flags=seen, missing=(missing,))
    is_saturated = held_out.accuracy_before is not None and held_out.accuracy_before.value > 1 - SATURATED_BELOW * delta
    holding = [name for name, holds in (
        (COLLAPSING, is_collapsing(held_out, signals.replies)),
        (UNDER_TRAINED, is_under_trained(signals, delta)),
    ) if holds]  # fmt: skip
    change = held_out.accuracy_change and held_out.accuracy_change.change
    holding += by_accuracy(signals, change, delta, delta, is_saturated=is_saturated)
    flags = [
        *holding[1:],
        *([MEMORIZING] if is_memorizing(signals, delta) else []),
        *([SATURATED] if is_saturated else []),
        *seen,
    ]
    if holding:
        qualifiers = qualifiers_of(held_out, change, delta) if holding[0] == GENERALIZING else ()
        return Verdict(holding[0], qualifiers, tuple(flags))
    fresh = held_out.accuracy_change and fresh_pairs(held_out.accuracy_change, held_out.n, delta)
    lean, lean_qualifiers = leaning(signals, delta)
    return Verdict(NOT_DECIDABLE, (), tuple(flags), missing_of(signals, delta), fresh, lean, lean_qualifiers)


# ---- The rules ----


def is_collapsing(held_out: PairSignals, replies: Replies | None) -> bool:
    """Each chosen token half as likely, or replies that repeat themselves."""
    fell = held_out.chosen_change is not None and held_out.chosen_change.high < -COLLAPSE_NATS
    ratio = replies and replies.ratio_change
    return fell or (ratio is not None and ratio.n >= FEWEST_REPLIES and ratio.high < -REPLY_RATIO_FALL)


def is_under_trained(signals: Signals, delta: float) -> bool:
    """Nothing moved, on held-out pairs or on the probe."""
    held_out, probe = signals.held_out, signals.probe
    if held_out.d_change is None or probe is None or probe.d_change is None:
        return False
    h = accuracy_shift(delta, held_out.spread)
    return within(held_out.d_change, h) and within(probe.d_change, h) and within(held_out.chosen_change, STILL_NATS)


def is_memorizing(signals: Signals, delta: float) -> bool:
    """The probe moved by what matters, and held-out pairs by less than half of it."""
    probe, gap = signals.probe, signals.gap
    if gap is None or signals.is_chosen_step:
        return False
    return probe.d_change.low > accuracy_shift(delta, signals.held_out.spread) and gap.high < 0


def by_accuracy(signals: Signals, change: Estimate | None, limit: float, delta: float, *, is_saturated: bool) -> list[str]:
    """Those of rules 3 to 6 that hold, in their order, for a change of accuracy or of a finer measure, limit its delta.

    None do for records of a step that was chosen on these pairs.
    """
    held_out = signals.held_out
    if change is None or signals.is_chosen_step:
        return []
    grew, h = held_out.d_change, accuracy_shift(delta, held_out.spread)
    rules = {
        GENERALIZING: change.low > 0 and grew.low > 0,
        OVER_OPTIMIZING: is_memorizing(signals, delta) and change.high < limit and not is_saturated,
        INFLATING: grew.low > h and change.high < limit and not is_saturated,
        WORSENING: change.high < 0,
    }
    return [name for name in BY_ACCURACY if rules[name]]


def qualifiers_of(held_out: PairSignals, change: Estimate, limit: float) -> tuple[str, ...]:
    matched = held_out.matched.change
    excluded = matched is not None and matched.low > 0
    return (*([SMALL] if change.high < limit else []), *([] if excluded else [LENGTH]))


def leaning(signals: Signals, delta: float) -> tuple[str | None, tuple[str, ...]]:
    """The first of rules 3 to 6 that holds by M's change, where accuracy at step 0 is neither very low nor very high."""
    held_out = signals.held_out
    low, high = LEAN_RANGE
    if held_out.order_change is None or not low <= held_out.accuracy_before.value <= high:
        return None, ()
    limit = ORDER_PER_DELTA * delta
    holding = by_accuracy(signals, held_out.order_change, limit, delta, is_saturated=False)
    if not holding:
        return None, ()
    return holding[0], qualifiers_of(held_out, held_out.order_change, limit) if holding[0] == GENERALIZING else ()


def within(estimate: Estimate, limit: float) -> bool:
    return -limit < estimate.low and estimate.high < limit


# ---- What is missing ----


def fresh_pairs(change: ShareChange, n: int, delta: float) -> int:
    """Fresh held-out pairs that would decide D with 80 % power; four times as many where these were that many already."""
    needed = POWER_FACTOR * change.inflation * (change.gained + change.lost + 2) / ((n + 2) * delta**2)
    return math.ceil(4 * needed if needed <= n else needed)


def missing_of(signals: Signals, delta: float) -> tuple[str, ...]:
    held_out, probe = signals.held_out, signals.probe
    if held_out.accuracy_change is None:
        return ("the held-out pairs' scores before the first step (score_step_0)",)
    found = []
    if signals.is_chosen_step:
        found.append(
            "records of the last step: these are of a checkpoint that was chosen on these pairs (load_best_model_at_end)"
        )
    if probe is None or probe.d_change is None:
        found.append(
            "the training probe's pairs before and after (train_probe): without them no run is under-trained or over-optimizing"
        )
    change = held_out.accuracy_change.change
    if change.low <= 0 and change.high >= delta:
        found.append(
            f"held-out pairs: accuracy changed by {100 * change.low:+.1f} to {100 * change.high:+.1f} points, which may be "
            f"nothing and may be {100 * delta:g} points"
        )
    elif change.high < delta:
        found.append("a sign that margins moved by more than h: accuracy did not rise by what matters, and nothing says why")
    else:
        found.append("a rise of d on held-out pairs: accuracy rose, and the mean of d is not shown to have")
    return tuple(found)


# ---- Bare logs: figures without intervals, so flags and no more ----


def log_flags(log: LogSignals, delta: float) -> tuple[str, ...]:
    """What stands out in a log. Steps of the log are compared by eye here: no interval, no verdict."""
    flags = []
    grew = log.early_margin and log.late_margin and log.late_margin.mean > log.early_margin.mean
    if grew and log.held_out_margin and log.held_out_margin.n > 1 and log.held_out_margin.change <= 0:
        flags.append("training margin grew, held-out margin did not")
    if grew and log.held_out_accuracy and log.held_out_accuracy.n > 1 and log.held_out_accuracy.change <= 0:
        flags.append("training margin grew, held-out accuracy did not")
    if grew and log.early_chosen and log.late_chosen.mean < log.early_chosen.mean:
        flags.append("chosen rewards fell while the margin grew (some of that is normal for SimPO)")
    if log.late_accuracy and log.late_accuracy.mean >= TRAINING_SATURATED:
        behind = log.held_out_accuracy and log.late_accuracy.mean - log.held_out_accuracy.last > delta
        if behind:
            flags.append("training accuracy is saturated, held-out accuracy is not")
    if log.not_finite:
        flags.append(f"{log.not_finite} logged values are not finite")
    return tuple(flags)
