"""A stage's files among those of others, and rows that several processes share out."""

import json
import os
import socket
import time

import pytest
import torch.multiprocessing
from accelerate import PartialState

from alignment.errors import UserError
from on_policy_data_gen.stages import FOLDER, finish, share, stage, write_lines

PROMPTS = [f"prompt {number}" for number in range(8)]


def make(folder, name, *, kept=PROMPTS, done=True, seed=1):
    """The stage NAME.jsonl, with the rows that are kept and missing; finished, or left as a kill would."""
    output = folder / f"{name}.jsonl"
    with stage(folder, name, {"seed": seed}, date="2026-01-02", makes=[output]) as begun:
        if begun is None:
            return
        there = begun.everyones()
        begun.keep(({"prompt_id": key, "by": name} for key in kept if key not in there), done=0, total=8, what=name)
        if done:
            finish(begun, lambda: write_lines(output, sorted(begun.rows(), key=lambda row: row["prompt_id"])))


@pytest.mark.parametrize("name", ["llama-3", "llama [v1]", "llama?", "lla*a", "模型"])
def test_a_stage_takes_its_own_files_and_nobody_else_s(name, tmp_path):
    other = f"{name}.1-8b"
    make(tmp_path, other, kept=PROMPTS[:3], done=False)
    make(tmp_path, name, kept=PROMPTS[:5], done=False)
    make(tmp_path, name)
    make(tmp_path, name)  # finished: what is left of it is deleted
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert rows == [{"prompt_id": key, "by": name} for key in PROMPTS]
    make(tmp_path, other, kept=PROMPTS)
    assert len((tmp_path / f"{other}.jsonl").read_text().splitlines()) == 8


def test_other_settings_are_answered_with_the_stage_s_own_files_to_remove(tmp_path):
    make(tmp_path, "llama 3.1", done=False)
    make(tmp_path, "llama 3", done=False)
    with pytest.raises(UserError) as refused:
        make(tmp_path, "llama 3", seed=2)
    folder = tmp_path / FOLDER
    assert f"rm '{folder}/llama 3.json' '{folder}/llama 3.0.jsonl', and" in str(refused.value)


def quick_and_late(rank, port, folder):
    """The first process writes at once; the second, slower to render its prompts, then reads what is done."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="1")
    PartialState(cpu=True)
    with stage(folder, "rows", {}, date="2026-01-02", makes=[folder / "rows.jsonl"]) as begun:
        time.sleep(rank)
        there = begun.everyones()
        missing = share([key for key in PROMPTS if key not in there])
        begun.keep(({"prompt_id": key, "by": rank} for key in missing), done=0, total=8, what="rows")
        finish(begun, lambda: write_lines(folder / "rows.jsonl", begun.rows()))


def test_every_row_is_somebody_s_however_late_a_process_comes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(quick_and_late, (port, tmp_path), nprocs=2)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(row["prompt_id"] for row in rows) == PROMPTS
    assert {row["by"] for row in rows} == {0, 1}
