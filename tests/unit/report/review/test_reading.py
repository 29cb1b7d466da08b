"""Run folders: what is read, and what is said of one that lacks something."""

import json
from pathlib import Path

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.report.review.reading import names_of, read_run, read_runs
from alignment.report.review.verdict import verdict_of
from tests.review_records import columns, save_run, write_jsonl

RNG = np.random.default_rng(5)
BEFORE = RNG.normal(0.1, 1, 60)
PAIRS = columns(BEFORE, BEFORE + RNG.normal(1.0, 0.3, 60))


@pytest.fixture
def run(tmp_path) -> Path:
    return save_run(tmp_path / "run", PAIRS, PAIRS)


def test_a_run_folder_is_read_whole(run):
    found = read_run(run)
    assert (len(found.held_out), len(found.probe), found.objective, found.seed, found.gamma) == (60, 60, "SimPO", 42, 1.0)
    assert found.log_signals().probe_margin.n == 2
    assert found.notes == ()


def test_what_is_not_there_is_not_read(run):
    for name in ("probe_pairs.jsonl", "metrics.jsonl", "recipe.yaml", "environment.json"):
        (run / name).unlink()
    found = read_run(run)
    assert (found.probe, found.log, found.objective, found.gamma, found.cell) == (None, None, None, None, None)
    assert verdict_of(found.signals()).name == "generalizing"


def test_a_run_that_is_not_finished_is_said_to_be_so(run):
    (run / "eval_pairs.jsonl").unlink()
    (run / "_run").mkdir()
    (run / "_run/status.json").write_text('{"state": "training"}')
    found = read_run(run)
    assert found.notes == ("this run is not finished: training",)
    assert verdict_of(found.signals()).name == "not decidable"


def test_what_the_run_itself_warned_of_is_said(run):
    rows = [{"step": 10, "warning": "chosen_fell", "text": "half as likely"}, {"step": 3, "warning": "without a text"}]
    write_jsonl(run / "warnings.jsonl", rows)
    assert read_run(run).notes == ("warned at step 10: half as likely",)


def test_half_a_line_of_a_killed_writer_costs_that_line(run):
    path = run / "eval_pairs.jsonl"
    path.write_text(path.read_text()[:-40])
    found = read_run(run)
    assert len(found.held_out) == 59
    assert found.notes == ("eval_pairs.jsonl: 1 malformed lines left out",)


def test_pairs_that_were_scored_before_training_alone_are_no_held_out_pairs(run):
    path = run / "eval_pairs.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:60]))
    found = read_run(run)
    assert found.held_out is None
    assert found.notes == ("eval_pairs.jsonl: no pair was scored after the last step",)


def test_a_run_that_ends_with_its_best_checkpoint_is_known_by_its_recipe(tmp_path):
    found = read_run(save_run(tmp_path / "best", PAIRS, load_best_model_at_end=True))
    assert found.signals().is_chosen_step
    assert verdict_of(found.signals()).name == "not decidable"


@pytest.mark.parametrize(("recipe", "gamma"), [
    ({}, 1.0),
    ({"loss_type": "hinge"}, None),
    ({"label_smoothing": 0.1}, None),
    ({"gamma_beta_ratio": 0.0}, 0.0),
])  # fmt: skip
def test_a_margin_is_known_of_losses_that_are_a_sigmoid_of_it(recipe, gamma, tmp_path):
    assert read_run(save_run(tmp_path / "run", PAIRS, **recipe)).gamma == gamma


def test_runs_of_one_recipe_are_one_cell_whatever_their_seed_and_folder(tmp_path):
    runs = [
        read_run(save_run(tmp_path / name, PAIRS, **keys))
        for name, keys in (("a", {}), ("b", {"seed": 43}), ("c", {"beta": 2.5}))
    ]
    assert runs[0].cell == runs[1].cell != runs[2].cell


def test_replies_before_and_after_are_matched_by_their_prompt(run):
    rows = [
        {"step": step, "prompt": f"p{number}", "response": f"{number} " * (step + 1), "tokens": step + 5}
        for step in (0, 4, 8)
        for number in range(3)
    ]
    write_jsonl(run / "samples.jsonl", rows[:-1])
    found = read_run(run).replies
    assert (found.n, found.length_before, found.length_after, found.unit) == (2, 5.0, 13.0, "tokens")


@pytest.mark.parametrize(("name", "text", "message"), [
    ("recipe.yaml", "a: [1", "recipe.yaml: not YAML"),
    ("recipe.yaml", "- a\n- b\n", r"recipe.yaml: is \['a', 'b'\], not keys with values"),
    ("environment.json", "{", "environment.json: not JSON"),
    ("environment.json", "[1]", r"environment.json: is \[1\], not keys with values"),
    ("environment.json", "[" * 100_000, "environment.json: not JSON"),
    ("eval_pairs.jsonl", '{"step": 1, "index": 0}\n', "rows lack chosen_mean_logp, chosen_reward, chosen_tokens"),
])  # fmt: skip
def test_a_damaged_file_is_named(name, text, message, run):
    (run / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(run)


def test_a_row_without_a_number_where_one_is_needed_costs_that_row(run):
    path = run / "eval_pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[-1]["chosen_mean_logp"]
    rows[-2]["rejected_reward"] = float("nan")
    rows[-3]["step"] = "4"
    rows[-4]["index"] = None
    write_jsonl(path, rows)
    found = read_run(run)
    assert len(found.held_out) == 56
    assert found.notes == ("eval_pairs.jsonl: 4 malformed lines left out",)


@pytest.mark.parametrize("hash_", [None, 3, ["a"], {"a": 1}])
def test_hashes_that_are_none_leave_pairs_that_no_other_run_s_are_matched_by(hash_, run):
    path = run / "eval_pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_jsonl(path, [row | {"chosen_sha256": hash_} for row in rows])
    assert read_run(run).held_out.keys is None
    write_jsonl(path, [row | {"prompt_sha256": hash_} for row in rows])
    assert len(set(read_run(run).held_out.prompts)) == 60


@pytest.mark.parametrize("text", ["", '{"step": 1, "loss": 0.5}\n'])
def test_a_log_without_preferences_is_a_note_beside_pairs_and_refused_without(text, run):
    (run / "metrics.jsonl").write_text(text)
    found = read_run(run)
    assert verdict_of(found.signals()).name == "generalizing"
    assert found.notes == (f"metrics.jsonl: no preference metric in {len(text.splitlines())} records",)
    (run / "eval_pairs.jsonl").unlink()
    (run / "probe_pairs.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl: no preference metric"):
        read_run(run)


@pytest.mark.parametrize("objective", ["null", '"SimPO"', "3"])
def test_an_objective_that_is_not_told_as_a_run_tells_it_is_not_known(objective, run):
    (run / "environment.json").write_text(f'{{"objective": {objective}}}')
    assert read_run(run).objective is None


def test_a_step_that_was_chosen_on_held_out_pairs_is_so_too_where_they_are_scored_afterwards(run):
    (run / "environment.json").write_text('{"is_chosen_step": true}')
    assert verdict_of(read_run(run).signals()).name == "not decidable"


def test_a_folder_without_a_run_and_a_path_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run was logged here: neither"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="there is no such folder or log"):
        read_run(tmp_path / "typo")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    assert names_of([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    with pytest.raises(UserError, match="given twice"):
        names_of([tmp_path / "a", tmp_path / "a/../a"])


def test_a_held_out_log_is_shown_for_a_run_that_has_no_other(run, tmp_path):
    (run / "metrics.jsonl").unlink()
    (tmp_path / "log.jsonl").write_text(json.dumps({"accuracy": 0.5}))
    assert read_run(run, eval_log=tmp_path / "log.jsonl").log_signals().held_out_accuracy.last == 0.5


def test_a_held_out_log_belongs_to_one_run(run, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"accuracy": 0.5}))
    with pytest.raises(UserError, match="belongs to one run, and 2 were given"):
        read_runs([run, run], tmp_path / "log.jsonl")
