"""One writer for each folder, and a status that is always whole."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignment.errors import UserError
from alignment.run import run_folder
from alignment.run.run_folder import (
    LOCK_FILE,
    STATUS_FILE,
    find_launch,
    folder_problems,
    mark_launch,
    only_writer,
    read_status,
    umask,
    write_status,
)

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.1)


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Starts a process that calls a function, and returns when that function says so."""
    with ExitStack() as ends:

        def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
            ready = FORK.Event()
            process = FORK.Process(target=function, args=(*arguments, ready.set))
            process.start()
            ends.callback(lambda: (process.kill(), process.join()))
            assert ready.wait(20)
            return process

        yield start


def hold(folder: Path, seconds: float, ready: Callable[[], None]) -> None:
    with only_writer(folder):
        write_status(folder, "training", step=3)
        ready()
        time.sleep(seconds)


def hold_with_a_worker(folder: Path, number: object, ready: Callable[[], None]) -> None:
    """As a run whose data is read by a process of its own, forked while the lock is held."""
    with only_writer(folder):
        worker = os.fork()
        if worker == 0:
            time.sleep(30)
            os._exit(0)
        number.value = worker
        ready()
        time.sleep(30)


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


# ---- The lock ----


def test_a_second_writer_is_refused_and_told_who_the_first_one_is(tmp_path, start, impatient):
    first = start(hold, tmp_path, 30)
    with pytest.raises(UserError) as error, only_writer(tmp_path):
        pytest.fail("two writers")
    assert str(error.value) == (
        f"output_dir = '{tmp_path}': another run is writing there (process {first.pid} on {socket.gethostname()}). Stop it, or "
        "choose another --output_dir."
    )


def test_a_first_writer_that_has_said_nothing_yet_has_no_name(tmp_path, start, impatient):
    start(hold, tmp_path, 30)
    (tmp_path / STATUS_FILE).unlink()
    with pytest.raises(UserError, match="it has not written its status yet"), only_writer(tmp_path):
        pytest.fail("two writers")


def test_a_refused_writer_leaves_the_folder_to_the_first(tmp_path, start, impatient):
    start(hold, tmp_path / "run", 30)
    for _ in range(2):
        with pytest.raises(UserError), only_writer(tmp_path / "run"):
            pytest.fail("two writers")
    assert read_status(tmp_path / "run")["step"] == 3
    assert (tmp_path / "run" / LOCK_FILE).exists()


def test_two_folders_have_two_writers(tmp_path, start, impatient):
    start(hold, tmp_path / "one", 30)
    with only_writer(tmp_path / "two"):
        write_status(tmp_path / "two", "training")


def test_a_writer_waits_for_one_that_is_about_to_end(tmp_path, start):
    start(hold, tmp_path, 0.5)
    with only_writer(tmp_path):
        assert read_status(tmp_path)["step"] == 3


def test_the_lock_of_a_killed_writer_is_free(tmp_path, start, impatient):
    kill(start(hold, tmp_path, 30))
    with only_writer(tmp_path):
        write_status(tmp_path, "training", step=4)
    assert read_status(tmp_path)["step"] == 4


def test_a_killed_writers_data_worker_which_writes_nothing_does_not_keep_the_lock(tmp_path, start, impatient):
    number = FORK.Value("i")
    kill(start(hold_with_a_worker, tmp_path, number))
    try:
        with only_writer(tmp_path):
            os.kill(number.value, 0)  # it is alive
    finally:
        os.kill(number.value, signal.SIGKILL)


@pytest.mark.parametrize("place", ["run", "run/deeper/still"])
def test_a_file_in_place_of_the_folder_is_the_users_mistake(tmp_path, place):
    (tmp_path / "run").write_text("a note")
    wrong = pytest.raises(UserError, match=r"^output_dir = '.*run.*': cannot be written \(.+\); choose another$")
    with wrong, only_writer(tmp_path / place):
        pytest.fail("no folder is there")
    assert (tmp_path / "run").read_text() == "a note"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_is_the_users_mistake(tmp_path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(UserError, match=r"cannot be written \(Permission denied\); choose another"),
        only_writer(tmp_path / "run"),
    ):
        pytest.fail("it cannot be written")


# ---- A folder that nothing was written into ----


def fail_in(folder: Path, *files: str) -> None:
    """A run that writes so many files, then is wrong; those that end in / are folders."""
    with only_writer(folder):
        for name in files:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("beta: 2")
        raise UserError("a wrong recipe")


def test_a_folder_left_empty_goes_again_with_the_parents_that_were_made_for_it(tmp_path):
    with pytest.raises(UserError, match="a wrong recipe"):
        fail_in(tmp_path / "runs" / "first")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_before_stays_though_it_is_empty(tmp_path):
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"):
        pass
    assert (tmp_path / "run").is_dir()


def test_a_folder_that_holds_anything_stays(tmp_path):
    with pytest.raises(UserError, match="a wrong recipe"):
        fail_in(tmp_path / "run", "recipe.yaml")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "beta: 2"


def test_an_empty_folder_inside_hides_no_error(tmp_path):
    with pytest.raises(UserError, match="a wrong recipe"):
        fail_in(tmp_path / "run", "logs/")


# ---- The status ----


def test_the_status_says_what_was_written_and_by_whom(tmp_path):
    with only_writer(tmp_path):
        write_status(tmp_path, "training", step=3, max_steps=8)
    status = read_status(tmp_path)
    assert time.strptime(status.pop("time"), "%Y-%m-%dT%H:%M:%S%z")
    assert status == {"state": "training", "step": 3, "max_steps": 8, "pid": os.getpid(), "host": socket.gethostname()}


def test_a_folder_without_a_run_has_no_status(tmp_path):
    assert read_status(tmp_path) is None
    assert read_status(tmp_path / "missing") is None


def write_many(folder: Path, ready: Callable[[], None]) -> None:
    ready()
    for step in range(10**9):
        write_status(folder, "training", step=step, padding="x" * 20_000)


def test_whoever_reads_the_status_while_it_is_written_reads_a_whole_one(tmp_path, start):
    (tmp_path / "_run").mkdir()
    write_status(tmp_path, "preparing", step=-1)
    start(write_many, tmp_path)
    seen, end = set(), time.monotonic() + 10
    while len(seen) < 50 and time.monotonic() < end:
        seen.add(read_status(tmp_path)["step"])
    assert len(seen) == 50


def test_a_status_that_could_not_be_written_is_a_warning_and_leaves_the_one_before(tmp_path, monkeypatch, caplog):
    (tmp_path / "_run").mkdir()
    write_status(tmp_path, "training", step=3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(OSError(28, "no space left")))
        write_status(tmp_path, "finished")
    assert read_status(tmp_path)["step"] == 3
    assert f"{tmp_path / '_run/status.json'} could not be written (no space left); the state is finished." in caplog.text
    write_status(tmp_path, "finished", step=4)
    assert read_status(tmp_path)["state"] == "finished"


@pytest.mark.parametrize("torn", ["", '{"state": "trai'])
def test_a_torn_status_is_none(tmp_path, torn):
    (tmp_path / "_run").mkdir()
    (tmp_path / "_run/status.json").write_text(torn)
    assert read_status(tmp_path) is None


# ---- One folder for all processes ----


def test_processes_that_see_one_folder_find_the_mark_of_the_launch(tmp_path):
    (tmp_path / "_run").mkdir()
    find_launch(tmp_path, mark_launch(tmp_path))


def test_a_process_that_sees_another_folder_says_so(tmp_path, monkeypatch):
    for folder in ("here", "there"):
        (tmp_path / folder / "_run").mkdir(parents=True)
    mark_launch(tmp_path / "here")  # of an earlier launch
    monkeypatch.setattr("alignment.run.run_folder.SHARING_S", 0.2)
    with pytest.raises(
        UserError, match=f"output_dir = '{tmp_path}/here': on .* is not the folder that the first process writes to"
    ):
        find_launch(tmp_path / "here", mark_launch(tmp_path / "there"))


# ---- Before a run ----


def advice(output_dir: Path, **values) -> list[str]:
    defaults = {"prepare_only": False, "model_name_or_path": None, "tokenizer_name_or_path": None, "dataset_mixer": None}
    problems = folder_problems(SimpleNamespace(**defaults | values, output_dir=str(output_dir)))
    return [problem.advice for problem in problems if problem.key == "output_dir"]


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "model-1-of-2.safetensors", "tokenizer.json", "metrics.jsonl", "chat_template.jinja"]
)
def test_a_folder_with_a_file_that_a_run_would_write_over_is_refused(name, tmp_path):
    (tmp_path / name).touch()
    (line,) = advice(tmp_path)
    assert line.startswith(f"{name} in it are no run's")


@pytest.mark.parametrize("name", ["slurm-17.out", "notes.txt", "logs", "train.log", "my.jinja"])
def test_other_files_in_the_way_are_no_hindrance(name, tmp_path):
    (tmp_path / name).touch()
    assert advice(tmp_path) == []


def test_a_run_s_own_folder_and_an_empty_or_missing_one_are_taken(tmp_path):
    assert advice(tmp_path) == []
    assert advice(tmp_path / "a" / "b") == []
    with only_writer(tmp_path):
        write_status(tmp_path, "training")
        (tmp_path / "README.md").touch()
    assert advice(tmp_path) == []


@pytest.mark.parametrize("key", ["model_name_or_path", "tokenizer_name_or_path", "dataset_mixer"])
@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../{name}", "{link}"])
def test_a_folder_that_the_run_is_started_from_is_refused_however_it_is_spelt(key, spelling, tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    path = spelling.format(folder, name="policy", link=tmp_path / "link")
    (line,) = advice(folder, **{key: {path: 1.0} if key == "dataset_mixer" else path})
    assert f"is a folder of {key}" in line
    assert advice(tmp_path / "run", **{key: {path: 1.0} if key == "dataset_mixer" else path}) == []


def test_a_pattern_that_would_match_the_run_s_own_records_is_refused(tmp_path):
    (line,) = advice(tmp_path, dataset_mixer={f"{tmp_path}/*.jsonl": 1.0})
    assert "is a folder of dataset_mixer" in line
    assert advice(tmp_path / "run", dataset_mixer={f"{tmp_path}/*.jsonl": 1.0}) == []
    assert advice(tmp_path, dataset_mixer={f"{tmp_path}/pairs.jsonl": 1.0}) == []


def test_the_base_of_an_adapter_is_such_a_folder_too(tmp_path):
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    assert len(advice(tmp_path / "base", model_name_or_path=str(tmp_path / "adapter"))) == 1


def test_what_no_file_system_takes_for_a_name_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in {
        "x" * 300: "too long",
        "y/" * 2500: "too long",
        "a\0b": "null byte",
        "loop/run": "symbolic links",
    }.items():
        (line,) = advice(tmp_path / name)
        assert reason in line


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert advice(tmp_path / "file") == [f"{tmp_path / 'file'} is a file; choose another"]
    assert advice(tmp_path / "file" / "run") == [f"{tmp_path / 'file'} is a file; choose another"]


def test_a_cache_that_cannot_be_written_is_named_with_the_variable_that_moves_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    values = SimpleNamespace(prepare_only=True, output_dir="run", model_name_or_path="me/policy")
    problems = folder_problems(values)
    assert [problem.key for problem in problems] == ["HF_DATASETS_CACHE", "HF_HUB_CACHE"]
    assert all("export " in problem.advice for problem in problems)
    values.model_name_or_path = str(tmp_path)  # a local one needs no copy from the Hub
    assert [problem.key for problem in folder_problems(values)] == ["HF_DATASETS_CACHE"]


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_the_umask_is_read_and_left(mask):
    before = os.umask(mask)
    try:
        assert [umask(), umask()] == [mask, mask]
    finally:
        assert os.umask(before) == mask
