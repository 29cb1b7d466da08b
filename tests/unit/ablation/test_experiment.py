"""An experiment's course: what is run, what is left alone, what is decided. Runs are stand-ins, folders are real."""

import argparse
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from alignment.ablation import experiment, running
from alignment.ablation.cells import Cell
from alignment.ablation.deciding import State, decisions_of
from alignment.ablation.experiment import main, run_matrix
from alignment.ablation.matrix import Launch
from alignment.ablation.outcomes import (
    BROKEN,
    FAILED,
    FINISHED,
    INTERRUPTED,
    NOT_FINITE,
    WAITING,
    Outcome,
    is_held,
    outcome_of,
    share_done,
)  # fmt: skip
from alignment.ablation.results import has_diverged
from alignment.ablation.running import LocalLauncher
from alignment.errors import UserError
from alignment.report.review import page as review_page
from alignment.run.records import write_jsonl
from alignment.run.run_folder import LOCK_FILE
from alignment.run.signals import RunInterrupted, StopSignals
from tests.methods import METHODS
from tests.unit.ablation import stand_in
from tests.unit.ablation.experiments import AXES, DPO, ORPO, SIMPO, break_down, finish, write_matrix

ROOT = Path(__file__).parents[3]
FEW = {"objective": {"simpo": SIMPO, "dpo": DPO}, "seed": [42]}


class Course:
    """Stands in for launchers: writes what a run leaves, as `becomes` says of its name; remembers what was run."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.becomes: dict[str, Callable[[Cell], None]] = {}
        self.killed_at: str | None = None

    def run(self, cells, tell) -> None:
        for cell in cells:
            if cell.name == self.killed_at:
                raise RunInterrupted("stopped by SIGTERM")
            self.ran.append(cell.name)
            tell(cell, None)
            self.becomes.get(cell.name, lambda cell: finish(cell))(cell)
            tell(cell, outcome_of(cell))


@pytest.fixture
def course(monkeypatch) -> Course:
    course = Course()
    monkeypatch.setattr(review_page, "run_sections", lambda *_, **__: [])  # each run's own plots, a second a run
    monkeypatch.setattr(experiment, "launcher_of", lambda *_: course)
    monkeypatch.chdir(ROOT)
    return course


def run(path: str, **options) -> bool:
    return run_matrix(
        argparse.Namespace(**{"matrix": path, "output_dir": None, "check": False, **options}), METHODS, ROOT / "scripts"
    )


def page(folder: Path) -> str:
    return (folder / "out" / "ablation.md").read_text()


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Of every file of the cells; and when it was last written."""
    files = (file for file in (folder / "out" / "cells").rglob("*") if file.is_file())
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def titles(text: str) -> list[str]:
    return [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ") and ": " in line]


# ---- The course ----


def test_every_cell_is_run_and_the_incumbent_stays_where_nothing_speaks_against_it(course, tmp_path, capsys):
    assert run(write_matrix(tmp_path)) is False
    assert course.ran == ["simpo-r16-s42", "simpo-r8-s42", "dpo-r16-s42", "dpo-r8-s42"]
    decided = ["objective at r16: simpo", "objective at r8: simpo", "rank at simpo: r16", "rank at dpo: r16"]
    assert titles(page(tmp_path))[:4] == decided
    printed = capsys.readouterr().out
    assert all(line in printed.splitlines() for line in decided)
    assert "simpo-r8-s42" in printed
    assert "60 of 100 (60.0%)" in printed


def test_seeds_are_averaged_and_each_rank_has_its_own_decision(course, tmp_path):
    """At r8 DPO is right about 1 pair more, seeds averaged, and cleaner; at r16 half a pair."""
    axes = {**AXES, "seed": [1, 2]}
    right = {"dpo-r8-s1": 61, "dpo-r8-s2": 61, "dpo-r16-s1": 61, "dpo-r16-s2": 60}
    for name, pairs in right.items():
        course.becomes[name] = lambda cell, pairs=pairs: finish(cell, right=pairs, gap=-0.1)
    run(write_matrix(tmp_path, axes=axes))
    assert titles(page(tmp_path))[:2] == ["objective at r16: simpo", "objective at r8: dpo"]
    assert "means of 2 seeds" in page(tmp_path)
    assert "60.5 of 100 right" in page(tmp_path)


def test_finished_cells_are_skipped_and_their_files_left_alone(course, tmp_path):
    path = write_matrix(tmp_path)
    course.killed_at = "dpo-r16-s42"
    with pytest.raises(RunInterrupted):
        run(path)
    before = contents(tmp_path)
    course.killed_at = None
    run(path)
    assert course.ran == ["simpo-r16-s42", "simpo-r8-s42", "dpo-r16-s42", "dpo-r8-s42"]
    assert before.items() <= contents(tmp_path).items()
    told, after = page(tmp_path), contents(tmp_path)
    run(path)
    assert len(course.ran) == 4
    assert page(tmp_path) == told
    assert contents(tmp_path) == after


def test_a_cell_that_fails_is_shown_with_its_reason_and_the_others_go_on_then_it_is_tried_again(course, tmp_path):
    path = write_matrix(tmp_path)
    course.becomes["simpo-r8-s42"] = lambda cell: break_down(cell, reason="the disk is\nfull", error="OSError")
    assert run(path) is True
    assert len(course.ran) == 4
    assert "simpo-r8-s42: failed. the disk is full" in page(tmp_path)
    assert "| simpo-r8-s42 | failed |" in page(tmp_path)
    assert titles(page(tmp_path))[:2] == ["objective at r16: simpo", "rank at dpo: r16"]  # of what can be compared
    course.becomes["simpo-r8-s42"] = lambda cell: (cell.run.rename(cell.folder / "old"), finish(cell))
    assert run(path) is False
    assert course.ran[4:] == ["simpo-r8-s42"]


def not_finite(cell: Cell) -> None:
    break_down(cell, reason="step 2: the gradient is not finite", error="NonFiniteStep")


@pytest.mark.parametrize(
    ("becomes", "word"),
    [
        (not_finite, "not finite"),
        (lambda cell: finish(cell, fell=1.0), "collapses"),
        (lambda cell: finish(cell, losses=(1.0, 2.0, 3.0, 4.0)), "diverges"),
    ],
)
def test_the_fallback_is_run_beside_what_is_not_stable_and_nowhere_else(becomes, word, course, tmp_path, capsys):
    path = write_matrix(tmp_path, fallback={"orpo": ORPO})
    course.becomes["dpo-r8-s42"] = becomes
    assert run(path) is False
    assert course.ran[4:] == ["orpo-r8-s42"]
    assert f"Not stable: dpo-r8-s42 ({word}). The fallback is run." in capsys.readouterr().out
    assert "objective at r8: orpo" in titles(page(tmp_path))
    assert f"dpo-r8-s42: {word}. orpo is stable" in page(tmp_path)
    run(path)  # a run that is not finite would be so again
    assert len(course.ran) == 5


def test_stable_cells_need_no_fallback(course, tmp_path):
    run(write_matrix(tmp_path, fallback={"orpo": ORPO}))
    assert not any(name.startswith("orpo") for name in course.ran)


def test_what_is_not_stable_is_not_taken(course, tmp_path):
    axes = {"objective": {"simpo": SIMPO, "dpo": DPO, "hinge": {"method": "simpo", "loss_type": "hinge"}}}
    course.becomes["simpo"] = lambda cell: finish(cell, right=90, gap=-1.0, losses=(1.0, 9.0, 9.0, 9.0))
    run(write_matrix(tmp_path, axes=axes))
    assert titles(page(tmp_path))[0] == "objective: dpo"


def test_one_axis_at_a_time_runs_each_with_the_best_of_those_before(course, tmp_path, capsys):
    axes = {"learning_rate": [1e-3, 2e-3, 3e-3], "beta": [2.0, 4.0], "seed": [1, 2]}
    path = write_matrix(tmp_path, axes=axes, method="simpo", one_at_a_time=True)
    for seed in (1, 2):
        course.becomes[f"lr0.002-b2.0-s{seed}"] = lambda cell: finish(cell, right=70)
        course.becomes[f"lr0.002-b4.0-s{seed}"] = lambda cell: finish(cell, right=75)
    run(path)
    assert course.ran == [
        "lr0.001-b2.0-s1", "lr0.001-b2.0-s2", "lr0.002-b2.0-s1", "lr0.002-b2.0-s2", "lr0.003-b2.0-s1", "lr0.003-b2.0-s2",
        "lr0.002-b4.0-s1", "lr0.002-b4.0-s2",
    ]  # fmt: skip
    assert titles(page(tmp_path))[:2] == ["learning_rate at b2.0: lr0.002", "beta at lr0.002: b4.0"]
    assert "lr0.003-b4.0" not in page(tmp_path)
    run(path)
    assert len(course.ran) == 8


def test_one_axis_at_a_time_goes_on_with_a_stable_value_though_nothing_could_be_compared(course, tmp_path, capsys):
    path = write_matrix(tmp_path, axes={"learning_rate": [1e-2, 1e-3], "beta": [2.0, 4.0]}, method="simpo", one_at_a_time=True)
    course.becomes["lr0.01-b2.0"] = lambda cell: finish(cell, losses=(1.0, 9.0, 9.0, 9.0))
    run(path)
    assert course.ran == ["lr0.01-b2.0", "lr0.001-b2.0", "lr0.001-b4.0"]
    assert "learning_rate: lr0.001 is taken, the only value with a stable run." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("loss", "diverged"),
    [
        ([0.7, 0.6, 0.5, 0.4], False), ([0.7, 0.8, 1.0, 1.04], False), ([0.7, 1.0, 1.0, 1.1], True),
        ([-0.5, -0.6, -0.7, -0.8], False), ([-0.5, -0.4, 0.5, 2.0], True),
        ([0.0, 0.0, 0.0, 0.0], False), ([0.01, 0.02, 0.02, 0.02], False), ([0.01, 0.5, 0.5, 0.5], True),
        ([0.7], False), ([], False),
    ],
)  # fmt: skip
def test_a_loss_has_diverged_where_it_ends_far_above_its_beginning_whatever_its_sign(loss, diverged):
    assert has_diverged(loss) == diverged


def supervised(cell: Cell) -> None:
    """A run without pairs, and with a loss alone in its log."""
    finish(cell)
    for name in ("eval_pairs.jsonl", "probe_pairs.jsonl"):
        (cell.run / name).unlink()
    write_jsonl(cell.run / "metrics.jsonl", [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.8, "eval_loss": 0.7}])


def test_runs_without_pairs_are_shown_and_not_compared(course, tmp_path):
    course.becomes = dict.fromkeys(("simpo-s42", "dpo-s42"), supervised)
    run(write_matrix(tmp_path, axes=FEW))
    assert "Nothing is decided" in page(tmp_path)
    assert "| simpo-s42 | finished; no pairs |" in page(tmp_path)


def test_one_axis_at_a_time_says_that_runs_without_pairs_cannot_be_compared(course, tmp_path, capsys):
    course.becomes = dict.fromkeys(("lr0.01-b2.0", "lr0.001-b2.0"), supervised)
    axes = {"learning_rate": [1e-2, 1e-3], "beta": [2.0, 4.0]}
    run(write_matrix(tmp_path, axes=axes, method="simpo", one_at_a_time=True))
    assert "learning_rate: lr0.01 is taken, the first of those that cannot be compared." in capsys.readouterr().out


def test_a_check_starts_and_writes_nothing(course, tmp_path, capsys):
    assert run(write_matrix(tmp_path), check=True) is False
    assert course.ran == []
    assert not (tmp_path / "out").exists()
    assert f"matrix: 4 cells (4 not begun); in {tmp_path / 'out'}" in capsys.readouterr().out


def test_two_commands_do_not_run_one_experiment(course, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "lock"), pytest.raises(UserError, match="another command runs this experiment"):
        run(write_matrix(tmp_path))


@pytest.mark.parametrize(("end", "status"), [(None, 0), ("fail", 1), ("stop", 75), ("mistake", 2)])
def test_exit_statuses_tell_a_mistake_from_a_stop_and_from_a_failure(end, status, course, tmp_path, capsys):
    if end == "fail":
        course.becomes["dpo-s42"] = lambda cell: break_down(cell, reason="x", error="OSError")
    course.killed_at = "dpo-s42" if end == "stop" else None
    path = write_matrix(tmp_path, axes=FEW if end != "mistake" else {**FEW, "beta": [-1.0]})
    with pytest.raises(SystemExit) as ended:
        main(METHODS, ROOT / "scripts", [path])
    assert ended.value.code == status
    assert "Traceback" not in capsys.readouterr().err


def test_decisions_need_two_values_with_a_stable_run(tmp_path):
    from alignment.ablation.cells import make_cells
    from alignment.ablation.matrix import read_matrix

    matrix = read_matrix(write_matrix(tmp_path, axes=FEW))
    assert decisions_of(State(matrix, make_cells(matrix, METHODS), {}, {})) == []


# ---- States ----


def cell(folder: Path, name: str = "one") -> Cell:
    made = Cell(name, {}, "simpo", {}, (), folder / name)
    made.folder.mkdir(parents=True)
    return made


def test_a_cells_state_is_what_its_folder_says(tmp_path):
    assert outcome_of(cell(tmp_path, "waiting")).state == WAITING
    for state, facts, expected in (
        ("training", {}, BROKEN),
        ("ending", {}, BROKEN),
        ("interrupted", {"reason": "SIGTERM"}, INTERRUPTED),
        ("failed", {"reason": "x", "error": "OutOfMemory"}, FAILED),
        ("failed", {"reason": "x", "error": "NonFiniteStep"}, NOT_FINITE),
        ("finished", {}, BROKEN),  # without weights
    ):
        made = cell(tmp_path, f"{state}{expected}")
        break_down(made, state, **facts)
        assert outcome_of(made).state == expected
    finish(done := cell(tmp_path, "done"))
    assert outcome_of(done) == Outcome(FINISHED)


@pytest.mark.parametrize(
    ("recipe", "record", "share"),
    [
        ("max_steps: 8\nnum_train_epochs: 3", {"step": 2, "epoch": 0.1}, 0.25),
        ("max_steps: -1\nnum_train_epochs: 4", {"step": 2, "epoch": 1.0}, 0.25),
        ("max_steps: -1\nnum_train_epochs: 1", {"step": 2, "epoch": 1.2}, 1.0),
        ("max_steps: -1\nnum_train_epochs: 1", {}, 0.0),
        ("", {"step": 2, "epoch": 0.1}, 0.0),
    ],
)
def test_a_runs_share_is_read_off_its_log(recipe, record, share, tmp_path):
    made = cell(tmp_path)
    assert share_done(made) == 0.0
    made.run.mkdir()
    (made.run / "recipe.yaml").write_text(recipe)
    (made.run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert share_done(made) == share


# ---- On this machine ----


@pytest.fixture
def commands(monkeypatch) -> Iterator[dict[str, list[str]]]:
    """What the run of a cell's name does, in the words of stand_in.py."""
    words: dict[str, list[str]] = {}

    def command(cell: Cell, launch: Launch, entry_points: Path) -> list[str]:
        return [sys.executable, stand_in.__file__, "launch", str(cell.run), *words[cell.name]]

    monkeypatch.setattr(running, "launch_command", command)
    monkeypatch.setattr(running, "POLL_S", 0.05)
    return words


def run_here(cells: list[Cell], stop: StopSignals | None = None, tell=lambda cell, outcome: None) -> dict[str, Outcome]:
    outcomes = {}

    def note(cell: Cell, outcome: Outcome | None) -> None:
        tell(cell, outcome)
        outcomes[cell.name] = outcome

    LocalLauncher(Launch(), Path(), stop or StopSignals()).run(cells, note)
    return outcomes


def test_cells_run_one_after_another_and_a_failure_stops_none(commands, tmp_path):
    commands |= {"bad": ["2", "3"], "good": ["2"]}
    outcomes = run_here([cell(tmp_path, "bad"), cell(tmp_path, "good")])
    assert outcomes == {"bad": Outcome(FAILED, "it broke"), "good": Outcome(FINISHED)}


def test_a_run_that_says_nothing_is_failed_by_its_exit_status(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "launch_command", lambda *_: [sys.executable, "-c", "import sys; sys.exit(5)"])
    made = cell(tmp_path)
    assert run_here([made])["one"] == Outcome(FAILED, f"it ended with status 5; see {made.log}")


def test_a_command_that_is_stopped_lets_its_run_save_and_the_same_command_goes_on(commands, tmp_path):
    commands["one"] = ["60"]
    made, stop = cell(tmp_path), StopSignals()

    def tell(cell: Cell, outcome: Outcome | None) -> None:
        stop.received = signal.SIGINT if (made.run / "steps").exists() else None

    with pytest.raises(RunInterrupted, match="stopped by SIGINT; the same command goes on"):
        run_here([made], stop, tell)
    assert outcome_of(made).state == INTERRUPTED
    assert run_here([made])["one"].state == FINISHED
    first, second = (int(line.split()[-1]) for line in made.log.read_text().splitlines() if line.startswith("begins"))
    assert (first, second > 0) == (0, True)


def hold(path: str, seconds: float, folder: str) -> None:
    with FileLock(path):
        time.sleep(seconds)
        stand_in.write(Path(folder), "finished")
        Path(folder, "model.safetensors").touch()


def test_a_run_that_outlived_its_command_is_waited_for_and_not_started_again(commands, tmp_path):
    made = cell(tmp_path)
    (made.run / "_run").mkdir(parents=True)
    lock = made.run / LOCK_FILE
    process = multiprocessing.get_context("fork").Process(target=hold, args=(str(lock), 2.0, str(made.run)))
    process.start()
    end = time.monotonic() + 10
    while not is_held(made) and time.monotonic() < end:
        time.sleep(0.01)
    assert run_here([made])["one"].state == FINISHED
    assert not made.log.exists()
    process.join()
