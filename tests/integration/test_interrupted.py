"""What a run knows beside its weights outlives an interruption: the best step, the evaluations that are due, the way on."""

import json
from pathlib import Path

import pytest

from alignment.run.checkpoints import read_facts
from alignment.run.run_folder import read_status
from tests.forked import Ended, Server
from tests.integration.test_faults import END, TIMING, assert_same_end, go_on, metrics, steps
from tests.workspaces import read_jsonl

STEPS_PER_EPOCH = 4
BATCHES = 3  # of an evaluation
WEIGHTS = "model.safetensors"
# So fast that the first evaluation is the best one.
BEST = [
    "--use_peft=false", "--disable_dropout=true", "--learning_rate=0.03", "--load_best_model_at_end=true",
    "--metric_for_best_model=loss", "--eval_steps=2", "--save_steps=2",
]  # fmt: skip


def stop(server: Server, recipe: Path, folder: Path, *options: str, place: str, number: int, delay: float = 0.0) -> Ended:
    ended = server.run(
        str(recipe), f"--output_dir={folder}", *options,
        sabotage="signal_in", place=place, number=number, ranks=[0], delays=[delay], names=["SIGTERM"],
    )  # fmt: skip
    assert ended.status == 75, ended.printed
    return ended


def assert_ends_with_best(folder: Path, other: Path, step: int) -> None:
    states = [json.loads((run / "trainer_state.json").read_text()) for run in (folder, other)]
    assert [state["best_global_step"] for state in states] == [step, step]
    assert (folder / WEIGHTS).read_bytes() == (other / f"checkpoint-{step}" / WEIGHTS).read_bytes()
    assert metrics(folder) == metrics(other)


# ---- The best step ----


# The second run, for which worse is better, ends with its best step.
@pytest.mark.parametrize(("step", "options"), [(2, BEST), (6, [*BEST, "--greater_is_better=true", "--max_steps=6"])])
def test_a_run_stopped_in_the_evaluation_of_its_best_step_ends_with_that_step(
    step, options, server, recipe, unbroken, tmp_path
):
    options = [*options, "--save_total_limit=1"]
    stop(server, recipe, tmp_path, *options, place="evaluation", number=BATCHES * step // 2)
    go_on(server, recipe, tmp_path, *options)
    assert_ends_with_best(tmp_path, unbroken(*options), step)


@pytest.mark.parametrize(("place", "number"), [("training", 9), ("the end", 1)])
def test_a_run_whose_folder_was_moved_ends_with_its_best_step(place, number, server, recipe, unbroken, tmp_path):
    options = [*BEST, "--save_total_limit=1"]
    stop(server, recipe, tmp_path / "run", *options, place=place, number=number)
    (tmp_path / "run").rename(tmp_path / "moved")
    go_on(server, recipe, tmp_path / "moved", *options)
    assert_ends_with_best(tmp_path / "moved", unbroken(*options), 2)


def test_every_process_goes_back_to_the_best_step(server, recipe, tmp_path):
    go_on(server, recipe, tmp_path, *BEST, "--do_eval=true", processes=2)
    *during, last = [record["eval_loss"] for record in metrics(tmp_path) if "eval_loss" in record]
    assert min(during) < during[-1]
    assert last == min(during)


# ---- Evaluations that are due ----

EPOCH = "--eval_strategy=epoch"
LAST_IN_EPOCH = 2 * STEPS_PER_EPOCH  # micro-batches, two a step


@pytest.mark.parametrize(
    ("place", "number", "options"),
    [
        ("training", LAST_IN_EPOCH, ["--save_steps=2"]),
        ("training", LAST_IN_EPOCH, ["--save_strategy=epoch"]),
        ("training", LAST_IN_EPOCH, ["--save_strategy=no", "--logging_strategy=epoch"]),
        ("training", 2 * LAST_IN_EPOCH, ["--save_strategy=no"]),
        ("training", 12, ["--save_strategy=no", "--max_steps=6"]),
        ("training", 10, ["--save_strategy=no", "--logging_strategy=epoch"]),
        ("evaluation", 2, ["--save_steps=2"]),
        ("evaluation", 2, ["--save_steps=2", "--logging_strategy=epoch"]),
    ],
)
def test_a_run_stopped_at_the_end_of_an_epoch_makes_up_for_its_evaluation(
    place, number, options, server, recipe, unbroken, tmp_path
):
    stop(server, recipe, tmp_path, EPOCH, *options, place=place, number=number)
    go_on(server, recipe, tmp_path, EPOCH, *options)
    assert_same_end(tmp_path, unbroken(EPOCH, *options))


def test_a_step_whose_evaluation_was_cut_is_saved_with_what_the_end_of_its_epoch_logs(server, recipe, unbroken, tmp_path):
    options = ["--eval_steps=4", "--logging_strategy=epoch"]
    stop(server, recipe, tmp_path, *options, place="evaluation", number=2)
    go_on(server, recipe, tmp_path, *options)
    cut, whole = ([record for record in metrics(run) if "loss" in record] for run in (tmp_path, unbroken(*options)))
    assert [record["step"] for record in whole] == [4, 8]
    assert cut == whole
    assert (tmp_path / END).read_bytes() == (unbroken(*options) / END).read_bytes()


def test_a_run_killed_in_the_evaluation_of_an_epoch_makes_it_again(server, recipe, unbroken, tmp_path):
    options = [EPOCH, "--save_steps=2"]
    server.run(str(recipe), f"--output_dir={tmp_path}", *options, sabotage="die_in", place="evaluation", number=2, ranks=[0])
    go_on(server, recipe, tmp_path, *options)
    assert_same_end(tmp_path, unbroken(*options))


def test_no_checkpoint_of_an_unbroken_run_owes_an_evaluation(unbroken):
    folder = unbroken(EPOCH, "--save_steps=2")
    assert [read_facts(folder / f"checkpoint-{step}")["evaluation_due"] for step in steps(folder)] == [False, False]


def test_a_due_evaluation_is_dropped_where_evaluation_was_switched_off(server, recipe, tmp_path):
    stop(server, recipe, tmp_path, place="evaluation", number=2)
    assert read_facts(tmp_path / f"checkpoint-{max(steps(tmp_path))}")["evaluation_due"]
    go_on(server, recipe, tmp_path, "--do_eval=false", "--eval_strategy=no")
    assert not any("eval_loss" in record for record in metrics(tmp_path))


# ---- The log ----


def every_figure(folder: Path) -> list[dict]:
    """Also of the record that ends the training, which has times among its keys."""
    return [figures_of(record) for record in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("options", [[], ["--max_tokens_per_micro_batch=320"], ["--pair_layout=padded"]], ids=str)
@pytest.mark.parametrize(("place", "number"), [("training", 9), ("evaluation", BATCHES + 2), ("the end", 1)])
def test_every_key_of_a_resumed_run_s_log_is_that_of_an_unbroken_one(
    place, number, options, server, recipe, unbroken, tmp_path
):
    if place == "training" and "--max_tokens_per_micro_batch=320" in options:
        number = 5  # fewer calls, each of more pairs
    options = ["--eval_on_start=true", "--include_num_input_tokens_seen=non_padding", *options]
    stop(server, recipe, tmp_path, *options, place=place, number=number)
    go_on(server, recipe, tmp_path, *options)
    whole = unbroken(*options)
    assert every_figure(tmp_path) == every_figure(whole)
    assert figures(tmp_path / "train_results.json") == figures(whole / "train_results.json")
    (last,) = [record for record in every_figure(whole) if "train_loss" in record]
    losses = [record["loss"] for record in every_figure(whole) if "loss" in record]
    assert min(losses) < last["train_loss"] < max(losses)
    assert last["num_input_tokens_seen"] > 0


@pytest.mark.parametrize(("place", "number"), [("training", 3), ("evaluation", 2 * BATCHES), ("the end", 1)])
def test_a_resumed_run_stops_early_where_an_unbroken_one_does(place, number, server, recipe, unbroken, tmp_path):
    options = [*BEST, "--early_stopping_patience=2"]
    stop(server, recipe, tmp_path, *options, place=place, number=number)
    go_on(server, recipe, tmp_path, *options)
    assert_ends_with_best(tmp_path, unbroken(*options), 2)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 6


# ---- The data loader's workers ----


def test_a_signal_to_all_processes_leaves_the_workers_to_the_run(server, recipe, unbroken, tmp_path):
    options = ["--dataloader_num_workers=1", "--dataloader_prefetch_factor=1", "--save_strategy=no", "--eval_strategy=no"]
    stop(server, recipe, tmp_path, *options, place="training", number=1, delay=0.001)
    go_on(server, recipe, tmp_path, *options)
    assert_same_end(tmp_path, unbroken(*options))


# ---- The end, and the way on ----


@pytest.mark.parametrize("end", ["--max_steps=8", "--max_steps=6"])  # of an epoch, and in the middle of one
@pytest.mark.parametrize("place", ["the end", "evaluation"])
def test_a_run_that_saves_nothing_and_is_stopped_after_training_trains_no_step_again(
    place, end, server, recipe, unbroken, tmp_path
):
    options = ["--save_strategy=no", "--eval_strategy=no", "--do_eval=true", end]
    stop(server, recipe, tmp_path, *options, place=place, number=1)
    last = int(end.split("=")[1])
    assert steps(tmp_path) == [last]
    assert f"the same command goes on from step {last}" in read_status(tmp_path)["reason"]
    ended = go_on(server, recipe, tmp_path, *options)
    assert f"Resuming from {tmp_path / f'checkpoint-{last}'}" in ended.printed
    whole = unbroken(*options)
    assert_same_end(tmp_path, whole)
    for name in ("eval_pairs.jsonl", "probe_pairs.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert figures(tmp_path / "eval_results.json") == figures(whole / "eval_results.json")


def test_after_training_a_signal_to_one_of_two_processes_saves_on_both(server, recipe, tmp_path):
    options = ["--save_strategy=no", "--eval_strategy=no", "--do_eval=true"]
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}", *options, processes=2,
        sabotage="signal_in", place="evaluation", number=1, ranks=[1], delays=[0.0], names=["SIGTERM"],
    )  # fmt: skip
    assert ended.statuses == [75, 75], ended.printed
    assert steps(tmp_path) == [8]
    weights = (tmp_path / END).read_bytes()
    go_on(server, recipe, tmp_path, *options, processes=2)
    assert (tmp_path / END).read_bytes() == weights
    assert [record["step"] for record in metrics(tmp_path) if "eval_loss" in record] == [8]


def figures(path: Path) -> dict[str, float]:
    return figures_of(json.loads(path.read_text()))


def figures_of(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if not any(part in name for part in TIMING)}


def test_a_checkpoint_in_the_middle_of_an_epoch_that_ends_the_run_is_resumed_without_a_further_step(
    server, recipe, unbroken, tmp_path
):
    options = ["--save_steps=2", "--max_steps=6"]
    server.run(str(recipe), f"--output_dir={tmp_path}", *options, sabotage="die_in", place="the end", number=1, ranks=[0])
    assert not (tmp_path / END).exists()
    go_on(server, recipe, tmp_path, *options)
    assert_same_end(tmp_path, unbroken(*options))


def test_after_resuming_a_path_the_way_on_is_to_leave_the_path_out(server, recipe, tmp_path):
    stop(server, recipe, tmp_path / "first", place="training", number=3)
    path = tmp_path / "first" / "checkpoint-2"
    folder = tmp_path / "second"
    stop(server, recipe, folder, f"--resume_from_checkpoint={path}", place="training", number=3)
    reason = read_status(folder)["reason"]
    assert "the same command, without resume_from_checkpoint, goes on from step 4" in reason
    ended = go_on(server, recipe, folder)
    assert f"Resuming from {folder / 'checkpoint-4'}" in ended.printed


def test_a_path_that_was_resumed_elsewhere_is_no_checkpoint_of_this_run(server, recipe, tmp_path):
    stop(server, recipe, tmp_path / "first", place="evaluation", number=1)  # owes the evaluation of step 3
    path = tmp_path / "first" / "checkpoint-3"
    stop(server, recipe, tmp_path / "second", f"--resume_from_checkpoint={path}", place="evaluation", number=1)
    reason = read_status(tmp_path / "second")["reason"]
    assert reason.endswith("after step 3 of 8; nothing was trained in this attempt.")


def test_nobody_is_told_to_go_on_from_weights_alone(server, recipe, tmp_path):
    options = ["--save_only_model=true"]
    stop(server, recipe, tmp_path, *options, place="training", number=3)
    reason = read_status(tmp_path)["reason"]
    assert "goes on" not in reason
    assert "save_only_model keeps its weights and nothing to go on from" in reason
    assert "--resume_from_checkpoint=never" in reason
