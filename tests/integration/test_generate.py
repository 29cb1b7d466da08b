"""scripts/generate.py on a model, an adapter and a checkpoint."""

import os
import pty
import subprocess
import sys

import pytest

from alignment.run.records import write_jsonl
from tests import builders
from tests.forked import ROOT
from tests.workspaces import read_jsonl, save_adapter, save_model

GENERATE = "scripts/generate.py"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    save_model(folder / "model", initializer_range=0.1)
    save_adapter(folder / "model", folder / "adapter")
    write_jsonl(folder / "prompts.jsonl", [{"messages": row["chosen"]} for row in builders.pairs(5)])
    return folder


def test_a_file_of_prompts_is_answered_by_a_model_and_otherwise_by_an_adapter(server, workspace, tmp_path):
    texts = []
    for name in ("model", "adapter"):
        output = tmp_path / f"{name}.jsonl"
        command = (str(workspace / name), f"--input={workspace / 'prompts.jsonl'}", f"--output={output}", "--max_tokens=6")
        killed = server.run(*command, "--batch_size=1", "--use_cpu", method=GENERATE, sabotage="tear_row", number=3)
        assert killed.status == -9, killed.printed
        ended = server.run(*command, "--use_cpu", method=GENERATE)
        assert ended.status == 0, ended.printed
        rows = read_jsonl(output)
        assert [row["messages"][:-1] for row in rows] == [row["chosen"][:-1] for row in builders.pairs(5)]
        texts.append([row["messages"][-1]["content"] for row in rows])
    assert texts[0] != texts[1]


def test_half_of_a_file_pair_is_refused(server, workspace):
    ended = server.run(str(workspace / "model"), "--input=prompts.jsonl", "--use_cpu", method=GENERATE)
    assert ended.status == 2
    assert "needs output too" in ended.printed


@pytest.mark.parametrize("terminal", [False, True])
def test_a_conversation_is_answered_on_a_terminal_and_in_a_pipe(workspace, terminal):
    master, slave = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, GENERATE, str(workspace / "model"), "--max_tokens=6", "--use_cpu", "--temperature=0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL,
        stdout=slave if terminal else subprocess.PIPE,
    )  # fmt: skip
    os.close(slave)
    printed, _ = process.communicate("river\n/new\nriver\n\n", timeout=120)
    if terminal:
        printed = os.read(master, 65536).decode(errors="replace").replace("\r", "")
    os.close(master)
    assert process.returncode == 0, printed
    replies = [line for line in printed.splitlines() if line.strip() and " INFO: " not in line]
    assert len(replies) == 2
    assert replies[0] == replies[1]
