"""What a run is warned of once, and what it remembers of itself when it is resumed."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState

from alignment.preference.reference import PROBE
from alignment.report.review.pairs import Pairs
from alignment.watch.warnings import Warnings
from scripts.simpo_trainer import SimPOTrainer
from tests.review_records import columns, rows_of
from tests.workspaces import read_jsonl

LEARNED = columns(-np.ones(256), np.ones(256))


def held_out(right: int) -> Pairs:
    """2,000 pairs, which were all wrong at step 0."""
    return columns(-np.ones(2000), np.where(np.arange(2000) < right, 1.0, -1.0))


class Run:
    """A run as its warnings see it: a log, and evaluations that somebody else makes."""

    def __init__(self, folder: Path, at_start: dict[str, str] | None = None):
        (folder / "_run").mkdir(exist_ok=True)
        self.state = TrainerState(is_world_process_zero=True)
        self.pairs: dict[str, Pairs] = {}
        trainer = object.__new__(SimPOTrainer)
        trainer.state, trainer.args, trainer.eval_dataset = self.state, SimpleNamespace(output_dir=str(folder)), "some"
        trainer.objective = SimpleNamespace(per_token=True)
        trainer.pair_records = self.records
        self.warnings = Warnings(trainer, at_start or {})

    def records(self, of: str) -> list[dict]:
        rows = rows_of(self.pairs[of]) if of in self.pairs else []
        return [{**row, "step": self.state.global_step if row["step"] else 0} for row in rows]

    def begin(self, step: int = 0) -> None:
        self.state.global_step = step
        self.warnings.on_train_begin(None, self.state, TrainerControl())

    def log(self, **record: float) -> None:
        self.state.global_step += 1
        self.state.log_history.append({**record, "step": self.state.global_step})
        self.warnings.on_log(None, self.state, TrainerControl())

    def evaluate(self, step: int, right: int) -> None:
        self.state.global_step = step
        self.pairs = {"eval": held_out(right), PROBE: LEARNED}
        self.warnings.on_evaluate(None, self.state, TrainerControl())


def said(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["warning"]) for row in read_jsonl(folder / "warnings.jsonl")]


def test_a_spike_is_said_once_and_the_next_is_not(tmp_path, caplog):
    run = Run(tmp_path)
    run.begin()
    for norm in [1.0] * 12 + [50.0] + [1.0] * 12 + [50.0]:
        run.log(grad_norm=norm)
    assert said(tmp_path) == [(13, "gradient_spike")]
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("Step 13: the gradient's norm is 50, 50 times the median of those logged before (1).")


def test_a_probe_learned_by_heart_is_said_at_the_first_evaluation_that_shows_it(tmp_path):
    run = Run(tmp_path)
    run.begin()
    for step, right in ((20, 1100), (40, 1300), (60, 1310), (80, 1305), (100, 1300)):
        run.evaluate(step, right)
    assert said(tmp_path) == [(80, "held_out_stands_still")]  # since step 40; at 60 since 20


def test_a_resumed_run_compares_with_what_it_saw_before_and_repeats_nothing(tmp_path):
    run = Run(tmp_path, {"pairs_per_step": "4 pairs a step"})
    run.begin()
    for step, right in ((20, 1100), (40, 1300), (60, 1310)):
        run.evaluate(step, right)
    resumed = Run(tmp_path, {"pairs_per_step": "4 pairs a step"})
    resumed.begin(50)  # the evaluation of step 60 comes again
    assert sorted(resumed.warnings.earlier) == [20, 40]
    resumed.evaluate(60, 1310)
    resumed.evaluate(80, 1305)
    assert said(tmp_path) == [(0, "pairs_per_step"), (80, "held_out_stands_still")]
    assert (resumed.warnings.earlier[40] == (np.arange(2000) < 1300)).all()


def test_what_was_said_behind_the_checkpoint_is_said_again(tmp_path):
    run = Run(tmp_path)
    run.begin()
    for norm in [1.0] * 12 + [50.0]:
        run.log(grad_norm=norm)
    resumed = Run(tmp_path)
    resumed.begin(10)
    assert said(tmp_path) == []
    resumed.begin(13)


def test_a_run_that_begins_again_knows_nothing_of_the_one_before(tmp_path):
    for _ in range(2):
        run = Run(tmp_path, {"pairs_per_step": "4 pairs a step"})
        run.begin()
        assert run.warnings.earlier == {}
        run.evaluate(20, 1100)
    assert said(tmp_path) == [(0, "pairs_per_step")]


def test_other_processes_say_and_write_nothing(tmp_path, caplog):
    run = Run(tmp_path, {"pairs_per_step": "4 pairs a step"})
    run.state.is_world_process_zero = False
    run.begin()
    run.evaluate(40, 1300)
    run.evaluate(80, 1300)
    assert caplog.records == []
    assert not (tmp_path / "warnings.jsonl").exists()


@pytest.mark.parametrize("file", ["warnings.jsonl", "_run/held_out_right.jsonl"])
def test_a_record_that_cannot_be_written_costs_a_line_and_not_the_run(file, tmp_path, caplog):
    run = Run(tmp_path)
    (tmp_path / f"{file}.new").mkdir()
    run.begin()
    run.evaluate(40, 1300)
    run.evaluate(80, 1300)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("cannot be written" in message for message in messages)
    assert any("training pairs are in the right order" in message for message in messages)


def test_the_records_are_text_that_anybody_reads(tmp_path):
    run = Run(tmp_path, {"pairs_per_step": "4 pairs a step"})
    run.begin()
    assert json.loads((tmp_path / "warnings.jsonl").read_text()) == {
        "step": 0, "warning": "pairs_per_step", "text": "4 pairs a step"
    }  # fmt: skip
