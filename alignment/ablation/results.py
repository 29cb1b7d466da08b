"""What finished cells show, read through the review: figures for the decisions, and which runs are not stable."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from scipy.stats import norm

from ..report.review.comparison import compare_cells, match
from ..report.review.conventions import DELTA, LEVEL
from ..report.review.logs import TRAIN
from ..report.review.reading import Reading, read_any_run
from ..report.review.signals import Signals
from ..report.review.statistics import Estimate
from ..report.review.verdict import COLLAPSING, Verdict, verdict_of
from .cells import Cell
from .decisions import Figures, Paired
from .outcomes import NOT_FINITE, Outcome

# Last quarter of the training loss over its first record, by half of that record's size, and of 0.1 for one near 0, which
# SimPER's, or a loss that began all but learned, may have. A convention: none of a run that learns comes near.
DIVERGED, LEAST = 0.5, 0.1


@dataclass(frozen=True)
class Result:
    """A cell that has finished."""

    cell: Cell
    reading: Reading
    signals: Signals
    verdict: Verdict
    held_out_loss: float | None

    @property
    def is_of_pairs(self) -> bool:
        return self.reading.held_out is not None

    @property
    def right(self) -> int:
        """Held-out pairs that the run's own reward has right."""
        return int((self.reading.held_out.after.margin > 0).sum())

    @property
    def gap(self) -> float | None:
        """Mean d of the training probe minus that of the held-out pairs, nats per token."""
        if self.reading.probe is None:
            return None
        return float(self.reading.probe.after.d.mean() - self.reading.held_out.after.d.mean())

    @property
    def train_margin(self) -> float | None:
        log = self.signals.log
        return log.late_margin.mean if log and log.late_margin else None


def read_result(cell: Cell) -> Result:
    reading = read_any_run(cell.run, cell.name)
    signals = reading.signals()
    evaluated = json.loads((cell.run / "eval_results.json").read_text(encoding="utf-8"))
    return Result(cell, reading, signals, verdict_of(signals), evaluated.get("eval_loss"))


# ---- Stability ----


def instability(outcome: Outcome, result: Result | None) -> str | None:
    """What is wrong with a run beyond its preferences; None where nothing is, or nothing is known."""
    if outcome.state == NOT_FINITE:
        return outcome.state
    if result is None:
        return None
    if COLLAPSING in (result.verdict.name, *result.verdict.flags):
        return "collapses"
    return "diverges" if has_diverged([value for _, value in losses(result.reading)]) else None


def losses(reading: Reading) -> Sequence[tuple[float, float]]:
    return reading.log.series(TRAIN, "loss") if reading.log else []


def has_diverged(loss: Sequence[float]) -> bool:
    """Whether the training loss ends far above where it began, by the mean of its last quarter."""
    last = loss[-max(len(loss) // 4, 1) :]
    return len(loss) > 1 and sum(last) / len(last) > loss[0] + DIVERGED * max(abs(loss[0]), LEAST)


# ---- Figures ----


def figures_of(value: str, results: Sequence[Result]) -> Figures:
    """results: of one value, a seed each."""
    return Figures(
        value,
        seeds=len(results),
        pairs=len(results[0].reading.held_out),
        right=mean([result.right for result in results]),
        gap=mean([result.gap for result in results]),
        train_margin=mean([result.train_margin for result in results]),
    )


def mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def paired(results: Sequence[Result], others: Sequence[Result]) -> Paired | None:
    """The change in accuracy, by own reward, from others to results, seeds averaged; None where they share no pair."""
    readings, before = [result.reading for result in results], [result.reading for result in others]
    together = [*readings, *before]
    if not all(match(one.held_out, other.held_out) for one, other in pairwise(together)):
        return None
    change = compare_cells(readings, before, by_reward=True)
    return Paired(change.value, change.low, change.high, change.n, power_of(change), min(len(results), len(others)))


def power_of(change: Estimate, delta: float = DELTA) -> float | None:
    """How often pairs like these would show a true change of delta, by the normal approximation of this interval.

    None where the interval has no width: what does not vary tells nothing of what would.
    """
    z = norm.ppf(0.5 + LEVEL / 2)
    se = (change.high - change.low) / (2 * z)
    return None if se == 0 else float(norm.sf(z - delta / se) + norm.cdf(-z - delta / se))


def by_value(axis: str, results: Mapping[str, Result], group: Sequence[Cell]) -> dict[str, list[Result]]:
    """The finished cells of a group by their value on an axis, in the group's order."""
    found: dict[str, list[Result]] = {}
    for cell in group:
        if cell.name in results and results[cell.name].is_of_pairs:
            found.setdefault(cell.values[axis], []).append(results[cell.name])
    return found
