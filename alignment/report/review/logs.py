"""Logs with preference metrics, read as they are: of this suite, TRL, axolotl, LLaMA-Factory and the published code."""

import ast
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError

MARGIN, ACCURACY, CHOSEN, REJECTED = "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"
# Spellings, with / - and blanks as _. The first is also known behind the name of one of several held-out sets.
METRICS = {
    MARGIN: ("rewards_margins", "rewards_margin", "reward_margins", "reward_margin", "margins", "margin"),
    ACCURACY: (
        "rewards_accuracies", "rewards_accuracy", "reward_accuracies", "reward_accuracy", "accuracies", "accuracy",
    ),
    CHOSEN: ("rewards_chosen", "reward_chosen", "chosen_rewards", "chosen_reward"),
    REJECTED: ("rewards_rejected", "reward_rejected", "rejected_rewards", "rejected_reward"),
    "logps/chosen": ("logps_chosen", "chosen_logps"),
    "logps/rejected": ("logps_rejected", "rejected_logps"),
    "loss": ("loss",),
}  # fmt: skip
SPELLINGS = {spelling: metric for metric, spellings in METRICS.items() for spelling in spellings}
NAMED_SETS = re.compile(rf"(.+)_({'|'.join(spellings[0] for spellings in METRICS.values() if '_' in spellings[0])})")
PREFIX = re.compile(r"(train|eval|valid|validation|val|test|probe)_")
STEPS = ("step", "current_steps", "global_step", "train/global_step", "_step", "steps", "iteration")
TRAIN, EVAL, PROBE = "train", "eval", "probe"


class LogRecord(NamedTuple):
    """What one line says of one set of pairs. split: train, probe, eval, or eval and the name of one of several."""

    step: float | None
    split: str
    values: dict[str, float]

    def has_preferences(self) -> bool:
        """Whether it says more than a loss."""
        return bool(set(self.values) - {"loss"})


class Log(NamedTuple):
    """The records of a log in its order; what could not be read is counted."""

    records: tuple[LogRecord, ...]
    malformed: int = 0  # lines that are no record
    not_finite: int = 0  # values that are NaN or infinite, left out

    def series(self, split: str, metric: str) -> list[tuple[float, float]]:
        """(step, value) of every record that has the metric; its place among them, where steps were not logged.

        Of a step that was logged twice, by a run that was resumed before it, the last record.
        """
        found = [
            (record.step, record.values[metric]) for record in self.records if record.split == split and metric in record.values
        ]
        return (
            list(dict(found).items()) if self.has_steps else [(place, value) for place, (_, value) in enumerate(found, start=1)]
        )

    @property
    def has_steps(self) -> bool:
        return all(record.step is not None for record in self.records)

    @property
    def held_out(self) -> str:
        """The split that held-out figures are of: of several the first that has more than a loss."""
        found = [record for record in self.records if record.split.startswith(EVAL)]
        return next((record.split for record in [*filter(LogRecord.has_preferences, found), *found]), EVAL)

    @property
    def has_preferences(self) -> bool:
        return any(map(LogRecord.has_preferences, self.records))


class Half(NamedTuple):
    """A mean over n records of the log."""

    mean: float
    n: int


class Ends(NamedTuple):
    """The first and the last record of a figure, and their steps."""

    first: float
    first_step: float
    last: float
    last_step: float
    n: int
    counted_by: str  # step, or record where no steps were logged

    @property
    def change(self) -> float:
        return self.last - self.first


class LogSignals(NamedTuple):
    """What a bare log can give: figures without intervals. Rewards in the run's own units."""

    early_margin: Half | None  # first half of the training records
    late_margin: Half | None  # second half
    early_chosen: Half | None
    late_chosen: Half | None
    late_rejected: Half | None
    late_accuracy: Half | None
    held_out_margin: Ends | None
    held_out_accuracy: Ends | None
    probe_margin: Ends | None
    probe_accuracy: Ends | None
    malformed: int
    not_finite: int


def read_log(path: Path, unprefixed: str = TRAIN) -> Log:
    """A trainer_state.json, a list of records, or a record a line; keys without a prefix are of the split `unprefixed`.

    Raises UserError where the file cannot be read.
    """
    records, malformed = raw_records(text_of(path))
    return log_of(records, unprefixed)._replace(malformed=malformed)


def read_preferences(path: Path, unprefixed: str = TRAIN) -> Log:
    """As `read_log`; raises UserError for a log without a preference metric too."""
    log = read_log(path, unprefixed)
    if not log.has_preferences:
        raise UserError(
            f"{path}: no preference metric in {len(log.records)} records ({log.malformed} malformed lines). Expected is a run "
            f"folder, a trainer_state.json, or a record a line with such keys as {MARGIN}, eval_{MARGIN}, {ACCURACY}"
        )
    return log


def text_of(path: Path) -> str:
    """Raises UserError for a file that cannot be read; what is no UTF-8 in it is one more malformed line."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def raw_records(text: str) -> tuple[list[dict[str, Any]], int]:
    """Records, and how many lines are none."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or thousands of brackets
        found = [record_of(line) for line in text.splitlines() if line.strip()]
    else:
        listed = whole.get("log_history", [whole]) if isinstance(whole, dict) else whole
        found = listed if isinstance(listed, list) else [listed]
    records = [record for record in found if isinstance(record, dict)]
    return records, len(found) - len(records)


def record_of(line: str) -> Any:
    """JSON, or a dict as Python prints it: what trainers write to the terminal."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(line.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None


def log_of(records: Iterable[dict[str, Any]], unprefixed: str = TRAIN) -> Log:
    found, not_finite = [], 0
    for record in records:
        step = next((number for key in STEPS if (number := number_in(record.get(key))) is not None), None)
        splits: dict[str, dict[str, float]] = {}
        for key, value in record.items():
            if key == "train_loss" and "train_runtime" in record:  # the Trainer's last record: a mean over all steps
                continue
            split, metric = place_of(str(key), unprefixed)
            number = number_in(value)
            if metric is None or number is None:
                continue
            if not math.isfinite(number):
                not_finite += 1
                continue
            splits.setdefault(split, {})[metric] = number
        found += [LogRecord(step, split, values) for split, values in splits.items()]
    return Log(tuple(found), not_finite=not_finite)


def place_of(key: str, unprefixed: str) -> tuple[str, str | None]:
    """Which split a key is of, and which metric; None for what is no preference metric."""
    name = re.sub(r"[/\-. ]", "_", key.lower())
    prefix = PREFIX.match(name)
    split = unprefixed if prefix is None else prefix[1] if prefix[1] in (TRAIN, PROBE) else EVAL
    name = name[prefix.end() :] if prefix else name
    if name in SPELLINGS:
        return split, SPELLINGS[name]
    named = NAMED_SETS.fullmatch(name) if split == EVAL else None
    return (f"{EVAL} {named[1]}", SPELLINGS[named[2]]) if named else (split, None)


def number_in(value: Any) -> float | None:
    """Numbers, also those that were written as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def log_signals(log: Log, held_out: Log | None = None) -> LogSignals:
    """held_out: a separate log of held-out figures."""

    def half(metric: str, *, late: bool) -> Half | None:
        values = [value for _, value in log.series(TRAIN, metric)]
        part = values[len(values) // 2 :] if late else values[: len(values) // 2]
        return Half(sum(part) / len(part), len(part)) if part else None

    def ends(split: str, metric: str, source: Log) -> Ends | None:
        series = source.series(split, metric)
        if not series:
            return None
        (first_step, first), (last_step, last) = series[0], series[-1]
        return Ends(first, first_step, last, last_step, len(series), "step" if source.has_steps else "record")

    apart = held_out or log
    return LogSignals(
        half(MARGIN, late=False),
        half(MARGIN, late=True),
        half(CHOSEN, late=False),
        half(CHOSEN, late=True),
        half(REJECTED, late=True),
        half(ACCURACY, late=True),
        ends(apart.held_out, MARGIN, apart),
        ends(apart.held_out, ACCURACY, apart),
        ends(PROBE, MARGIN, log),
        ends(PROBE, ACCURACY, log),
        sum(each.malformed for each in (log, held_out) if each),
        sum(each.not_finite for each in (log, held_out) if each),
    )
