"""Runs that are killed, stopped, starved or tampered with: each ends as the unbroken run does, or says why not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from alignment.run.run_folder import LOCK_FILE, read_status
from tests import builders
from tests.forked import ROOT, Ended, Server, free_port
from tests.workspaces import read_jsonl, save_model, write_recipe

STEPS = 8
TIMING = ("second", "runtime", "memory")
END = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def wide_model(recipe) -> Path:
    """128 wide, which bitsandbytes needs."""
    folder = recipe.parent / "wide"
    save_model(folder, hidden_size=128, initializer_range=0.1)
    return folder


@pytest.fixture(scope="module")
def unbroken(server, recipe, tmp_path_factory) -> Path:
    """The folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    ended = server.run(str(recipe), f"--output_dir={folder}")
    assert ended.status == 0, ended.printed
    assert steps(folder) == [6, 8]
    return folder


@pytest.fixture(scope="module")
def unbroken_pair(server, recipe, tmp_path_factory) -> Path:
    """The same on two processes."""
    folder = tmp_path_factory.mktemp("unbroken_pair")
    ended = server.run(str(recipe), f"--output_dir={folder}", processes=2)
    assert ended.statuses == [0, 0], ended.printed
    return folder


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def metrics(folder: Path) -> list[dict]:
    records = read_jsonl(folder / "metrics.jsonl")
    kept = [record for record in records if "train_runtime" not in record]
    return [{key: value for key, value in record.items() if not any(part in key for part in TIMING)} for record in kept]


def assert_same_end(folder: Path, other: Path) -> None:
    """Bit for bit: the final weights, and every figure that was logged on the way."""
    assert (folder / END).read_bytes() == (other / END).read_bytes()
    assert metrics(folder) == metrics(other)
    assert read_status(folder)["state"] == "finished"


def assert_unfinished(folder: Path, ended: Ended) -> None:
    assert ended.status != 0
    assert (read_status(folder) or {}).get("state") != "finished"


def go_on(server: Server, recipe: Path, folder: Path, *options: str, processes: int = 1) -> Ended:
    ended = server.run(str(recipe), f"--output_dir={folder}", *options, processes=processes)
    assert ended.status == 0, ended.printed
    return ended


# ---- Killed ----


@pytest.mark.parametrize(
    ("place", "number"), [("training", 6), ("evaluation", 5), ("saving", 3), ("writing", 2), ("the end", 1)]
)
def test_one_of_two_processes_killed_costs_no_more_than_the_last_save(place, number, server, recipe, unbroken_pair, tmp_path):
    rank = 0 if place == "saving" else 1  # only the first process describes a checkpoint
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}", processes=2, sabotage="die_in", place=place, number=number, ranks=[rank]
    )
    assert_unfinished(tmp_path, ended)
    ended = go_on(server, recipe, tmp_path, processes=2)
    assert ("Resuming from" in ended.printed) == (place != "writing" or number > 1)
    assert_same_end(tmp_path, unbroken_pair)


def test_the_launcher_restarts_a_run_that_lost_a_process(recipe, unbroken_pair, tmp_path):
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file=accelerate_configs/cpu.yaml",
        f"--main_process_port={free_port()}",
    ]
    elastic = ["--rdzv_backend=c10d", "--max_restarts=1", "tests/dies_once.py"]
    done = subprocess.run(
        [sys.executable, *launch, *elastic, str(recipe), f"--output_dir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"Resuming from {tmp_path / 'checkpoint-4'}" in done.stdout + done.stderr
    assert_same_end(tmp_path, unbroken_pair)


# ---- Damaged ----


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "changed in one bit": flip,
}


def test_no_damage_to_the_newest_checkpoint_changes_the_end(server, recipe, unbroken, tmp_path):
    checkpoint = unbroken / "checkpoint-8"
    names = sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    assert {END, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"} <= set(names)
    shutil.copytree(unbroken, tmp_path / "run")
    for number, name in enumerate(names):
        kind = list(DAMAGES)[number % len(DAMAGES)]
        folder = tmp_path / "again"
        shutil.copytree(tmp_path / "run", folder)
        (folder / END).unlink()
        DAMAGES[kind](folder / "checkpoint-8" / name)
        ended = go_on(server, recipe, folder)
        assert "Skipped" in ended.printed, (name, kind)
        assert f"Resuming from {folder / 'checkpoint-6'}" in ended.printed, (name, kind)
        assert (folder / END).read_bytes() == (unbroken / END).read_bytes(), (name, kind)
        shutil.rmtree(folder)


def test_when_every_checkpoint_is_damaged_the_run_asks_instead_of_starting_from_nothing(server, recipe, unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / END).unlink()
    for step in steps(folder):
        flip(folder / f"checkpoint-{step}" / "optimizer.pt")
    ended = server.run(str(recipe), f"--output_dir={folder}")
    assert ended.status == 2
    assert "checkpoint-8: optimizer.pt was changed" in ended.printed
    assert "--resume_from_checkpoint=never" in ended.printed
    go_on(server, recipe, folder, "--resume_from_checkpoint=never")
    assert (folder / END).read_bytes() == (unbroken / END).read_bytes()
    assert sorted(path.name for path in (folder / "_run/earlier").iterdir()) == ["checkpoint-6.1", "checkpoint-8.1", "end.1"]


# ---- Stopped ----


@pytest.mark.parametrize(
    ("place", "number", "step"),
    [("training", 11, 6), ("evaluation", 5, 6), ("saving", 2, 5), ("the end", 1, 8)],
)
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_end(place, number, step, server, recipe, unbroken, tmp_path):
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}",
        sabotage="signal_in", place=place, number=number, ranks=[0], delays=[0.0], names=["SIGTERM"],
    )  # fmt: skip
    assert ended.status == 75, ended.printed
    assert "Traceback" not in ended.printed
    status = read_status(tmp_path)
    assert status["state"] == "interrupted"
    assert f"stopped by SIGTERM after step {step} of {STEPS}" in status["reason"]
    assert max(steps(tmp_path)) == step
    assert place == "the end" or not (tmp_path / END).exists()
    go_on(server, recipe, tmp_path)
    assert_same_end(tmp_path, unbroken)


FULL = ["--use_peft=false", "--disable_dropout=true"]
KINDS = {
    "full": FULL,
    "padded": [*FULL, "--pair_layout=padded"],
    "by tokens": [*FULL, "--max_tokens_per_micro_batch=300"],
    "4-bit": ["--load_in_4bit=true", "--use_bnb_nested_quant=true", "--gradient_checkpointing=true"],
    "two workers": ["--dataloader_num_workers=2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_goes_on_in_the_middle_of_an_epoch_to_the_same_end(kind, server, recipe, wide_model, tmp_path):
    options = [*KINDS[kind], f"--model_name_or_path={wide_model}", "--eval_strategy=no", "--save_strategy=no"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go_on(server, recipe, whole, *options)
    ended = server.run(
        str(recipe), f"--output_dir={cut}", *options,
        sabotage="signal_in", place="training", number=6, ranks=[0], delays=[0.0], names=["SIGTERM"],
    )  # fmt: skip
    assert ended.status == 75, ended.printed
    assert steps(cut) == [2 if kind == "by tokens" else 3]
    go_on(server, recipe, cut, *options)
    weights = "model.safetensors" if FULL[0] in options else END
    assert (cut / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics(cut) == metrics(whole)


def test_a_signal_during_preparation_ends_it_at_once_and_leaves_nothing(server, recipe, tmp_path):
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path / 'run'}",
        sabotage="signal_in", place="preparation", number=1, ranks=[0], delays=[0.0], names=["SIGTERM"],
    )  # fmt: skip
    assert ended.status == 75
    assert "stopped by SIGTERM, before training began" in ended.printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "number", "ranks", "delays", "name"),
    [
        ("training", 6, [0], [0.0], "SIGTERM"),
        ("training", 6, [1], [0.08], "SIGTERM"),
        ("training", 5, [1], [0.0], "SIGUSR1"),
        ("evaluation", 3, [1], [0.0], "SIGUSR1"),
        ("writing", 2, [1], [0.0], "SIGTERM"),
    ],
)
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(
    place, number, ranks, delays, name, server, recipe, unbroken_pair, tmp_path
):
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}", processes=2,
        sabotage="signal_in", place=place, number=number, ranks=ranks, delays=delays, names=[name],
    )  # fmt: skip
    assert ended.statuses == [75, 75], ended.printed
    assert read_status(tmp_path)["state"] == "interrupted"
    assert not (tmp_path / END).exists()
    go_on(server, recipe, tmp_path, processes=2)
    assert_same_end(tmp_path, unbroken_pair)


def test_a_second_ctrl_c_does_not_wait_for_the_save(server, recipe, tmp_path):
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path}",
        sabotage="signal_in", place="training", number=3, ranks=[0], delays=[0.0, 0.0], names=["SIGINT", "SIGINT"],
    )  # fmt: skip
    assert ended.status == 130
    assert steps(tmp_path) == []


# ---- No room, no folder ----


def test_a_checkpoint_that_does_not_fit_is_no_end_of_the_run_and_leaves_no_torso(server, recipe, unbroken, tmp_path):
    limit = (unbroken / "checkpoint-8/optimizer.pt").stat().st_size - 1
    ended = server.run(str(recipe), f"--output_dir={tmp_path}", sabotage="full_disk_in", place="optimizer", limit=limit)
    assert ended.status == 0, ended.printed
    assert ended.printed.count("the checkpoint could not be saved") == 4
    assert steps(tmp_path) == []
    assert not (tmp_path / "_run/staging").exists()
    assert_same_end(tmp_path, unbroken)


def test_a_disk_that_is_full_after_training_is_one_message_and_the_same_command_goes_on(server, recipe, unbroken, tmp_path):
    ended = server.run(str(recipe), f"--output_dir={tmp_path}", sabotage="full_disk_in", place="figures", limit=0)
    assert ended.status == 1
    assert "error: [Errno 27] File too large" in ended.printed
    assert "Checkpoints are as they were; with room, the same command goes on." in ended.printed
    assert "Traceback" not in ended.printed
    go_on(server, recipe, tmp_path)
    assert_same_end(tmp_path, unbroken)


def test_or_it_is_the_end_if_the_recipe_says_so(server, recipe, tmp_path):
    options = ["--on_save_failure=stop", f"--output_dir={tmp_path}"]
    ended = server.run(str(recipe), *options, sabotage="little_room", free=1000)
    assert ended.status == 1
    assert "step 2: the checkpoint could not be saved: it needs about" in ended.printed
    assert "There is no older checkpoint." in ended.printed
    assert "Traceback" not in ended.printed
    assert read_status(tmp_path)["state"] == "failed"
    assert not (tmp_path / "_run/staging").exists()


def test_a_folder_that_another_run_is_writing_into_is_refused(server, recipe, unbroken, tmp_path):
    (tmp_path / LOCK_FILE).parent.mkdir()
    with FileLock(tmp_path / LOCK_FILE):
        ended = server.run(str(recipe), f"--output_dir={tmp_path}")
    assert ended.status == 2
    assert "another run is writing there" in ended.printed


# ---- Another start ----


def test_a_finished_run_is_not_run_again(server, recipe, unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.iterdir() if path.is_file()}
    ended = go_on(server, recipe, unbroken)
    assert "this run is finished" in ended.printed
    assert {path: path.stat().st_mtime_ns for path in unbroken.iterdir() if path.is_file()} == before


def test_of_a_run_that_lacks_only_its_end_only_that_is_done(server, recipe, unbroken, tmp_path):
    ended = server.run(str(recipe), f"--output_dir={tmp_path}", sabotage="die_in", place="the end", number=1, ranks=[0])
    assert_unfinished(tmp_path, ended)
    trained = (tmp_path / "train_results.json").read_text()
    ended = go_on(server, recipe, tmp_path)
    assert f"Resuming from {tmp_path / 'checkpoint-8'}" in ended.printed
    assert (tmp_path / "train_results.json").read_text() == trained
    assert_same_end(tmp_path, unbroken)


def test_changed_data_in_the_same_place_is_refused_and_a_recipe_key_is_named(server, recipe, unbroken, tmp_path):
    shutil.copytree(recipe.parent, tmp_path / "changed")
    folder = tmp_path / "run"
    moved = yaml.safe_load(recipe.read_text()) | {"dataset_mixer": {str(tmp_path / "changed/pairs"): 1.0}}
    write_recipe(tmp_path, moved)
    server.run(str(tmp_path / "recipe.yaml"), f"--output_dir={folder}", "--max_steps=2")
    train = tmp_path / "changed/pairs/train.jsonl"
    train.write_text(train.read_text() + json.dumps(builders.pairs(30)[-1]) + "\n")
    (folder / END).unlink()
    ended = server.run(str(tmp_path / "recipe.yaml"), f"--output_dir={folder}", "--max_steps=2")
    assert ended.status == 2
    assert "was made with other data" in ended.printed
    ended = server.run(str(tmp_path / "recipe.yaml"), f"--output_dir={folder}", "--max_steps=2", "--seed=7")
    assert ended.status == 2
    assert "seed: 42 then, 7 now" in ended.printed


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_steps_and_says_what_is_lost(
    before, now, server, recipe, unbroken, tmp_path
):
    without_dropout = "--disable_dropout=true"
    whole = tmp_path / "whole"
    go_on(server, recipe, whole, without_dropout)
    ended = server.run(
        str(recipe), f"--output_dir={tmp_path / 'run'}", without_dropout, processes=before,
        sabotage="signal_in", place="training", number=2 * (4 // (2 * before)) + 1, ranks=[0], delays=[0.0], names=["SIGTERM"],
    )  # fmt: skip
    assert ended.status == 75, ended.printed
    ended = go_on(server, recipe, tmp_path / "run", without_dropout, processes=now)
    assert f"Saved by {before} processes, resumed by {now}" in ended.printed
    last, expected = ([r for r in metrics(folder) if "eval_loss" in r][-1] for folder in (tmp_path / "run", whole))
    assert last["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
