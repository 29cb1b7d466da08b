"""Data is prepared once: ahead of the run, by one process at a time, and again where what was made is damaged."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import config as datasets_config

from alignment import pipeline
from alignment.data import chat, tokenization
from alignment.data.splits import CONVERSATIONS, PAIRS
from alignment.launch.turns import one_process_at_a_time
from alignment.pipeline import Method, main, run
from alignment.run.records import write_jsonl
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders
from tests.workspaces import recipe_of_run, save_chats, save_splits, save_workspace

ROOT = Path(__file__).parents[2]
SIMPO = Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS)
SFT = Method(config=SFTConfig, trainer=SFTTrainer, data=CONVERSATIONS)
# As a recipe for GPUs has it.
GPU_KEYS = {"bf16": True, "tf32": True, "attn_implementation": "flash_attention_2", "use_cpu": None}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    rows = save_workspace(folder, 8, 6, initializer_range=0.1)
    save_chats(folder / "chats", rows, 8)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of data sets."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def recipe_file(workspace: Path, folder: Path, **changes) -> str:
    """A recipe of two steps; a change to None leaves a key out."""
    keys = {
        "attn_implementation": "sdpa",
        "preprocessing": "exact",
        "use_cpu": True,
        "max_length": 160,
        "max_prompt_length": 80,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "do_eval": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return recipe_of_run(workspace, folder, keys, changes)


def refusal(recipe: str, capsys: pytest.CaptureFixture, method: Method = SIMPO) -> str:
    """What a run prints that ends as a user's mistake."""
    with pytest.raises(SystemExit) as exit_:
        main(method, [recipe])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def cached_files(cache: Path) -> dict[str, int]:
    """Name -> when it was last written, of every file with rows."""
    return {str(path): path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}


def token_files(cache: Path) -> list[Path]:
    """Of the token ids, by size."""
    texts_and_tokens = sorted((cache / "simpo").glob("*.arrow"))
    return [path for path in texts_and_tokens if b"chosen_input_ids" in path.read_bytes()]


def tokenized(recipe: str) -> dict[str, list]:
    """What a run would train on."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        original = pipeline.tokenized_splits
        patch.setattr(pipeline, "tokenized_splits", lambda *args: seen.update(splits := original(*args)) or splits)
        run(SIMPO, [recipe, "--prepare_only"])
    return {name: rows[:] for name, rows in seen.items()}


# ---- What prefers nothing ----


@pytest.mark.parametrize("differ", ["nowhere", "behind max_length"])
def test_pairs_that_are_all_the_same_twice_are_refused_before_anything_is_loaded(differ, workspace, tmp_path, capsys, cache):
    rows = builders.pairs(6)
    for row in rows:
        same = "river " * 200 if differ == "behind max_length" else "the same"
        row["chosen"] = [*row["chosen"][:-1], {"role": "assistant", "content": same}]
        row["rejected"] = [*row["chosen"][:-1], {"role": "assistant", "content": f"{same}!" if "max" in differ else same}]
    save_splits(tmp_path / "pairs", rows, builders.pairs(2))
    recipe = recipe_file(workspace, tmp_path, dataset_mixer={str(tmp_path / "pairs"): 1.0})
    error = refusal(recipe, capsys)
    assert "error: train: chosen and rejected are the same tokens in every row (6), so that their gradients cancel" in error
    assert not (tmp_path / "run/model.safetensors").exists()
    write_jsonl(tmp_path / "pairs/train.jsonl", [*rows, *builders.pairs(1)])
    run(SIMPO, [recipe, "--prepare_only"])  # one that prefers something is enough


# ---- Ahead of the run ----


def test_data_is_prepared_without_launcher_gpu_or_weights_and_the_run_then_computes_nothing(
    workspace, tmp_path, cache, monkeypatch
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (workspace / "model").iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    recipe = recipe_file(workspace, tmp_path, model_name_or_path=str(bare), **GPU_KEYS)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "scripts/run_simpo.py", recipe, "--prepare_only"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train: 8 rows read" in done.stdout
    assert "test: 6 rows read" in done.stdout
    assert not (tmp_path / "run").exists()
    before = cached_files(cache)
    assert len(token_files(cache)) == 2

    def again(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(tokenization, "encode_texts", again)
    monkeypatch.setattr(chat, "render", again)
    run(SIMPO, [recipe_file(workspace, tmp_path)])
    assert cached_files(cache) == before
    assert (tmp_path / "run/model.safetensors").exists()


def test_supervised_data_is_prepared_ahead_too(workspace, tmp_path, cache, monkeypatch):
    keys = {"dataset_mixer": {str(workspace / "chats"): 1.0}, "max_prompt_length": None}
    recipe = recipe_file(workspace, tmp_path, **keys, **GPU_KEYS)
    assert run(SFT, [recipe, "--prepare_only"]) is None
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(tokenization, "encode_texts", None)
    run(SFT, [recipe_file(workspace, tmp_path, **keys)])
    assert (tmp_path / "run/model.safetensors").exists()


def test_forked_workers_find_the_tokenizers_threads_switched_off(workspace, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    run(SIMPO, [recipe_file(workspace, tmp_path), "--prepare_only"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


# ---- One at a time ----


def test_a_second_process_waits_and_then_finds_everything(workspace, tmp_path, cache, monkeypatch, caplog):
    """Two that start together: one encodes, whichever it is."""
    recipe = recipe_file(workspace, tmp_path)
    context = multiprocessing.get_context("fork")
    log = tmp_path / "encoded"

    def one(name: str) -> None:
        original = tokenization.encode_texts

        def slow(*args):
            with log.open("a") as file:
                file.write(f"{name}\n")
            time.sleep(0.5)
            return original(*args)

        tokenization.encode_texts = slow
        run(SIMPO, [recipe, "--prepare_only"])

    processes = [context.Process(target=one, args=(name,)) for name in ("first", "second")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    encoders = log.read_text().split()
    assert len(set(encoders)) == 1
    assert len(encoders) == 2  # train and test


def test_who_waits_says_so_and_no_lock_outlives_its_holder(tmp_path, caplog):
    lock, entered = tmp_path / "new/lock", threading.Event()

    def other() -> None:
        with one_process_at_a_time(lock, "tokenizing"):
            entered.set()

    with caplog.at_level("INFO", "alignment"), one_process_at_a_time(lock, "tokenizing"):
        waiting = threading.Thread(target=other)
        waiting.start()
        assert not entered.wait(1.5)
    waiting.join(10)
    assert entered.is_set()
    assert "Another process is tokenizing; waiting for it." in caplog.text


# ---- What can happen to it ----


def test_a_preparation_that_was_killed_is_made_again_and_gives_the_same_rows(workspace, tmp_path, cache, monkeypatch):
    recipe = recipe_file(workspace, tmp_path)
    begun = tmp_path / "begun"

    def stuck() -> None:
        tokenization.encode_texts = lambda *args: begun.touch() or time.sleep(60)
        run(SIMPO, [recipe, "--prepare_only"])

    process = multiprocessing.get_context("fork").Process(target=stuck)
    process.start()
    deadline = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert begun.exists()
    assert not token_files(cache)
    rows = tokenized(recipe)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "untouched")
    assert rows == tokenized(recipe)


@pytest.mark.parametrize("left", [0, 100, -100], ids=["nothing", "the head", "all but the end"])
def test_a_torn_file_is_one_message_that_names_it_and_deleting_it_is_enough(left, workspace, tmp_path, cache, capsys):
    recipe = recipe_file(workspace, tmp_path)
    rows = tokenized(recipe)
    torn = token_files(cache)[0]
    torn.write_bytes(torn.read_bytes()[:left])
    printed = refusal(recipe, capsys)
    assert f"error: {torn}: prepared data, and damaged" in printed
    assert f"rm {torn}\n" in printed
    assert "Traceback" not in printed
    torn.unlink()
    assert tokenized(recipe) == rows


def test_whichever_file_is_torn_and_wherever_it_is_named(workspace, tmp_path, cache, capsys):
    recipe = recipe_file(workspace, tmp_path)
    run(SIMPO, [recipe, "--prepare_only"])
    whole = {path: path.read_bytes() for path in sorted(cache.rglob("*.arrow"))}
    assert {path.parent.name for path in whole} == {"simpo", "simpo-rows"}
    for path, content in whole.items():
        for left in (0, 1, 16, len(content) // 4, len(content) // 2, len(content) - 200, len(content) - 9):
            path.write_bytes(content[:left])
            assert f"rm {path}\n" in refusal(recipe, capsys), left
        path.write_bytes(content)


def test_the_order_of_the_rows_is_in_no_file_that_could_lose_its_end(workspace, tmp_path, cache):
    run(SIMPO, [recipe_file(workspace, tmp_path), "--prepare_only"])
    names = {name for path in cache.rglob("*.arrow") for name in pa.ipc.open_stream(path.read_bytes()).schema.names}
    assert "chosen_input_ids" in names
    assert "indices" not in names


def checked_files(cache: Path) -> list[Path]:
    """What checking the rows left."""
    return sorted(path for path in cache.rglob("cache-*.arrow") if b"findings" in path.read_bytes()[:2000])


@pytest.mark.parametrize("files", [token_files, checked_files], ids=["tokens", "checked rows"])
def test_a_file_that_lost_its_last_batch_is_not_taken_for_a_shorter_one(files, workspace, tmp_path, cache, capsys):
    recipe = recipe_file(workspace, tmp_path)
    run(SIMPO, [recipe, "--prepare_only"])
    shorter = files(cache)[0]
    table = pa.ipc.open_stream(shorter.read_bytes()).read_all()
    with pa.OSFile(str(shorter), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table.slice(0, len(table) - 2))
    printed = refusal(recipe, capsys)
    assert f"{len(table) - 2} of {len(table)} rows" in printed
    assert f"rm {shorter}\n" in printed


def test_another_mistake_is_not_taken_for_a_torn_file(workspace, tmp_path, cache, capsys):
    (cache / "simpo").mkdir(parents=True)
    (cache / "simpo/other.arrow").write_bytes(b"torn")
    printed = refusal(recipe_file(workspace, tmp_path, dataset_splits=["train", "tset"]), capsys)
    assert "damaged" not in printed


# ---- Too little of it ----


@pytest.mark.parametrize(("method", "source"), [(SIMPO, "pairs"), (SFT, "chats")])
def test_data_that_fills_no_batch_is_an_error_before_the_model_is_loaded(
    method, source, workspace, tmp_path, cache, capsys, monkeypatch
):
    keys = {"dataset_mixer": {str(workspace / source): 1.0}, "dataloader_drop_last": True, "per_device_train_batch_size": 16}
    recipe = recipe_file(workspace, tmp_path, **keys, **({"max_prompt_length": None} if method is SFT else {}))
    monkeypatch.setattr(pipeline, "build_trainer", None)
    printed = refusal(recipe, capsys, method)
    message = "dataloader_drop_last = True: 8 training rows are less than one batch of 16"
    place = next(number for number, line in enumerate(Path(recipe).read_text().splitlines(), 1) if "drop_last" in line)
    assert f"error: {recipe}, line {place}: {message}" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_a_row_is_an_error(split, workspace, tmp_path, cache, capsys):
    rows = builders.pairs(4)
    (tmp_path / "few").mkdir()
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"few/{name}.jsonl", [] if name == split else rows)
    printed = refusal(recipe_file(workspace, tmp_path, dataset_mixer={str(tmp_path / "few"): 1.0}), capsys)
    assert f"{split}.jsonl: has no rows" in printed
