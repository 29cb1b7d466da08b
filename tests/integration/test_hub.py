"""Runs that push to a Hub which is well, down, broken, slow or closed to them: none loses what it trained."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.run.run_folder import read_status
from tests.fakehub import FakeHub, Trouble
from tests.forked import Ended, Server
from tests.workspaces import recipe_keys, save_workspace, write_recipe

SECRET = "hf_secret0123456789"
NAME = "me/run"
RECIPE = {
    "preprocessing": "exact",
    "use_cpu": True,
    "max_length": 160,
    "max_prompt_length": 80,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "eval_strategy": "no",
    "do_eval": False,
    "logging_steps": 2,
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "push_to_hub": True,
    "hub_model_id": NAME,
    "hub_token": SECRET,
    "hub_minutes": 0.5,
}
END = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "recipe.yaml", "metrics.jsonl", "curves.png"}
CHECKPOINT = {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "manifest.json", "recipe.yaml"}


@pytest.fixture(scope="module")
def one_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.down()


@pytest.fixture
def hub(one_hub) -> FakeHub:
    one_hub.reset()
    return one_hub


def hub_environment(hub: FakeHub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="module")
def server(one_hub, tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), HF_TOKEN=SECRET, **hub_environment(one_hub))
    yield server
    server.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_workspace(folder, 8, 0, initializer_range=0.1)
    return write_recipe(folder, {**RECIPE, **recipe_keys(folder), "dataset_splits": ["train"]})


@pytest.fixture
def start(server, recipe, tmp_path):
    """Run the recipe into tmp_path/run; whatever comes of it, the token is nowhere but in requests."""

    def start(*options: str, **sabotage: Any) -> Ended:
        ended = server.run(str(recipe), f"--output_dir={tmp_path / 'run'}", *options, **sabotage)
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert SECRET not in ended.printed
        assert [path.name for path in written if SECRET.encode() in path.read_bytes()] == []
        assert [path.name for path in written if path.name == "training_args.bin"] == []
        return ended

    return start


def assert_pushed(hub: FakeHub, folder: Path) -> None:
    """The end of the run is on the Hub, and nothing that has no business there."""
    files = hub.repositories[NAME]
    assert set(files) >= END
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert [path for path in files if "_run" in path or "training_args" in path] == []
    assert [path for path in files if path.startswith("checkpoint-") and "/" not in path] == []
    assert hub.tokens == {SECRET}
    assert read_status(folder)["state"] == "finished"
    assert read_status(folder)["pushed"] is True


def assert_saved_but_not_pushed(ended: Ended, folder: Path) -> None:
    assert ended.status == 1, ended.printed
    assert (folder / "model.safetensors").exists()
    assert (folder / "README.md").exists()
    status = read_status(folder)
    assert (status["state"], status["pushed"], status["step"]) == ("finished", False, 4)
    assert "could not be pushed" in status["reason"]
    message = ended.printed.rpartition("error: ")[2]
    assert f"all of it is saved in {folder}" in message
    assert f"hf upload {NAME} {folder} ." in message
    assert "Traceback" not in ended.printed


@pytest.mark.parametrize(
    ("strategy", "checkpoints"),
    [
        ("end", []),
        ("every_save", []),
        ("checkpoint", ["last-checkpoint"]),
        ("all_checkpoints", ["checkpoint-2", "checkpoint-4"]),
    ],
)
def test_each_strategy_sends_what_it_says_and_no_more(start, hub, tmp_path, strategy, checkpoints):
    older = {"last-checkpoint/left-over.pt": b"of an older checkpoint"} if strategy == "checkpoint" else {}
    hub.repositories[NAME] = {**older, "LICENSE": b"written there"}
    ended = start(f"--hub_strategy={strategy}")
    assert ended.status == 0, ended.printed
    assert_pushed(hub, tmp_path / "run")
    files = hub.repositories[NAME]
    assert "LICENSE" in files
    assert older.keys().isdisjoint(files)
    assert sorted({path.split("/")[0] for path in files if "/" in path}) == checkpoints
    for name in checkpoints:
        sent = {path.removeprefix(f"{name}/") for path in files if path.startswith(f"{name}/")}
        assert sent >= CHECKPOINT
        step = json.loads(files[f"{name}/trainer_state.json"])["global_step"]
        assert step == (4 if name == "last-checkpoint" else int(name.partition("-")[2]))


def test_a_hub_that_is_down_costs_a_push_which_the_same_command_makes_up_for(start, hub, tmp_path):
    hub.down()
    try:
        ended = start("--hub_minutes=0.05", "--hub_strategy=every_save")
    finally:
        hub.up()
    assert_saved_but_not_pushed(ended, tmp_path / "run")
    assert "WARNING: The Hub could not be asked for me/run" in ended.printed
    assert "WARNING: checkpoint-2 was not pushed to the Hub" in ended.printed

    weights = (tmp_path / "run/model.safetensors").stat()
    again = start()
    assert again.status == 0, again.printed
    assert "Pushed to the Hub" in again.printed
    assert "Resuming" not in again.printed
    assert (tmp_path / "run/model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert_pushed(hub, tmp_path / "run")

    hub.asked.clear()
    third = start()
    assert "nothing is left to do" in third.printed
    assert hub.asked["commit"] == 0


def test_a_hub_that_is_away_for_a_moment_costs_nothing(start, hub, tmp_path):
    hub.trouble = {"create": Trouble(503, times=1), "commit": Trouble(500, times=1)}
    ended = start("--hub_strategy=end")
    assert ended.status == 0, ended.printed
    assert "WARNING: The Hub could not be asked" in ended.printed
    assert "WARNING: Not pushed to the Hub: " in ended.printed
    assert hub.asked["commit"] == 2
    assert_pushed(hub, tmp_path / "run")


def test_commits_that_fail_are_told_with_their_step_and_tried_again_at_the_end(start, hub, tmp_path):
    hub.trouble = {"commit": Trouble(500)}
    ended = start("--hub_strategy=checkpoint", "--hub_always_push=true", "--hub_minutes=0.06")
    assert_saved_but_not_pushed(ended, tmp_path / "run")
    for step in (2, 4):
        assert re.search(rf"WARNING: checkpoint-{step} was not pushed to the Hub: .*500", ended.printed)
    assert hub.asked["commit"] == 4  # two checkpoints, and two attempts at the end
    assert hub.repositories[NAME] == {}

    hub.trouble = {}
    command = shlex.split(next(line for line in ended.printed.splitlines() if line.startswith("hf upload")))
    done = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        env={**os.environ, **hub_environment(hub), "HF_TOKEN": SECRET, "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert set(hub.repositories[NAME]) >= END
    assert [path for path in hub.repositories[NAME] if "/" in path] == []


def test_a_checkpoint_that_is_slow_to_arrive_does_not_replace_the_end(start, hub, tmp_path):
    hub.trouble = {"commit": Trouble(seconds=1.5, times=1)}
    ended = start("--hub_strategy=every_save")
    assert ended.status == 0, ended.printed
    assert hub.commits[0] == "Training in progress, checkpoint-2"
    assert hub.commits[-1] == "End of training"
    assert_pushed(hub, tmp_path / "run")


@pytest.mark.parametrize(("slow", "strategy"), [("commit", "end"), ("blob", "every_save")])
def test_a_hub_that_never_answers_holds_a_run_up_no_longer_than_hub_minutes(start, hub, tmp_path, slow, strategy):
    hub.trouble = {slow: Trouble(504, seconds=40)}
    ended = start("--hub_minutes=0.03", f"--hub_strategy={strategy}")
    assert_saved_but_not_pushed(ended, tmp_path / "run")
    assert "it took longer than hub_minutes = 0.03" in ended.printed
    assert ended.seconds < 20


def test_a_signal_ends_a_push_which_the_same_command_makes_up_for(start, hub, tmp_path):
    signal = {"place": "pushing", "number": 1, "ranks": [0], "delays": [0.0], "names": ["SIGTERM"]}
    ended = start("--hub_strategy=end", sabotage="signal_in", **signal)
    assert ended.status == 75, ended.printed
    assert "stopped by SIGTERM: this run is finished" in ended.printed
    assert hub.repositories[NAME] == {}
    assert read_status(tmp_path / "run")["pushed"] is False

    again = start()
    assert again.status == 0, again.printed
    assert "Resuming" not in again.printed
    assert_pushed(hub, tmp_path / "run")


@pytest.mark.parametrize(("kind", "status"), [("create", 401), ("permission", 403)])
def test_a_token_that_may_not_push_is_refused_before_anything_is_loaded(start, hub, tmp_path, kind, status):
    hub.trouble = {kind: Trouble(status)}
    ended = start()
    assert ended.status == 2
    assert f"does not let this token write to '{NAME}'" in ended.printed
    assert f"{status}" in ended.printed
    assert "--push_to_hub=false" in ended.printed
    assert not (tmp_path / "run").exists()


def test_a_name_that_no_repository_can_have_is_refused(start, hub, tmp_path):
    ended = start("--hub_model_id=me/my/run")
    assert ended.status == 2
    assert "hub_model_id = 'me/my/run'" in ended.printed


# ---- A finished run, afterwards ----


PUSH = "scripts/push_run.py"


@pytest.fixture(scope="module")
def finished(server, recipe, tmp_path_factory) -> Path:
    """A run that nobody asked to push."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ended = server.run(str(recipe), f"--output_dir={folder}", "--push_to_hub=false")
    assert ended.status == 0, ended.printed
    (folder / "notes.txt").write_text("my own")
    return folder


def push(server: Server, folder: Path, *options: str, **sabotage: Any) -> Ended:
    ended = server.run(str(folder), *options, method=PUSH, **sabotage)
    assert SECRET not in ended.printed
    assert "Traceback" not in ended.printed, ended.printed
    return ended


MODEL_ALONE = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def test_a_list_says_what_would_be_sent_and_asks_the_hub_for_nothing(server, hub, finished):
    ended = push(server, finished, "--list", "--private", "--hub_revision=dev")
    assert ended.status == 0, ended.printed
    assert f"{NAME}, branch dev, private: {len(MODEL_ALONE)} files" in ended.printed
    would, _, stay = ended.printed.partition("These would stay here: ")
    assert {line.split()[-1] for line in would.splitlines() if line.startswith("  ")} == MODEL_ALONE
    for name in ("checkpoint-4/", "recipe.yaml", "metrics.jsonl", "notes.txt", "_run/"):
        assert name in stay
    assert not hub.asked


def test_a_finished_run_is_sent_without_its_records_and_checkpoints(server, hub, finished):
    ended = push(server, finished)
    assert ended.status == 0, ended.printed
    assert set(hub.repositories[NAME]) == MODEL_ALONE
    assert hub.repositories[NAME]["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    assert hub.tokens == {SECRET}
    assert read_status(finished)["pushed"] is True


def test_records_and_checkpoints_are_sent_where_they_are_asked_for_to_the_branch_that_is_named(server, hub, finished):
    ended = push(server, finished, "--records", "--checkpoints", "--hub_revision=dev", "--hub_model_id=me/other")
    assert ended.status == 0, ended.printed
    assert hub.repositories["me/other"] == {}
    sent = set(hub.repositories["me/other@dev"])
    assert sent >= MODEL_ALONE | {"warnings.jsonl", *(f"checkpoint-4/{name}" for name in CHECKPOINT)}
    written = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    kept = {path for path in written - sent if not path.startswith("_run/")}
    assert {path.rpartition("/")[2] for path in kept} <= {"notes.txt", "training_args.bin"}, kept
    assert not [path for path in sent if path.startswith("_run") or "training_args" in path or path == "notes.txt"]


def test_a_merged_model_is_sent_though_it_is_no_run(server, hub, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "merged", ignore=shutil.ignore_patterns("checkpoint-*", "_run"))
    (tmp_path / "merged/merged_from.json").write_text("{}")
    ended = push(server, tmp_path / "merged", "--hub_model_id=me/merged")
    assert ended.status == 0, ended.printed
    assert set(hub.repositories["me/merged"]) == MODEL_ALONE
    assert not (tmp_path / "merged/_run").exists()


def test_a_push_that_is_stopped_says_how_to_go_on(server, hub, finished):
    stop = {"place": "uploading", "number": 1, "ranks": [0], "delays": [0.0], "names": ["SIGTERM"]}
    ended = push(server, finished, sabotage="signal_in", **stop)
    assert ended.status == 75, ended.printed
    assert f"hf upload {NAME} {finished} . --include=README.md" in ended.printed
    assert "model.safetensors" not in hub.repositories[NAME]


@pytest.mark.parametrize(
    "kind", ["nothing", "another folder", "half a run", "an adapter of a folder", "an adapter of what it merged"]
)
def test_what_is_no_finished_run_that_others_can_use_is_refused(server, hub, finished, tmp_path, kind):
    folder = tmp_path / "run"
    bases = {"an adapter of a folder": "/models/sft", "an adapter of what it merged": "outputs/base"}
    if kind != "nothing":
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoint-*", "_run"))
    if kind == "half a run" or kind in bases:
        (folder / "_run").mkdir()
        state = "training" if kind == "half a run" else "finished"
        (folder / "_run/status.json").write_text(json.dumps({"state": state}))
    if kind in bases:
        (folder / "base").mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": bases[kind]}))
    told = {
        "nothing": "there is no such folder",
        "another folder": "is neither a run's folder nor a model that scripts/merge_adapter.py left",
        "half a run": "this run is not finished: training",
        **dict.fromkeys(bases, f"scripts/merge_adapter.py {folder} MERGED"),
    }
    ended = push(server, folder)
    assert ended.status == 2
    assert told[kind] in ended.printed
    assert not hub.asked


def test_a_token_that_may_not_write_is_the_user_s_mistake_and_a_hub_that_is_down_is_not(server, hub, finished):
    hub.trouble = {"permission": Trouble(403)}
    ended = push(server, finished)
    assert ended.status == 2
    assert f"hub_model_id = '{NAME}': the Hub does not let this token write" in ended.printed
    assert "or HF_TOKEN) or another --hub_model_id" in ended.printed
    hub.down()
    try:
        ended = push(server, finished)
    finally:
        hub.up()
    assert ended.status == 1
    assert "Nothing was sent" in ended.printed
