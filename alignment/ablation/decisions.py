"""What an experiment decides, by rules that are spelled out beside every decision. Pure functions of figures.

Figures are means over the seeds of a cell; d is chosen minus rejected mean log-probability per token, in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PAIRS_MORE = 1.0  # held-out pairs that a challenger has to get right beyond the incumbent

OBJECTIVE_RULE = (
    "Change from the first named only if the challenger gets at least one more held-out pair right, by its own reward, and has "
    "the cleaner margins: a smaller gap between training probe and held-out pairs, in d. Means over seeds."
)
RANK_RULE = (
    "Take the lower rank if it is as good on held-out pairs (the paired interval of the change in accuracy does not lie wholly "
    "below 0) and its training margin is lower. Means over seeds."
)
MOST_RULE = (
    "Take the value that gets the most held-out pairs right, by its own reward; the first named, where they are equal. Means "
    "over seeds."
)
FALLBACK_RULE = "Where a run of another objective is not finite, diverges or collapses, the fallback is run and named."


@dataclass(frozen=True)
class Figures:
    """One value of an axis, the others being equal: means over its seeds that finished."""

    value: str
    seeds: int
    pairs: int  # held-out
    right: float  # of them, by the run's own reward
    gap: float | None  # mean d of the training probe minus that of the held-out pairs, nats per token
    train_margin: float | None  # mean of the second half of the log, in the run's own rewards


@dataclass(frozen=True)
class Paired:
    """The change in held-out accuracy from one value to another, pair by pair, with its 95 % interval."""

    change: float
    low: float
    high: float
    pairs: int
    power: float | None  # of finding a true change of 3 points with these pairs and seeds
    seeds: int

    def __str__(self) -> str:
        change, low, high = (100 * share for share in (self.change, self.low, self.high))
        seeds = "single seeds, whose spread is not known" if self.seeds == 1 else f"means of {self.seeds} seeds"
        chance = "chance may do as much" if self.low <= 0 <= self.high else "more than chance does"
        power = "" if self.power is None else f"; a true change of 3 points is found in {self.power:.0%} of such experiments"
        return (
            f"{change:+.1f} points of accuracy by own reward (95 % interval {low:+.1f} to {high:+.1f}, {self.pairs} held-out "
            f"pairs, {seeds}): {chance}{power}"
        )


@dataclass(frozen=True)
class Decision:
    """What is taken, by which rule, on which figures, and what chance has to say about it."""

    question: str
    taken: str | None
    rule: str
    because: str
    chance: str = ""


def describe(figures: Figures) -> str:
    gap = "gap unknown" if figures.gap is None else f"gap {figures.gap:+.4f} nats per token"
    return f"{figures.value}: {figures.right:g} of {figures.pairs} right, {gap}"


def decide_objective(question: str, candidates: Sequence[Figures], paired: Mapping[str, Paired]) -> Decision:
    """candidates: the incumbent first. paired: each challenger's change from it, by the challenger's name."""
    incumbent, *challengers = candidates
    fit = [each for each in challengers if is_more_right(each, incumbent) and is_cleaner(each, incumbent)]
    taken = max(fit, key=lambda each: each.right, default=incumbent)
    because = "; ".join(describe(each) for each in candidates)
    if not fit and challengers:
        because += ". " + "; ".join(f"{each.value}: {shortfall(each, incumbent)}" for each in challengers)
    return Decision(question, taken.value, OBJECTIVE_RULE, because, against(incumbent, challengers, paired))


def is_more_right(challenger: Figures, incumbent: Figures) -> bool:
    return challenger.right - incumbent.right >= PAIRS_MORE


def is_cleaner(challenger: Figures, incumbent: Figures) -> bool:
    return challenger.gap is not None and incumbent.gap is not None and challenger.gap < incumbent.gap


def shortfall(challenger: Figures, incumbent: Figures) -> str:
    """What a challenger lacks."""
    lacks = [] if is_more_right(challenger, incumbent) else [f"not one more pair right than {incumbent.value}"]
    if not is_cleaner(challenger, incumbent):
        unknown = challenger.gap is None or incumbent.gap is None
        lacks.append("whether its margins are cleaner is not known" if unknown else "its margins are not cleaner")
    return " and ".join(lacks)


def decide_rank(question: str, ranks: Sequence[Figures], paired: Mapping[tuple[str, str], Paired]) -> Decision:
    """ranks: the lowest first. paired: the change from a higher to a lower rank, by (higher, lower)."""
    taken, reasons, chances = ranks[-1], [], []
    for lower in reversed(ranks[:-1]):
        change = paired.get((taken.value, lower.value))
        if change is None:
            reasons.append(f"{lower.value} shares no held-out pair with {taken.value}")
            continue
        as_good = change.high >= 0
        calmer = None not in (lower.train_margin, taken.train_margin) and lower.train_margin < taken.train_margin
        chances.append(f"{lower.value} against {taken.value}: {change}")
        margins = f"{number(lower.train_margin)} against {number(taken.train_margin)}"
        reasons.append(
            f"{lower.value} is {'as good as' if as_good else 'worse than'} {taken.value} on held-out pairs, and its training "
            f"margin is {'lower' if calmer else 'not lower'} ({margins})"
        )
        if as_good and calmer:
            taken = lower
    return Decision(question, taken.value, RANK_RULE, "; ".join(reasons), "; ".join(chances))


def number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def decide_most(question: str, candidates: Sequence[Figures], paired: Mapping[str, Paired]) -> Decision:
    """candidates: in the order of the axis. paired: each other's change from the first, by name."""
    taken = max(candidates, key=lambda each: each.right)  # of equal ones the first
    because = "; ".join(f"{each.value}: {each.right:g} of {each.pairs} right" for each in candidates)
    return Decision(question, taken.value, MOST_RULE, because, against(candidates[0], candidates[1:], paired))


def against(incumbent: Figures, others: Sequence[Figures], paired: Mapping[str, Paired]) -> str:
    told = [f"{each.value} against {incumbent.value}: {paired[each.value]}" for each in others if each.value in paired]
    return "; ".join(told)


def decide_fallback(question: str, fallback: str, unstable: Mapping[str, str], fallback_is_stable: bool | None) -> Decision:
    """unstable: cells of other objectives, with what happened to them. fallback_is_stable: None, if it has not finished."""
    told = "; ".join(f"{name}: {what}" for name, what in unstable.items())
    if fallback_is_stable is None:
        return Decision(question, None, FALLBACK_RULE, f"{told}. {fallback} has not finished")
    if not fallback_is_stable:
        return Decision(question, None, FALLBACK_RULE, f"{told}. {fallback} is not stable either")
    return Decision(question, fallback, FALLBACK_RULE, f"{told}. {fallback} is stable")
