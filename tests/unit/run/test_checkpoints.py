"""Checkpoints: whole or absent, kept or deleted by step and owner, resumed only where they can be trusted."""

import hashlib
import hmac
import json
import logging
import multiprocessing
import os
import pickle
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml

from alignment.errors import UserError
from alignment.run.checkpoints import (
    MANIFEST,
    RECIPE_FILE,
    SET_ASIDE,
    STAGING,
    Checkpoint,
    Damaged,
    numbered,
    prune,
    publish,
    read_facts,
    seal,
    set_aside,
    signing_key,
    size,
    verify,
)
from alignment.run.resuming import (
    HARMLESS,
    checkpoint_to_resume,
    choice_of_attempt,
    newest_whole,
    recipe_differences,
    refuse_other_base,
    refuse_other_data,
    refuse_other_layout,
    refuse_other_recipe,
)

RECIPE = {
    "learning_rate": 1e-6,
    "beta": 2.0,
    "logging_steps": 5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dataset_mixer": {"me/pairs": 1.0},
}
FACTS = {
    "resumable": True,
    "run_id": "mine",
    "data": "same",
    "base": None,
    "strategy": "DDP or one process",
    "processes": 2,
    "rows_per_step": 8,
}
FILES = {
    "model.safetensors": bytes(range(100)),
    "optimizer.pt": b"moments",
    "scheduler.pt": b"rate",
    "rng_state_0.pth": b"random",
    "rng_state_1.pth": b"numbers",
    "trainer_state.json": b'{"global_step": 1}',
    "empty.txt": b"",
    "optimizer_0/__0_0.distcp": b"a shard",
    RECIPE_FILE: yaml.safe_dump(RECIPE).encode(),
}


FEW = {"model.safetensors": b"weights", "optimizer_0/__0_0.distcp": b"moments"}


@pytest.fixture(autouse=True)
def power_never_fails(monkeypatch):
    """No waiting for the disk; what is synced, and when, has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def save(run: Path, step: int, files: dict[str, bytes] = FILES, **facts: Any) -> Path:
    """A checkpoint as a run saves it: staged anew, sealed, renamed into place."""
    shutil.rmtree(run / STAGING, ignore_errors=True)
    staged, target = run / STAGING / f"checkpoint-{step}", run / f"checkpoint-{step}"
    write_files(staged, files)
    seal(staged, {"step": step, **FACTS, **facts})
    publish(staged, target)
    return target


def steps(run: Path) -> list[int]:
    return sorted(numbered(run))


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with two whole checkpoints, of which the older one was written last."""
    save(tmp_path, 20)
    save(tmp_path, 9)
    return tmp_path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save(tmp_path, 4)


# ---- What a manifest notices ----


def test_a_manifest_tells_the_size_and_digest_of_every_file_and_what_the_run_says(checkpoint):
    facts = read_facts(checkpoint)
    described = {name: (file["size"], file["sha256"]) for name, file in facts.pop("files").items()}
    assert described == {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()}
    assert facts == {"step": 4, **FACTS}
    assert verify(checkpoint) == Checkpoint(checkpoint, facts)


def deleted(path: Path) -> str:
    path.unlink()
    return "is missing"


def truncated(path: Path) -> str:
    whole = path.stat().st_size
    os.truncate(path, whole // 2)
    return f"has {whole // 2} bytes instead of {whole}"


def grown(path: Path) -> str:
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    return f"has {whole + 1} bytes instead of {whole}"


def bit_flipped(path: Path) -> str:
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2, bit=0))
    return r"was changed \(its SHA-256 differs\)"


def became_a_folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "is missing"


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


@pytest.mark.parametrize("damage", [deleted, truncated, grown, bit_flipped, became_a_folder])
@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_damage_to_any_file_is_noticed_and_the_file_is_named(checkpoint, name, damage):
    reason = damage(checkpoint / name)
    with pytest.raises(Damaged, match=f"^{name} {reason}$"):
        verify(checkpoint)


def test_a_checkpoint_without_its_manifest_is_none(checkpoint):
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(Damaged, match=rf"^it has no {MANIFEST}$"):
        verify(checkpoint)


def test_no_flipped_bit_of_a_manifest_changes_what_it_says(tmp_path):
    checkpoint = save(tmp_path, 4, FEW)
    path, whole = checkpoint / MANIFEST, verify(checkpoint)
    content = path.read_bytes()
    noticed = 0
    for position in range(len(content)):
        path.write_bytes(flipped(content, position, bit=position % 8))
        try:
            assert verify(checkpoint) == whole
        except Damaged as reason:
            assert MANIFEST in str(reason)  # noqa: PT017
            noticed += 1
    body = json.loads(content)["body"]
    assert noticed > len(body)  # what remains is the signature, which is looked at only where code would be loaded


def test_a_manifest_cut_short_anywhere_is_noticed(checkpoint):
    content = (checkpoint / MANIFEST).read_bytes().rstrip()
    for length in range(0, len(content), 7):
        (checkpoint / MANIFEST).write_bytes(content[:length])
        with pytest.raises(Damaged, match=f"its {MANIFEST} cannot be read"):
            verify(checkpoint)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]", b"null", b"{}", b'{"body": 1, "sha256": 2}', b'{"name": "an app"}'])
def test_another_programs_manifest_is_not_taken_for_ones_own(checkpoint, content):
    (checkpoint / MANIFEST).write_bytes(content)
    with pytest.raises(Damaged, match=f"its {MANIFEST} cannot be read"):
        verify(checkpoint)
    assert read_facts(checkpoint) == {}


@pytest.mark.parametrize(
    "name",
    [
        "model-00002-of-00002.safetensors",
        "pytorch_model.bin",
        "rng_state_2.pth",
        "since_last_log_2.json",
        "custom_checkpoint_0.pkl",
        "global_step4/mp_rank_00_model_states.pt",
        "latest",
        "optimizer_0/__1_0.distcp",
        "optimizer_0/.metadata",
        "modeling.py",
    ],
)
def test_a_file_that_a_trainer_would_load_is_noticed_if_the_manifest_does_not_name_it(checkpoint, name):
    write_files(checkpoint, {name: b"from elsewhere"})
    with pytest.raises(Damaged, match=f"^{name} is not in its manifest$"):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["notes.txt", "README.md", ".DS_Store", "plots/loss.png"])
def test_a_note_in_a_checkpoint_is_no_reason_to_lose_it(checkpoint, name):
    write_files(checkpoint, {name: b"best so far"})
    assert verify(checkpoint).step == 4


def test_a_linked_folder_is_noticed(checkpoint, tmp_path):
    write_files(tmp_path / "elsewhere", {".metadata": b"pickle"})
    (checkpoint / "pytorch_model_fsdp_0").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(Damaged, match="pytorch_model_fsdp_0"):
        verify(checkpoint)


def test_the_size_of_a_checkpoint_is_that_of_all_its_files(checkpoint):
    assert size(checkpoint) == sum(map(len, FILES.values())) + (checkpoint / MANIFEST).stat().st_size


# ---- The newest whole one ----


@pytest.mark.parametrize("damage", [deleted, truncated, bit_flipped])
@pytest.mark.parametrize("name", [MANIFEST, *(name for name, content in FILES.items() if content)])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_says_which_and_why(run, name, damage, caplog):
    damage(run / "checkpoint-20" / name)
    assert newest_whole(run).path == run / "checkpoint-9"
    [warning] = caplog.messages
    assert warning.startswith(f"Skipped {run / 'checkpoint-20'}: ")
    assert name in warning


def test_whole_checkpoints_are_no_reason_for_a_warning(run, caplog):
    assert newest_whole(run) == Checkpoint(run / "checkpoint-20", {"step": 20, **FACTS})
    assert caplog.messages == []


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_nothing(run):
    (run / "checkpoint-20" / "optimizer.pt").unlink()
    (run / "checkpoint-9" / MANIFEST).unlink()
    with pytest.raises(UserError) as error:
        newest_whole(run)
    assert str(error.value).splitlines() == [
        f"no checkpoint in {run} can be resumed:",
        "  checkpoint-20: optimizer.pt is missing",
        f"  checkpoint-9: it has no {MANIFEST}",
        "Start afresh with --resume_from_checkpoint=never.",
    ]


def test_weights_alone_cannot_be_gone_on_from(run, caplog):
    save(run, 30, resumable=False)
    assert newest_whole(run).step == 20
    assert "checkpoint-30: it holds weights only (save_only_model)" in caplog.text


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "missing") is None


@pytest.mark.parametrize("name", ["checkpoint-final", "checkpoint-30-tmp", "checkpoint-", "checkpoint--30", "my-checkpoint-30"])
def test_a_folder_that_only_sounds_like_a_checkpoint_is_none(run, name):
    shutil.copytree(run / "checkpoint-20", run / name)
    assert steps(run) == [9, 20]


def test_a_file_named_as_a_checkpoint_is_none(run):
    (run / "checkpoint-30").write_text("a note")
    assert steps(run) == [9, 20]


# ---- What is kept ----


def test_the_oldest_by_step_goes_though_it_was_touched_last(run):
    save(run, 30)
    os.utime(run / "checkpoint-9", (2e9, 2e9))
    prune(run, 2, "mine", best=None)
    assert steps(run) == [20, 30]


def test_the_newest_stays_whatever_the_limit(run):
    save(run, 30)
    prune(run, 1, "mine", best=None)
    assert steps(run) == [30]


@pytest.mark.parametrize("keep", [None, 0])
def test_no_limit_keeps_all(run, keep):
    prune(run, keep, "mine", best=None)
    assert steps(run) == [9, 20]


def test_a_stale_checkpoint_of_another_run_neither_goes_nor_pushes_out_a_newer_one(run):
    save(run, 1000, run_id="stale")
    prune(run, 1, "mine", best=None)
    assert steps(run) == [20, 1000]


@pytest.mark.parametrize("name", ["checkpoint-final", "checkpoint-10-tmp", "checkpoint-1"])
def test_a_folder_of_the_users_is_not_deleted(run, name):
    write_files(run / name, {"model.safetensors": b"precious"})
    prune(run, 1, "mine", best=None)
    assert (run / name / "model.safetensors").read_bytes() == b"precious"
    assert verify(run / "checkpoint-20")


def test_a_damaged_checkpoint_is_not_counted_as_kept(run):
    save(run, 30)
    (run / "checkpoint-30" / MANIFEST).unlink()
    prune(run, 1, "mine", best=None)
    assert steps(run) == [20, 30]


@pytest.mark.parametrize("spelling", ["absolute", "relative", "roundabout", "linked"])
def test_the_best_stays_however_its_path_is_spelt(run, spelling, monkeypatch, tmp_path_factory):
    save(run, 30)
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(run)
    monkeypatch.chdir(run.parent)
    spellings = {
        "absolute": run / "checkpoint-9",
        "relative": Path(run.name, "checkpoint-9"),
        "roundabout": run / "checkpoint-20" / ".." / "checkpoint-9",
        "linked": link / "checkpoint-9",
    }
    prune(Path(run.name), 1, "mine", best=str(spellings[spelling]))
    assert steps(run) == [9, 30]


def test_the_best_stays_when_the_run_was_moved(run):
    save(run, 30)
    prune(run, 1, "mine", best="/where/the/run/was/before/checkpoint-9")
    assert steps(run) == [9, 30]


def test_a_trainer_that_was_given_no_identity_keeps_to_the_limit_too(tmp_path):
    for step in (1, 2, 3):
        write_files(tmp_path / f"checkpoint-{step}", FILES)
        seal(tmp_path / f"checkpoint-{step}", {"step": step, "resumable": True})
    prune(tmp_path, 2, None, best=None)
    assert steps(tmp_path) == [2, 3]


def test_deleting_leaves_nothing_behind(run):
    prune(run, 1, "mine", best=None)
    assert [path.name for path in run.rglob("*") if "old" in path.name] == []
    assert not (run / STAGING).exists()


# ---- Into place ----


def test_a_published_checkpoint_leaves_no_staging_folder(checkpoint):
    assert not (checkpoint.parent / STAGING).exists()
    assert verify(checkpoint).step == 4


def test_a_step_that_is_saved_again_replaces_what_the_run_saved_before(checkpoint):
    save(checkpoint.parent, 4, {**FILES, "optimizer.pt": b"newer"})
    assert (checkpoint / "optimizer.pt").read_bytes() == b"newer"
    assert verify(checkpoint)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["_run", "checkpoint-4"]
    assert list((checkpoint.parent / "_run").iterdir()) == []


def test_a_folder_of_the_users_in_the_way_is_set_aside_whole(tmp_path):
    write_files(tmp_path / "checkpoint-4", {"a/b.txt": b"precious", "model.safetensors": b"mine"})
    verify(save(tmp_path, 4))
    aside = tmp_path / SET_ASIDE / "checkpoint-4.1"
    assert everything(aside) == ["a/b.txt", "model.safetensors"]
    assert (aside / "a/b.txt").read_bytes() == b"precious"


def test_a_checkpoint_of_another_run_in_the_way_is_set_aside(tmp_path):
    save(tmp_path, 4, run_id="another")
    save(tmp_path, 4)
    assert read_facts(tmp_path / SET_ASIDE / "checkpoint-4.1")["run_id"] == "another"


def test_what_is_set_aside_never_lands_on_what_was_set_aside_before(tmp_path):
    places = [set_aside(write_files(tmp_path / "checkpoint-4", {"x": content})) for content in (b"first", b"second")]
    assert [place.name for place in places] == ["checkpoint-4.1", "checkpoint-4.2"]
    assert [(place / "x").read_bytes() for place in places] == [b"first", b"second"]


def test_setting_aside_works_when_the_user_has_deleted_an_earlier_one(tmp_path):
    for content in (b"first", b"second"):
        set_aside(write_files(tmp_path / "checkpoint-4", {"x": content}))
    shutil.rmtree(tmp_path / SET_ASIDE / "checkpoint-4.1")
    assert (set_aside(write_files(tmp_path / "checkpoint-4", {"x": b"third"})) / "x").read_bytes() == b"third"


# ---- Cut short ----


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


CHANGES = ("fsync", "rename", "mkdir", "unlink", "rmdir", "open", "link")


def save_and_prune(run: Path, step: int, keep: int) -> None:
    save(run, step, FEW)
    prune(run, keep, "mine", best=None)


def kill_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """The number-th of these calls of os, and every later one, is not carried out."""
    count = 0

    def killing(original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= number:
                raise Killed
            return original(*args, **kwargs)

        return call

    for name in CHANGES:
        patch.setattr(os, name, killing(getattr(os, name)))


@pytest.fixture
def foreign(run):
    """In the way of step 30."""
    write_files(run / "checkpoint-30", {"notes.txt": b"precious"})


@pytest.fixture
def again(run):
    """The run saved step 30 before."""
    save(run, 30)


@pytest.fixture
def only(run):
    """The run saved step 30 before, and nothing else is left."""
    save(run, 30)
    prune(run, 1, "mine", best=None)


@pytest.fixture
def nothing(run):
    """At step 30."""


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(
    "there",
    [
        "nothing",
        "foreign",
        "again",
        "only",
    ],
)
def test_a_save_cut_short_anywhere_leaves_a_whole_checkpoint_and_the_next_save_succeeds(
    run, there, keep, request, tmp_path_factory
):
    request.getfixturevalue(there)
    before, number, killed = set(steps(run)), 0, True
    while killed:  # until the save is over before the kill
        number += 1
        folder = tmp_path_factory.mktemp("killed") / "run"
        shutil.copytree(run, folder)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(number, patch)
            try:
                save_and_prune(folder, 30, keep)
                killed = False
            except Killed:
                pass
        assert newest_whole(folder).step in {*before, 30}
        if there == "foreign":
            assert [path.read_bytes() for path in folder.rglob("notes.txt")] == [b"precious"]
        else:
            assert all(verify(path) for path in numbered(folder).values())
        save_and_prune(folder, 30, keep)
        assert [verify(path).step for _, path in sorted(numbered(folder).items())] == sorted({*before, 30})[-keep:]
        shutil.rmtree(folder)
    assert number > 20


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []

    def synced(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def renamed(source, target, original=os.rename, **kwargs) -> None:
        events.append(f"rename to {Path(target).name}")
        original(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    save(tmp_path, 4)
    content, rest = events[: len(FILES)], events[len(FILES) :]
    assert sorted(content) == sorted(Path(name).name for name in FILES)
    assert rest == [MANIFEST, "optimizer_0", "checkpoint-4", "rename to checkpoint-4", tmp_path.name]


# ---- Which one a run goes on from ----


@pytest.mark.parametrize("choice", [None, "auto", "true", "True"])
def test_by_itself_a_run_goes_on_from_the_newest_by_step(run, choice):
    assert checkpoint_to_resume(run, choice).path == run / "checkpoint-20"
    assert checkpoint_to_resume(run / "missing", choice) is None


@pytest.mark.parametrize("choice", ["never", "false", "False"])
def test_a_fresh_start_sets_aside_what_it_finds_and_deletes_nothing(run, choice):
    write_files(run / "checkpoint-final", {"model.safetensors": b"precious"})
    found = {step: everything(path) for step, path in numbered(run).items()}
    assert checkpoint_to_resume(run, choice) is None
    assert steps(run) == []
    assert checkpoint_to_resume(run, None) is None
    assert {step: everything(run / SET_ASIDE / f"checkpoint-{step}.1") for step in (9, 20)} == found
    assert (run / "checkpoint-final").is_dir()


def test_a_fresh_start_sets_aside_the_end_of_the_run_before(run):
    """An adapter beside a whole model would be loaded on top of it; micro-batches that had to be halved belong to their run."""
    old = {
        "adapter_model.safetensors": b"old",
        "adapter_config.json": b"{}",
        "eval_results.json": b"{}",
        "_run/status.json": b"{}",
        "_run/division.json": b"{}",
    }
    write_files(run, {**old, "notes.txt": b"mine", "metrics.jsonl": b"written anew"})
    checkpoint_to_resume(run, "never")
    assert {path.name: path.read_bytes() for path in (run / SET_ASIDE / "end.1").iterdir()} == {
        Path(name).name: content for name, content in old.items()
    }
    assert sorted(path.name for path in run.iterdir() if path.is_file()) == ["metrics.jsonl", "notes.txt"]
    write_files(run, {"model.safetensors": b"new"})
    checkpoint_to_resume(run, "never")
    assert (run / SET_ASIDE / "end.2/model.safetensors").read_bytes() == b"new"
    checkpoint_to_resume(run, "never")
    assert not (run / SET_ASIDE / "end.3").exists()


@pytest.mark.parametrize("choice", [None, "never", "elsewhere/checkpoint-4"])
def test_a_run_that_its_launcher_restarts_goes_on_from_what_it_saved(run, choice, tmp_path_factory):
    assert choice_of_attempt(choice, run, restarts=0) == choice
    assert choice_of_attempt(choice, run, restarts=1) is None
    assert choice_of_attempt(choice, tmp_path_factory.mktemp("empty"), restarts=1) == choice


def test_a_fresh_start_is_the_way_out_of_damage(run):
    for path in numbered(run).values():
        (path / MANIFEST).unlink()
    with pytest.raises(UserError, match="--resume_from_checkpoint=never"):
        checkpoint_to_resume(run, None)
    assert checkpoint_to_resume(run, "never") is None


def test_a_path_is_taken_wherever_it_is(run, tmp_path_factory):
    elsewhere = save(tmp_path_factory.mktemp("elsewhere"), 7)
    assert checkpoint_to_resume(run, str(elsewhere)) == Checkpoint(elsewhere, {"step": 7, **FACTS})
    assert checkpoint_to_resume(run, str(run / "checkpoint-9")).step == 9


def test_a_path_that_was_chosen_is_not_replaced_by_another_when_it_is_damaged(run):
    (run / "checkpoint-20" / "scheduler.pt").unlink()
    with pytest.raises(UserError) as error:
        checkpoint_to_resume(run, str(run / "checkpoint-20"))
    assert str(error.value) == (
        f"resume_from_checkpoint = '{run / 'checkpoint-20'}': no whole checkpoint is there; scheduler.pt is missing. "
        "One that was made elsewhere is taken with --trust_checkpoint."
    )
    with pytest.raises(UserError, match=rf"checkpoint-8': no whole checkpoint is there; it has no {MANIFEST}\.$"):
        checkpoint_to_resume(run, str(run / "checkpoint-8"))


def test_an_adapter_does_not_go_on_over_other_weights(tmp_path):
    checkpoint = verify(save(tmp_path, 4, base="abc"))
    refuse_other_base(checkpoint, "abc")
    with pytest.raises(UserError, match=r"is an adapter that was trained on other weights: .* \(abc then, def now\)\.\n"):
        refuse_other_base(checkpoint, "def")


def test_trust_does_not_make_a_damaged_checkpoint_whole(run):
    (run / "checkpoint-20" / "scheduler.pt").unlink()
    with pytest.raises(UserError, match=r"scheduler\.pt is missing\.$"):
        checkpoint_to_resume(run, str(run / "checkpoint-20"), trust=True)
    assert checkpoint_to_resume(run, None, trust=True).step == 9


def test_a_checkpoint_of_another_program_is_taken_only_on_trust(tmp_path):
    path = write_files(tmp_path / "theirs", {"model.safetensors": b"w", "trainer_state.json": b'{"global_step": 300}'})
    with pytest.raises(
        UserError, match=rf"it has no {MANIFEST}\. One that was made elsewhere is taken with --trust_checkpoint"
    ):
        checkpoint_to_resume(tmp_path, str(path))
    checkpoint = checkpoint_to_resume(tmp_path, str(path), trust=True)
    assert checkpoint == Checkpoint(path, {"step": 300})
    refuse_other_recipe(checkpoint, RECIPE, processes=4, rows_per_step=64)
    refuse_other_data(checkpoint, "whatever")
    refuse_other_layout(checkpoint, "DeepSpeed ZeRO-3", processes=4)


def test_weights_alone_are_refused_though_their_path_is_named(run):
    path = save(run, 30, resumable=False)
    with pytest.raises(UserError, match="holds weights only"):
        checkpoint_to_resume(run, str(path))


# ---- Whose code is run ----


class Payload:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


def as_torch(payload: Payload, path: Path) -> None:
    torch.save({"module": payload}, path)


def as_pickle(payload: Payload, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


@pytest.fixture
def trace(tmp_path) -> Path:
    return tmp_path / "the payload ran"


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Iterator[None]:
    """To be called with: inside, another user writes."""

    class Stranger:
        def __enter__(self) -> None:
            self.home = huggingface_hub.constants.HF_HOME
            monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home of a stranger"))

        def __exit__(self, *exception: object) -> None:
            monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", self.home)

    return Stranger()


LOADED_AS_CODE = [
    ("global_step4/x.pt", as_torch),
    ("pytorch_model_fsdp_0/.metadata", as_pickle),
    ("custom_checkpoint_0.pkl", as_pickle),
]


def hostile(run: Path, name: str, write: Callable[[Payload, Path], None], trace: Path) -> Path:
    content = run / "content"
    write(Payload(trace), content)
    return save(run, 4, {**FILES, name: content.read_bytes()})


@pytest.mark.parametrize(("name", "write"), LOADED_AS_CODE)
def test_code_in_a_strangers_checkpoint_is_refused_and_does_not_run(tmp_path, name, write, trace, stranger):
    with stranger:
        path = hostile(tmp_path, name, write, trace)
    for choice in (None, str(path)):
        with pytest.raises(UserError) as error:
            checkpoint_to_resume(tmp_path, choice)
        assert f"{path}: loading {name} would run whatever code it holds" in str(error.value)
        assert str(error.value).endswith("say so with --trust_checkpoint.")
    assert not trace.exists()
    if write is as_torch:  # it would have
        torch.load(path / name, weights_only=False)
    else:
        pickle.loads((path / name).read_bytes())
    assert trace.exists()


@pytest.mark.parametrize(("name", "write"), LOADED_AS_CODE)
def test_ones_own_checkpoint_is_resumed_whatever_it_is_made_of(tmp_path, name, write, trace, stranger):
    path = hostile(tmp_path, name, write, trace)
    assert checkpoint_to_resume(tmp_path, None).path == path
    with stranger, pytest.raises(UserError, match="was not written by you on this machine"):
        checkpoint_to_resume(tmp_path, None)


@pytest.mark.parametrize(("name", "write"), LOADED_AS_CODE)
def test_a_strangers_checkpoint_is_taken_on_trust(tmp_path, name, write, trace, stranger):
    with stranger:
        path = hostile(tmp_path, name, write, trace)
    for choice in (None, str(path)):
        assert checkpoint_to_resume(tmp_path, choice, trust=True).path == path


@pytest.mark.parametrize("target", ["payload", "../elsewhere", "."])
def test_deepspeeds_pointer_to_any_folder_counts_as_code(tmp_path, target, stranger):
    """DeepSpeed unpickles the folder that `latest` names, global_step or not."""
    files = {**FILES, "latest": target.encode(), "payload/mp_rank_00_model_states.pt": b"", "global_step4/notes.txt": b""}
    with stranger:
        save(tmp_path, 4, files)
    with pytest.raises(UserError, match="loading latest would run whatever code it holds"):
        checkpoint_to_resume(tmp_path, None)


def test_what_is_loaded_as_numbers_needs_no_signature(tmp_path, stranger):
    with stranger:
        path = save(tmp_path, 4)
    assert checkpoint_to_resume(tmp_path, None).path == path


def forge(manifest: Path, **changes: Any) -> None:
    """Change the body and make its digest right, as anybody can."""
    whole = json.loads(manifest.read_text())
    body = json.dumps({**json.loads(whole["body"]), **changes})
    manifest.write_text(json.dumps({**whole, "body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}))


def test_a_signature_covers_every_file_and_fact(tmp_path):
    path = save(tmp_path, 4, {**FILES, "latest": b"global_step4"})
    manifest = (path / MANIFEST).read_bytes()
    forge(path / MANIFEST, step=5)
    assert verify(path).step == 5
    with pytest.raises(UserError, match="was not written by you"):
        checkpoint_to_resume(tmp_path, None)
    (path / MANIFEST).write_bytes(manifest)
    (path / "latest").write_bytes(b"global_step5")
    with pytest.raises(UserError, match=r"latest was changed"):
        checkpoint_to_resume(tmp_path, None)


@pytest.mark.parametrize("signature", [None, "", "0" * 64, "absent"])
def test_no_signature_or_a_made_up_one_is_a_strangers(tmp_path, signature):
    path = save(tmp_path, 4, {**FILES, "latest": b"global_step4"})
    manifest = {**json.loads((path / MANIFEST).read_text()), "signature": signature}
    if signature == "absent":
        del manifest["signature"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was not written by you"):
        checkpoint_to_resume(tmp_path, None)


# ---- The key ----


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Nobody has signed anything here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_key_is_made_once_and_only_its_owner_can_read_it(home):
    key = signing_key()
    assert signing_key() == key
    assert len(key) == 32
    [path] = home.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_processes_that_need_the_key_at_the_same_time_get_the_same_one(home):
    context = multiprocessing.get_context("fork")
    start, keys = context.Barrier(8), context.Queue()

    def need() -> None:
        start.wait()
        keys.put(signing_key())

    processes = [context.Process(target=need) for _ in range(8)]
    for process in processes:
        process.start()
    made = {keys.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(timeout=20)
    assert made == {signing_key()}
    assert [path.name for path in home.iterdir()] == ["simpo_checkpoint_key"]


def test_the_key_of_a_process_that_was_faster_stays(home, monkeypatch):
    def slowly(count: int) -> bytes:
        (home / "simpo_checkpoint_key").write_bytes(b"the faster one's")
        return bytes(count)

    monkeypatch.setattr(secrets, "token_bytes", slowly)
    assert signing_key() == b"the faster one's"


def test_a_checkpoint_without_a_key_to_sign_it_is_saved_but_resumed_as_code_only_on_trust(home, tmp_path, caplog):
    home.write_text("a file in place of the folder")
    plain, sharded = save(tmp_path / "plain", 4), save(tmp_path / "sharded", 4, {**FILES, "latest": b"global_step4"})
    assert "Checkpoints are not signed" in caplog.text
    assert "--trust_checkpoint" in caplog.text
    assert checkpoint_to_resume(plain.parent, None).path == plain
    with pytest.raises(UserError, match="--trust_checkpoint"):
        checkpoint_to_resume(sharded.parent, None)
    assert checkpoint_to_resume(sharded.parent, None, trust=True).path == sharded


def test_an_empty_key_file_signs_nothing(home, tmp_path):
    """Power went before the key was on disk; with an empty key anybody could sign."""
    home.mkdir()
    (home / "simpo_checkpoint_key").touch()
    path = save(tmp_path, 4, {**FILES, "latest": b"global_step4"})
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["signature"] is None
    manifest["signature"] = hmac.new(b"", manifest["body"].encode(), "sha256").hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="--trust_checkpoint"):
        checkpoint_to_resume(tmp_path, None)


# ---- Another recipe, other data, another launch ----


def test_another_recipe_is_refused_with_every_key_that_differs_and_the_ways_out(checkpoint):
    changed = {**RECIPE, "beta": 10.0, "dataset_mixer": {"me/pairs": 0.5}}
    with pytest.raises(UserError) as error:
        refuse_other_recipe(verify(checkpoint), changed, processes=2, rows_per_step=8)
    assert str(error.value).splitlines() == [
        f"{checkpoint} was made by another recipe:",
        "  beta: 2.0 then, 10.0 now",
        "  dataset_mixer: {'me/pairs': 1.0} then, {'me/pairs': 0.5} now",
        "Choose another --output_dir, start afresh with --resume_from_checkpoint=never, or restore what was there; "
        f"--model_name_or_path={checkpoint} with another --output_dir starts a new run from its weights.",
    ]


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("logging_steps", 5, 10),
        ("save_steps", 100, 50),
        ("save_minutes", None, 30),
        ("save_total_limit", 2, None),
        ("on_save_failure", "continue", "stop"),
        ("eval_strategy", "no", "steps"),
        ("do_eval", True, False),
        ("report_to", "none", "wandb"),
        ("output_dir", "a", "b"),
        ("resume_from_checkpoint", None, "auto"),
        ("trust_checkpoint", False, True),
        ("skip_nonfinite", 0, 3),
        ("preprocessing_num_workers", 1, 8),
        ("dataset_num_proc", None, 4),
        ("dataloader_num_workers", 0, 4),
        ("per_device_eval_batch_size", 2, 8),
        ("ddp_timeout", 1800, 7200),
        ("hub_model_id", None, "me/model"),
        ("push_to_hub", False, True),
        ("max_tokens_per_micro_batch", "auto", 4096),
        ("recompute_layers", "auto", "all"),
    ],
)
def test_what_leaves_the_weights_alone_may_differ(key, before, now):
    assert recipe_differences({**RECIPE, key: before}, {**RECIPE, key: now}) == []


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("seed", 42, 43),
        ("data_seed", None, 7),
        ("learning_rate", 1e-6, 2e-6),
        ("lr_scheduler_type", "cosine", "linear"),
        ("warmup_steps", 0.1, 0.2),
        ("max_steps", -1, 100),
        ("num_train_epochs", 1, 2),
        ("per_device_train_batch_size", 2, 4),
        ("gradient_accumulation_steps", 2, 4),
        ("max_length", 2048, 1024),
        ("preprocessing", "published", "exact"),
        ("bad_rows", "refuse", "drop"),
        ("dataloader_drop_last", False, True),
        ("optim", "adamw_torch", "adamw_8bit"),
        ("weight_decay", 0.0, 0.1),
        ("max_grad_norm", 1.0, 0.0),
        ("bf16", True, False),
        ("lora_r", 16, 32),
        ("model_revision", "main", "v2"),
        ("pair_layout", "packed", "padded"),
    ],
)
def test_what_moves_the_weights_may_not(key, before, now):
    differing = recipe_differences({**RECIPE, key: before}, {**RECIPE, key: now})
    assert differing == [f"  {key}: {before!r} then, {now!r} now"]


def test_a_key_that_only_one_of_the_recipes_has_is_no_difference():
    """An update of the suite or of transformers brings and takes keys."""
    assert recipe_differences({**RECIPE, "dropped_key": 1}, {**RECIPE, "new_key": 2}) == []


def test_no_key_that_begins_as_a_harmless_one_is_passed_by_accident():
    harmless = [key for key in RECIPE if key.startswith(HARMLESS)]
    assert harmless == ["logging_steps"]


def test_the_same_rows_may_be_divided_among_another_number_of_processes(checkpoint):
    divided = {**RECIPE, "per_device_train_batch_size": 4, "num_processes": 1}
    refuse_other_recipe(verify(checkpoint), divided, processes=1, rows_per_step=8)
    with pytest.raises(UserError, match="per_device_train_batch_size: 2 then, 4 now"):
        refuse_other_recipe(verify(checkpoint), divided, processes=2, rows_per_step=8)


def test_other_steps_on_another_number_of_processes_are_refused_with_the_key_that_keeps_them(checkpoint):
    with pytest.raises(UserError) as error:
        refuse_other_recipe(verify(checkpoint), RECIPE, processes=1, rows_per_step=4)
    assert str(error.value).splitlines()[1] == (
        "  rows per step: 8 on 2 processes then, 4 on 1 now (--total_train_batch_size=8 keeps it)"
    )


def test_the_same_recipe_on_the_same_processes_is_resumed(checkpoint, caplog):
    refuse_other_recipe(verify(checkpoint), RECIPE, processes=2, rows_per_step=8)
    refuse_other_data(verify(checkpoint), "same")
    refuse_other_layout(verify(checkpoint), "DDP or one process", processes=2)
    assert caplog.messages == []


def test_other_data_under_the_same_recipe_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"checkpoint-4 was made with other data: .*\n.*--resume_from_checkpoint=never"):
        refuse_other_data(verify(checkpoint), "changed")


def saved_under(tmp_path: Path, strategy: str) -> Checkpoint:
    return verify(save(tmp_path, 4, strategy=strategy))


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("FSDP2 SHARDED_STATE_DICT", "DDP or one process"),
        ("DDP or one process", "FSDP2 FULL_STATE_DICT"),
        ("FSDP2 FULL_STATE_DICT", "FSDP2 SHARDED_STATE_DICT"),
        ("FSDP1 FULL_STATE_DICT", "FSDP2 FULL_STATE_DICT"),
        ("DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"),
        ("DeepSpeed ZeRO-3", "DDP or one process"),
    ],
)
def test_a_launch_that_could_not_read_the_checkpoint_is_refused_with_both_strategies(tmp_path, then, now):
    with pytest.raises(UserError, match=f"was saved under {then}, and this run is under {now}, which cannot read it"):
        refuse_other_layout(saved_under(tmp_path, then), now, processes=2)


@pytest.mark.parametrize("strategy", ["DDP or one process", "FSDP2 FULL_STATE_DICT", "FSDP2 SHARDED_STATE_DICT"])
def test_fewer_processes_go_on_with_a_warning(tmp_path, strategy, caplog):
    refuse_other_layout(saved_under(tmp_path, strategy), strategy, processes=1)
    [warning] = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.getMessage().startswith("Saved by 2 processes, resumed by 1: ")


@pytest.mark.parametrize("strategy", ["DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"])
@pytest.mark.parametrize("processes", [1, 4])
def test_deepspeed_goes_on_only_with_as_many_processes(tmp_path, strategy, processes):
    with pytest.raises(UserError, match=rf"saved by 2 processes, and this run has {processes}: .*--num_processes=2"):
        refuse_other_layout(saved_under(tmp_path, strategy), strategy, processes=processes)
    refuse_other_layout(saved_under(tmp_path, strategy), strategy, processes=2)
