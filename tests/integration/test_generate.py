"""scripts/generate.py on a model, an adapter and a checkpoint."""

import os
import pty
import shutil
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


def test_a_checkpoint_answers_in_the_template_that_is_saved_with_it(server, workspace, tmp_path):
    """Weights, tokenizer and what only training reads, as a checkpoint has them."""
    checkpoint = tmp_path / "run/checkpoint-2"
    shutil.copytree(workspace / "model", checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "chat_template.jinja").write_text(
        "{% for m in messages %}<|start_header_id|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|end_header_id|>{% endif %}"
    )
    texts = {}
    for name, model in (("whole", workspace / "model"), ("checkpoint", checkpoint)):
        output = tmp_path / f"{name}.jsonl"
        command = (str(model), f"--input={workspace / 'prompts.jsonl'}", f"--output={output}", "--max_tokens=6", "--use_cpu")
        ended = server.run(*command, "--temperature=0", method=GENERATE)
        assert ended.status == 0, ended.printed
        texts[name] = [row["messages"][-1]["content"] for row in read_jsonl(output)]
    assert texts["checkpoint"] != texts["whole"]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ([], 2, "name a MODEL"),
        (["--temperature=0"], 2, "name a MODEL"),
        (["no/such/folder/anywhere", "--use_cpu"], 2, "no/such/folder/anywhere"),
        (["--help"], 0, "--help_all lists every option"),
        (["--help_all"], 0, "--vllm_python"),
    ],
)
def test_who_names_no_model_or_asks_for_help_gets_a_short_answer(server, words, status, told):
    ended = server.run(*words, method=GENERATE)
    assert ended.status == status
    assert told in ended.printed
    assert "Traceback" not in ended.printed


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
