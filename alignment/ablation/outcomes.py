"""How far the cells are, as their folders say: nothing else is remembered, so that an experiment goes on from any moment."""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from ..run.guards import NonFiniteStep
from ..run.resuming import holds_end
from ..run.run_folder import LOCK_FILE, read_status
from .cells import Cell

# Settled: such a cell is not started again.
FINISHED, NOT_FINITE = "finished", "not finite"
# Of a cell that the same command starts again.
FAILED, INTERRUPTED, BROKEN, WAITING = "failed", "interrupted", "broken", "not begun"
TAIL_BYTES = 20_000


@dataclass(frozen=True)
class Outcome:
    """The state of a cell, and why it is no better."""

    state: str
    reason: str = ""

    @property
    def is_settled(self) -> bool:
        return self.state in (FINISHED, NOT_FINITE)


def outcome_of(cell: Cell) -> Outcome:
    """As the run's own status says."""
    status = read_status(cell.run)
    if status is None:
        return Outcome(WAITING)
    state, reason = status["state"], one_line(status.get("reason", ""))
    if holds_end(cell.run):
        return Outcome(FINISHED)
    if state == "failed":
        return Outcome(NOT_FINITE if status.get("error") == NonFiniteStep.__name__ else FAILED, reason)
    if state == "interrupted":
        return Outcome(INTERRUPTED, reason)
    return Outcome(BROKEN, "it was killed")


def outcome_of_attempt(cell: Cell, failure: str | None, log_from: int) -> Outcome:
    """Behind an attempt in this session. failure: what whoever waited for it knows; log_from: where its part of log begins."""
    outcome = outcome_of(cell)
    if outcome.is_settled or outcome.state == INTERRUPTED or failure is None:
        return outcome
    return Outcome(FAILED, said_last(cell.log, log_from) or outcome.reason or failure)


def said_last(log: Path, log_from: int) -> str | None:
    """The error that the run ended its part of the log with."""
    if not log.is_file():
        return None
    with log.open("rb") as file:
        file.seek(max(log_from, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return one_line(errors[-1].removeprefix("error: ")) if errors else None


def one_line(text: str) -> str:
    return " ".join(text.split())


def is_held(cell: Cell) -> bool:
    """Whether a process writes into the run's folder: one that outlived whoever started it, say."""
    path = cell.run / LOCK_FILE
    if not path.is_file():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def share_done(cell: Cell) -> float:
    """How much of its training a run has behind it, between 0 and 1, as its log tells."""
    with suppress(FileNotFoundError, ValueError, IndexError, KeyError, TypeError, yaml.YAMLError):  # not yet, or half of it
        recipe = yaml.safe_load((cell.run / "recipe.yaml").read_text(encoding="utf-8"))
        record = json.loads((cell.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        share = (
            record["step"] / recipe["max_steps"] if recipe["max_steps"] > 0 else record["epoch"] / recipe["num_train_epochs"]
        )
        return min(max(share, 0.0), 1.0)
    return 0.0


def counts(outcomes: Iterable[Outcome]) -> str:
    """2 finished, 1 failed."""
    states = [outcome.state for outcome in outcomes]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
