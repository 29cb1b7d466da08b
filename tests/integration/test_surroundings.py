"""What a run is started from, prints to and writes into may be taken away, and it goes on, or saves and says so."""

import json
import stat
from pathlib import Path

import pytest

from alignment.run.run_folder import read_status
from tests.integration.test_faults import assert_same_end, go_on, metrics, steps

ONLY_AT_THE_END = ["--save_steps=1000000", "--eval_strategy=no"]


@pytest.fixture(scope="module")
def unbroken(server, recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    go_on(server, recipe, folder, *ONLY_AT_THE_END)
    return folder


def test_ctrl_c_behind_a_pipe_that_is_gone_saves_although_no_save_was_near(server, recipe, unbroken, tmp_path):
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}", *ONLY_AT_THE_END,
        sabotage="lose_output_in", place="training", number=5, names=["SIGINT"],
    )  # fmt: skip
    assert ended.status == 75
    assert steps(tmp_path) == [3]
    assert read_status(tmp_path)["state"] == "interrupted"
    go_on(server, recipe, tmp_path, *ONLY_AT_THE_END)
    assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize("options", [[], ["--disable_tqdm=false"]])
def test_a_run_whose_output_nobody_reads_any_more_reaches_its_end(options, server, recipe, unbroken, tmp_path):
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}", *ONLY_AT_THE_END, *options,
        sabotage="lose_output_in", place="training", number=3, names=[],
    )  # fmt: skip
    assert ended.status == 0
    assert_same_end(tmp_path, unbroken)


def test_a_terminal_that_is_closed_stops_a_run_where_nothing_is_lost(server, recipe, unbroken, tmp_path):
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}", *ONLY_AT_THE_END,
        sabotage="lose_output_in", place="training", number=5, names=["SIGHUP"],
    )  # fmt: skip
    assert ended.status == 75
    assert "stopped by SIGHUP after step 3" in read_status(tmp_path)["reason"]
    go_on(server, recipe, tmp_path, *ONLY_AT_THE_END)
    assert_same_end(tmp_path, unbroken)


def test_a_run_that_was_started_deaf_to_its_terminal_stays_so(server, recipe, unbroken, tmp_path):
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}", *ONLY_AT_THE_END,
        sabotage="deaf_in", place="training", number=5, names=["SIGHUP", "SIGINT"],
    )  # fmt: skip
    assert ended.status == 0, ended.printed
    assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_every_file_of_a_run_has_the_mode_that_the_umask_leaves(mask, server, recipe, tmp_path):
    options = ["--max_steps=2", "--eval_strategy=no", "--do_eval=true"]
    ended = server.run(str(recipe), f"--output_dir={tmp_path / 'run'}", *options, sabotage="under_umask", mask=mask)
    assert ended.status == 0, ended.printed
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes <= {0o666 & ~mask, 0o644 & ~mask}  # filelock gives its own file less
    weights = [*(tmp_path / "run").rglob("*.safetensors")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in weights} == {0o666 & ~mask}


def test_a_status_tells_the_step_and_the_number_of_steps_from_the_first_moment(server, recipe, tmp_path):
    server.run(
        str(recipe), f"--output_dir={tmp_path}", *ONLY_AT_THE_END, sabotage="die_in", place="training", number=1, ranks=[0]
    )
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["max_steps"]) == ("training", 0, 8)


def test_do_eval_false_evaluates_nothing_and_needs_no_test_split(server, recipe, tmp_path):
    ended = go_on(server, recipe, tmp_path, "--max_steps=4", "--do_eval=false", "--dataset_splits=train")
    assert "do_eval is false: eval_strategy = steps has no effect" in ended.printed
    assert not any(key.startswith("eval_") for record in metrics(tmp_path) for key in record)
    assert not (tmp_path / "eval_results.json").exists()


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_every_held_out_row_counts_once_though_training_drops_its_last_batch(rows, server, recipe, tmp_path):
    options = ["--dataloader_drop_last", f"--per_device_eval_batch_size={rows}", "--max_steps=2", "--eval_steps=2"]
    go_on(server, recipe, tmp_path, *options)
    steps = [json.loads(line)["step"] for line in (tmp_path / "eval_pairs.jsonl").read_text().splitlines()]
    assert steps == [0] * 6 + [2] * 6
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_samples"] == 6


def test_a_recipe_stops_a_run_that_no_longer_gets_better(server, recipe, tmp_path):
    options = [
        "--learning_rate=0.5",
        "--eval_steps=1",
        "--early_stopping_patience=2",
        "--metric_for_best_model=rewards/margins",
    ]
    ended = go_on(server, recipe, tmp_path, *options, "--use_peft=false", "--early_stopping_threshold=1000000")
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3
    assert "Stopping early, at step 3 of 8: eval_rewards/margins was no better in the last 2 evaluations." in ended.printed


@pytest.mark.parametrize("whole", ["true", "false"])
def test_a_run_that_ends_with_an_earlier_steps_weights_says_so_in_its_log_and_card(server, recipe, tmp_path, whole):
    options = ["--eval_steps=2", "--load_best_model_at_end", "--metric_for_best_model=loss", "--max_steps=4"]
    options += ["--greater_is_better=true"]  # the loss falls
    ended = go_on(server, recipe, tmp_path, f"--use_peft={whole}", *options)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["global_step"]) == (2, 4)
    told = f"of step 2, the best of 4 (loss {state['best_metric']:.4g})"
    assert f"Model saved to {tmp_path}: {told}." in ended.printed
    assert f", {told} |" in (tmp_path / "README.md").read_text()
    at_2, *_, at_end = [record["eval_loss"] for record in metrics(tmp_path) if "eval_loss" in record]
    assert at_end == at_2


def test_a_folder_with_files_of_somebody_s_is_refused_and_other_files_are_left_alone(server, recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own words")
    ended = server.run(str(recipe), f"--output_dir={tmp_path / 'mine'}")
    assert ended.status == 2
    assert "README.md in it are no run's" in ended.printed
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    (tmp_path / "mine" / "README.md").rename(tmp_path / "mine" / "slurm-17.log")
    go_on(server, recipe, tmp_path / "mine", "--max_steps=2")
    assert (tmp_path / "mine" / "slurm-17.log").read_text() == "my own words"
