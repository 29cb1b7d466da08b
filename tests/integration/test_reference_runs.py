"""Whole DPO runs and their own danger: a reference that is lost with a process, or made up from a policy that has moved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.forked import Server
from tests.integration.test_faults import END, assert_same_end, steps
from tests.workspaces import read_jsonl, write_recipe

FORWARDS = 8 + 3  # that score 16 training and 6 held-out pairs, two at a time


@pytest.fixture(scope="module")
def dpo_recipe(recipe, tmp_path_factory) -> Path:
    keys = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return write_recipe(tmp_path_factory.mktemp("dpo"), keys | {"beta": 0.3})


@pytest.fixture(scope="module")
def start(server: Server, dpo_recipe: Path) -> Callable:
    return lambda folder, *options, **job: server.run(str(dpo_recipe), f"--output_dir={folder}", *options, method="dpo", **job)


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert start(folder).status == 0
    return folder


def reference_of(folder: Path) -> bytes:
    return (folder / "_run/reference/train.safetensors").read_bytes()


def assert_goes_on(start: Callable, folder: Path, unbroken: Path) -> str:
    ended = start(folder)
    assert ended.status == 0, ended.printed
    assert_same_end(folder, unbroken)
    assert reference_of(folder) == reference_of(unbroken)
    for name in ("eval_pairs.jsonl", "probe_pairs.jsonl"):
        assert read_jsonl(folder / name) == read_jsonl(unbroken / name)
    return ended.printed


@pytest.mark.parametrize(
    ("place", "number", "scored_again"),
    [
        ("scoring", 3, True),  # in the middle of the training pairs
        ("scoring", FORWARDS, True),  # with the last held-out ones
        ("keeping scores", 1, True),
        ("training", 1, False),  # scored, and no step taken
        ("training", 4, False),  # a step taken, and nothing saved
    ],
)
def test_a_run_killed_while_or_after_it_scores_loses_nothing_but_time(place, number, scored_again, start, unbroken, tmp_path):
    killed = start(tmp_path, sabotage="die_in", place=place, number=number, ranks=[0])
    assert killed.statuses == [-9]
    assert steps(tmp_path) == []
    printed = assert_goes_on(start, tmp_path, unbroken)
    assert ("scored before" in printed) != scored_again


def test_a_run_killed_after_a_checkpoint_reads_its_reference_again(start, unbroken, tmp_path):
    start(tmp_path, sabotage="die_in", place="training", number=12, ranks=[0])
    assert steps(tmp_path)
    assert "Resuming from" in assert_goes_on(start, tmp_path, unbroken)


def test_a_run_that_is_asked_to_stop_while_it_scores_stops_at_once_and_begins_again(start, unbroken, tmp_path):
    ended = start(tmp_path, sabotage="signal_in", place="scoring", number=3, ranks=[0], delays=[0.0], names=["SIGTERM"])
    assert ended.status == 75, ended.printed
    assert "stopped by SIGTERM after step 0 of 8; nothing was trained in this attempt" in ended.printed
    assert_goes_on(start, tmp_path, unbroken)


def test_a_fresh_start_scores_afresh_and_sets_aside_what_was_scored(start, unbroken, tmp_path):
    start(tmp_path, sabotage="die_in", place="training", number=12, ranks=[0])
    ended = start(tmp_path, "--resume_from_checkpoint=never")
    assert ended.status == 0, ended.printed
    assert "scored before" not in ended.printed
    assert list(tmp_path.glob("_run/earlier/end.*/reference/train.safetensors"))
    assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_the_reference_is_read_on_any_number_of_processes(before, now, start, tmp_path):
    options = ["--disable_dropout=true"]
    ended = start(
        tmp_path, *options, processes=before, sabotage="signal_in", place="training", number=5, ranks=[0], delays=[0.0],
        names=["SIGTERM"],
    )  # fmt: skip
    assert ended.status == 75, ended.printed
    kept = reference_of(tmp_path)
    ended = start(tmp_path, *options, processes=now)
    assert ended.status == 0, ended.printed
    assert reference_of(tmp_path) == kept
    assert (tmp_path / END).exists()


def test_two_processes_score_what_one_does(start, unbroken, tmp_path):
    ended = start(tmp_path, processes=2)
    assert ended.statuses == [0, 0], ended.printed
    ours, theirs = (read_jsonl(folder / "eval_pairs.jsonl")[:6] for folder in (unbroken, tmp_path))
    for mine, other in zip(ours, theirs, strict=True):
        assert other["reference_chosen_logp"] == pytest.approx(mine["reference_chosen_logp"], rel=1e-6)


def test_a_recipe_with_another_reference_model_is_refused_by_name(start, tmp_path):
    ended = start(tmp_path, "--ref_model=elsewhere")
    assert ended.status == 2
    assert "'ref_model' is not read: the reference is the policy itself at step 0" in ended.printed
