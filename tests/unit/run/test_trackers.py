"""A tracker is checked before a run and cannot end one: its names, its failures, what it is told and what it is spared."""

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

from alignment.run.records import write_jsonl
from alignment.run.trackers import (
    Tracker,
    recall,
    records_after,
    remember,
    tell_replies,
    tracker_problems,
    without_disabled,
)


def problems(report_to, **values) -> list[str]:
    defaults = {"prepare_only": False, "dry_run": False, "project": "huggingface", "output_dir": "run"}
    defaults |= dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"))
    return [str(problem) for problem in tracker_problems(SimpleNamespace(**defaults | {"report_to": report_to} | values))]


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr("alignment.run.trackers.get_available_reporting_integrations", lambda: ["wandb", "tensorboard"])
    monkeypatch.setenv("WANDB_MODE", "offline")


# ---- Before a run ----


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("report_to", ["none", ["none"], [], None, "wandb", ["wandb", "tensorboard"], "all", ["all"]])
def test_nobody_or_what_is_installed_may_be_named(report_to, monkeypatch):
    assert problems(report_to) == []


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("report_to", "advice"),
    [
        ("wnadb", "did you mean 'wandb'?"),
        (["wandb", "tensorbord"], "did you mean 'tensorboard'?"),
        ("", "choose none, or of "),
        (["none", "wandb"], "none stands alone"),
        (["wandb", "none"], "none stands alone"),
        ("mlflow", "mlflow is not installed: pip install mlflow"),
        ("comet_ml", "comet_ml is not installed: pip install comet-ml"),
    ],
)
def test_a_tracker_that_cannot_work_is_refused_with_what_helps(report_to, advice):
    (problem,) = problems(report_to)
    assert advice in problem


@pytest.mark.usefixtures("installed")
def test_a_mode_of_wandb_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    (problem,) = problems("wandb")
    assert "WANDB_MODE=ofline" in problem
    assert "did you mean 'offline'?" in problem


@pytest.mark.parametrize("value", ["true", "1", "True"])
def test_wandb_disabled_is_honoured(value, monkeypatch):
    monkeypatch.setenv("WANDB_DISABLED", value)
    assert without_disabled(["wandb", "tensorboard"]) == ["tensorboard"]
    assert problems("wandb") == []
    monkeypatch.setenv("WANDB_DISABLED", "false")
    assert without_disabled(["wandb"]) == ["wandb"]


@pytest.mark.usefixtures("installed")
def test_what_trackio_alone_reads_is_refused_with_the_way_of_the_others():
    (problem,) = problems("wandb", project="mine")
    assert "export WANDB_PROJECT=" in problem
    assert len(problems("none", trackio_space_id="me/space")) == 1


@pytest.mark.usefixtures("installed")
def test_a_folder_for_tensorboard_that_cannot_be_written_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "logs"))
    (problem,) = problems("tensorboard")
    assert "cannot be written" in problem


def test_a_machine_that_only_prepares_data_needs_no_tracker():
    assert problems("mlflow", prepare_only=True) == []


# ---- During a run ----


class Diary(TrainerCallback):
    """Notes what it is told, and fails at one event."""

    def __init__(self, fails_at: str | None = None):
        self.fails_at = fails_at
        self.told: list[str] = []

    def note(self, event: str) -> None:
        self.told.append(event)
        if event == self.fails_at:
            raise ConnectionError("the server\nis gone")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.note("begin")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.note(f"log {state.global_step}")

    def on_save(self, args, state, control, **kwargs) -> None:
        self.note("save")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.note("end")


def live(tracker: Tracker) -> None:
    args, state, control = SimpleNamespace(), TrainerState(), TrainerControl()
    tracker.on_train_begin(args, state, control)
    for state.global_step in (1, 2, 3):
        tracker.on_log(args, state, control, logs={"loss": 1.0})
        tracker.on_step_end(args, state, control)
    tracker.on_save(args, state, control)
    tracker.on_train_end(args, state, control)
    tracker.on_log(args, state, control, logs={"eval_loss": 1.0})
    tracker.close()


def track(inner: TrainerCallback, tmp_path: Path, repeated: Counter | None = None) -> Tracker:
    return Tracker(inner, "beta: 2.0\n", tmp_path / "_run" / "trackers.json", None, repeated or Counter())


def test_a_tracker_s_run_ends_when_the_run_does_and_not_when_training_does(tmp_path):
    diary = Diary()
    live(track(diary, tmp_path))
    assert diary.told == ["begin", "log 1", "log 2", "log 3", "save", "log 3", "end"]


@pytest.mark.parametrize("event", ["begin", "log 2", "save", "end"])
def test_a_tracker_that_fails_costs_one_warning_and_is_told_no_more(event, tmp_path, caplog):
    diary = Diary(fails_at=event)
    live(track(diary, tmp_path))
    assert diary.told[-1] == event
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["Diary gets no more records: the server is gone. The run goes on; metrics.jsonl has all of them."]


def test_a_record_that_it_has_from_an_attempt_before_is_not_told_again(tmp_path):
    log = [{"step": 1, "loss": 1.0}]
    write_jsonl(tmp_path / "metrics.jsonl", [*log, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.0}])
    repeated = records_after(tmp_path / "metrics.jsonl", log)
    assert sorted(step for step, _ in repeated) == [2, 3]
    diary = Diary()
    live(track(diary, tmp_path, repeated))
    assert diary.told == ["begin", "log 1", "save", "log 3", "end"]  # the last is another record of step 3


def test_a_probes_figures_are_told_where_the_held_out_ones_are(tmp_path):
    told: list[dict] = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            told.append(logs)

    logs = {"eval_rewards/margins": 1.0, "probe_rewards/margins": 2.0}
    track(Listener(), tmp_path).on_log(SimpleNamespace(), TrainerState(), TrainerControl(), logs=logs)
    assert told == [{"eval_rewards/margins": 1.0, "eval_probe_rewards/margins": 2.0}]
    assert list(logs) == ["eval_rewards/margins", "probe_rewards/margins"]  # others are told the run's own names


def test_replies_that_cannot_be_told_cost_one_warning(tmp_path, caplog):
    board = TensorBoardCallback.__new__(TensorBoardCallback)  # its own __init__ wants tensorboard
    board.tb_writer = SimpleNamespace(add_text=lambda *_: 1 / 0)
    tracker = track(board, tmp_path)
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[tracker]))
    for step in (0, 3):
        tell_replies(trainer, step, [{"step": step, "prompt": "river", "response": "mountain", "tokens": 1}])
    assert tracker.is_lost
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "TensorBoard gets no more records: division by zero. The run goes on; metrics.jsonl has all of them."
    ]


def test_what_is_remembered_of_one_tracker_leaves_the_others(tmp_path):
    memory = tmp_path / "_run" / "trackers.json"
    assert recall(memory) == {}
    remember(memory, {"wandb": "a"})
    remember(memory, {"mlflow": "b"})
    assert recall(memory) == {"wandb": "a", "mlflow": "b"}
    memory.write_text("{torn")
    assert recall(memory) == {}
