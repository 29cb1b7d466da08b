"""Which checkpoint a run goes on from."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from alignment.checkpoints import RECIPE_FILE, checkpoint_to_resume
from alignment.errors import UserError

RECIPE = {
    "learning_rate": 1e-6,
    "beta": 2.0,
    "logging_steps": 5,
    "output_dir": "a",
    "dataset_mixer": {"me/pairs": 1.0},
}
# What the Trainer writes into a checkpoint of one process, without which it cannot go on as if nothing had happened.
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def add_checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(json.dumps({"global_step": step}) if name.endswith("json") else "weights")
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with two whole checkpoints, of which the older one was touched last."""
    add_checkpoint(tmp_path, 20)
    add_checkpoint(tmp_path, 9)
    return tmp_path


def test_the_newest_by_step_is_chosen(run):
    for choice in (None, "auto"):
        assert checkpoint_to_resume(run, choice, RECIPE) == run / "checkpoint-20"


def test_a_fresh_folder_is_a_fresh_start(tmp_path):
    assert checkpoint_to_resume(tmp_path, None, RECIPE) is None
    assert checkpoint_to_resume(tmp_path / "missing", None, RECIPE) is None


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lacks_a_file_is_skipped(run, name):
    (run / "checkpoint-20" / name).unlink()
    assert checkpoint_to_resume(run, None, RECIPE) == run / "checkpoint-9"


@pytest.mark.parametrize(
    "layout",
    [
        ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        ("model.safetensors.index.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"),
        ("pytorch_model_fsdp_0", "optimizer_0", "scheduler.pt", "rng_state_0.pth"),
        ("model.safetensors", "optimizer.bin", "scheduler.pt", "rng_state_0.pth"),
        ("latest", "global_step30", "rng_state_0.pth"),
    ],
    ids=["LoRA", "shards", "FSDP sharded", "FSDP full", "DeepSpeed"],
)
def test_a_checkpoint_of_every_strategy_is_whole(run, layout):
    folder = run / "checkpoint-30"
    for name in layout:
        (folder / name).mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(RECIPE))
    assert checkpoint_to_resume(run, None, RECIPE) == folder


def test_a_checkpoint_whose_last_file_is_cut_short_is_skipped(run):
    (run / "checkpoint-20" / "trainer_state.json").write_text('{"global_st')
    assert checkpoint_to_resume(run, None, RECIPE) == run / "checkpoint-9"


def test_a_folder_without_a_whole_checkpoint_is_a_fresh_start(run):
    for folder in run.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    assert checkpoint_to_resume(run, None, RECIPE) is None


@pytest.mark.parametrize("name", ["checkpoint-final", "checkpoint-30-tmp", "checkpoint-"])
def test_a_folder_that_only_sounds_like_a_checkpoint_is_none(run, name):
    shutil.copytree(run / "checkpoint-20", run / name)
    assert checkpoint_to_resume(run, None, RECIPE) == run / "checkpoint-20"


def test_another_recipe_is_refused_with_every_key_that_differs_and_the_ways_out(run):
    changed = {**RECIPE, "beta": 10.0, "dataset_mixer": {"me/pairs": 0.5}}
    with pytest.raises(UserError) as error:
        checkpoint_to_resume(run, None, changed)
    assert str(error.value).splitlines() == [
        f"{run / 'checkpoint-20'} was made by another recipe:",
        "  beta: 2.0 then, 10.0 now",
        "  dataset_mixer: {'me/pairs': 1.0} then, {'me/pairs': 0.5} now",
        "Choose another --output_dir, start afresh with --resume_from_checkpoint=never, or restore these values.",
    ]


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("logging_steps", 5, 10),
        ("save_steps", 100, 50),
        ("eval_strategy", "no", "steps"),
        ("report_to", "none", "wandb"),
        ("output_dir", "a", "b"),
        ("dataloader_num_workers", 0, 4),
        ("per_device_eval_batch_size", 2, 8),
    ],
)
def test_what_leaves_the_weights_alone_may_differ(run, key, before, now):
    (run / "checkpoint-20" / RECIPE_FILE).write_text(yaml.safe_dump({**RECIPE, key: before}))
    assert checkpoint_to_resume(run, None, {**RECIPE, key: now}) == run / "checkpoint-20"


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("seed", 42, 43),
        ("learning_rate", 1e-6, 2e-6),
        ("per_device_train_batch_size", 2, 4),
        ("max_length", 2048, 1024),
        ("preprocessing", "published", "exact"),
        ("dataloader_drop_last", False, True),
    ],
)
def test_what_moves_the_weights_may_not(run, key, before, now):
    (run / "checkpoint-20" / RECIPE_FILE).write_text(yaml.safe_dump({**RECIPE, key: before}))
    with pytest.raises(UserError, match=rf"{key}: {before!r} then, {now!r} now"):
        checkpoint_to_resume(run, None, {**RECIPE, key: now})


def test_a_checkpoint_of_unknown_origin_is_refused(run):
    (run / "checkpoint-20" / RECIPE_FILE).unlink()
    with pytest.raises(UserError, match=r"checkpoint-20 was not made by this suite .*--resume_from_checkpoint="):
        checkpoint_to_resume(run, None, RECIPE)


def test_never_starts_afresh_whatever_is_there(run):
    assert checkpoint_to_resume(run, "never", {**RECIPE, "beta": 10.0}) is None


def test_a_path_is_taken_on_trust_if_it_is_whole(run, tmp_path_factory):
    elsewhere = add_checkpoint(tmp_path_factory.mktemp("elsewhere"), 7)
    assert checkpoint_to_resume(run, str(elsewhere), {**RECIPE, "beta": 10.0}) == elsewhere
    (elsewhere / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"resume_from_checkpoint = '.*checkpoint-7': no whole checkpoint is there"):
        checkpoint_to_resume(run, str(elsewhere), RECIPE)
