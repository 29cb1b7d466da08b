"""The entry point: what it prints, writes and refuses."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.review_run import main
from tests.review_records import columns, save_run

BEFORE = np.random.default_rng(4).normal(0.1, 1, 50)
PAIRS = columns(BEFORE, BEFORE + 1.0)


@pytest.fixture
def run(tmp_path) -> Path:
    return save_run(tmp_path / "run", PAIRS, PAIRS)


def test_a_run_is_reviewed_into_its_own_folder(run, capsys):
    main([str(run)])
    printed = capsys.readouterr().out
    assert printed.startswith("run: generalizing")
    assert printed.splitlines()[-2:] == [str(run / "review.md"), str(run / "report.html")]
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_several_runs_are_reviewed_where_the_command_stands_or_as_asked(run, tmp_path, monkeypatch):
    other = save_run(tmp_path / "other", PAIRS, PAIRS, beta=3.0)
    monkeypatch.chdir(tmp_path)
    main([str(run), str(other)])
    main([str(run), str(other), "--output", "there"])
    assert (tmp_path / "review/report.html").read_bytes() == (tmp_path / "there/report.html").read_bytes()


def test_delta_is_the_users(run, capsys):
    main([str(run), "--delta", "0.1"])
    assert "10 points of accuracy" in (run / "review.md").read_text()


@pytest.mark.parametrize("arguments", [
    ["{run}/typo"],
    ["{run}", "{run}"],
    ["{run}", "--eval_log", "{run}/recipe.yaml"],
    ["{run}", "--delta", "3"],
    ["{run}", "--delta", "none"],
    ["{run}", "--output", "{run}/recipe.yaml"],
    [],
])  # fmt: skip
def test_a_users_mistake_is_one_message_and_exit_status_2(arguments, run, capsys):
    with pytest.raises(SystemExit) as ended:
        main([argument.format(run=run) for argument in arguments])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error:" in printed.err
    assert "Traceback" not in printed.err
    assert not (run / "review.md").exists()


def test_the_script_runs_from_anywhere(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["review_run.py", str(run)])
    monkeypatch.chdir(run)
    runpy.run_path(str(Path(__file__).parents[4] / "scripts/review_run.py"), run_name="__main__")
    assert "generalizing" in capsys.readouterr().out
