"""Whole preparations and runs: what is said of rows and templates, settings of the template, the run's day."""

import json
import shutil
from pathlib import Path

import pytest
import trl
from datasets import config as datasets_config
from transformers import AutoTokenizer

from alignment import pipeline
from alignment.data.splits import CONVERSATIONS, PAIRS
from alignment.errors import UserError
from alignment.pipeline import Method, main, run
from alignment.run import run_folder
from alignment.run.records import write_jsonl
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders
from tests.workspaces import recipe_of_run, save_workspace

SIMPO = Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS)
SFT = Method(config=SFTConfig, trainer=SFTTrainer, data=CONVERSATIONS)
TRL = Path(trl.__file__).parent / "chat_templates"
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
DROPS_THINKING = """\
{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'].split('</think>')[-1] + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
KEYS = {
    "attn_implementation": "sdpa",
    "preprocessing": "exact",
    "use_cpu": True,
    "max_length": 320,
    "max_prompt_length": 160,
    "max_steps": 4,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "do_eval": False,
    "dataset_splits": ["train"],
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    save_workspace(folder, 8, 0, initializer_range=0.1)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


def thinking(count: int, thoughtful: int) -> list[dict]:
    """Pairs of which some think aloud before both replies."""
    rows = builders.pairs(count)
    for row in rows[:thoughtful]:
        for side in ("chosen", "rejected"):
            row[side][-1]["content"] = f"<think>\nThoughts on {side}.\n</think>\n\n{row[side][-1]['content']}"
    return rows


def prepare(workspace: Path, folder: Path, caplog, rows: list[dict] | None = None, method: Method = SIMPO, **changes) -> str:
    """What a preparation says; `rows` in place of the workspace's."""
    keys = dict(changes)
    if rows is not None:
        (folder / "pairs").mkdir()
        write_jsonl(folder / "pairs/train.jsonl", rows)
        keys["dataset_mixer"] = {str(folder / "pairs"): 1.0}
    with caplog.at_level("INFO", "alignment"):
        run(method, [recipe_of_run(workspace, folder, KEYS, keys), "--prepare_only"])
    return caplog.text


# ---- Rows and templates ----


def test_a_template_that_fails_in_every_row_is_refused_though_bad_rows_are_dropped(workspace, tmp_path, caplog):
    with pytest.raises(UserError) as raised:
        prepare(workspace, tmp_path, caplog, thinking(6, 6), chat_template=DROPS_THINKING, bad_rows="drop")
    message = str(raised.value)
    assert message.startswith("the chat template fails in every row of train, first in ")
    assert "pairs/train.jsonl, line " in message
    assert "<think>" in message
    shutil.rmtree(tmp_path / "pairs")
    prepare(workspace, tmp_path, caplog, thinking(6, 6), chat_template="llama-3")  # the advice


@pytest.mark.parametrize("bad_rows", ["refuse", "drop"])
def test_replies_that_are_nothing_but_an_end_are_not_put_down_to_the_template(bad_rows, workspace, tmp_path, caplog):
    rows = builders.pairs(2)
    for row in rows:
        row["chosen"][-1]["content"] = builders.EOS
    with pytest.raises(UserError) as raised:
        prepare(workspace, tmp_path, caplog, rows, bad_rows=bad_rows)
    assert "pairs/train.jsonl, line 1: chosen is empty" in str(raised.value)
    assert "chat_template" not in str(raised.value)


def test_rows_that_the_template_spoils_are_refused_with_their_lines_and_dropped_on_demand(workspace, tmp_path, caplog):
    with pytest.raises(UserError) as raised:
        prepare(workspace, tmp_path, caplog, thinking(6, 2), chat_template=DROPS_THINKING)
    lines = str(raised.value).splitlines()
    assert sorted(line.split(":")[0].split(", ")[-1] for line in lines[:2]) == ["line 1", "line 2"]
    assert lines[-1] == "bad rows: the template leaves out part of a turn 2; bad_rows: drop leaves them out"
    shutil.rmtree(tmp_path / "pairs")
    said = prepare(workspace, tmp_path, caplog, thinking(6, 2), chat_template=DROPS_THINKING, bad_rows="drop")
    assert "the template leaves out part of a turn: 2 rows dropped, first " in said


def test_published_keeps_rows_that_the_template_spoils_and_says_so(workspace, tmp_path, caplog):
    said = prepare(
        workspace, tmp_path, caplog, thinking(6, 2), chat_template=DROPS_THINKING, preprocessing="published",
        auto_insert_empty_system_msg=False,
    )  # fmt: skip
    assert "the template leaves out part of a turn: 2 rows tolerated, first " in said


def test_a_row_that_the_template_refuses_is_named_by_file_and_line(workspace, tmp_path, caplog):
    rows = builders.pairs(5)
    for side in ("chosen", "rejected"):
        rows[3][side].insert(0, {"role": "system", "content": "Be brief."})
    refuses = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    template = refuses + DROPS_THINKING
    with pytest.raises(UserError, match=r"pairs/train\.jsonl, line 4: .*no system"):
        prepare(workspace, tmp_path, caplog, rows, chat_template=template)
    shutil.rmtree(tmp_path / "pairs")
    published = {"preprocessing": "published", "auto_insert_empty_system_msg": False}
    with pytest.raises(UserError, match=r"pairs/train\.jsonl, line 4: .*no system"):
        prepare(workspace, tmp_path, caplog, rows, chat_template=template, **published)
    shutil.rmtree(tmp_path / "pairs")
    assert "refused by the template: 1 rows dropped" in prepare(
        workspace, tmp_path, caplog, rows, chat_template=template, bad_rows="drop"
    )


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_a_template_that_fails_is_one_error_and_no_traceback(preprocessing, workspace, tmp_path, capsys):
    recipe = recipe_of_run(workspace, tmp_path, KEYS, {"chat_template": "{{ none + 'x' }}", "preprocessing": preprocessing})
    with pytest.raises(SystemExit) as exit_:
        main(SIMPO, [recipe, "--prepare_only"])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert "unsupported operand" in printed
    assert "Traceback" not in printed


def test_calls_and_tools_of_a_file_come_to_the_template(workspace, tmp_path, caplog):
    rows = builders.pairs(4)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    for row in rows:
        row["tools"] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
        row["chosen"][-1] |= {"content": None, "tool_calls": [call]}
    said = prepare(workspace, tmp_path, caplog, rows, chat_template=str(TRL / "qwen3.jinja"))
    assert '"arguments": {"city": "Oslo"}' in said
    assert '"name": "weather", "parameters"' in said


def test_conversations_for_supervised_training_are_proved_too(workspace, tmp_path, caplog):
    rows = [{"messages": row["chosen"]} for row in thinking(5, 2)]
    keys = {"chat_template": DROPS_THINKING, "max_prompt_length": None}
    with pytest.raises(UserError, match=r"pairs/train\.jsonl, line [12]: .* lacks"):
        prepare(workspace, tmp_path, caplog, rows, SFT, **keys)


# ---- Settings ----


def test_settings_of_the_template_come_to_the_rows_the_card_and_the_saved_tokenizer(workspace, tmp_path, caplog):
    keys = {"chat_template": str(TRL / "qwen3.jinja"), "chat_template_kwargs": {"enable_thinking": False}}
    assert "<think>\\n\\n</think>\\n\\n'" in prepare(workspace, tmp_path, caplog, **keys)
    caplog.clear()
    plain = prepare(workspace, tmp_path, caplog, chat_template=keys["chat_template"])
    assert "[chosen] '<think>" in plain
    run(SIMPO, [recipe_of_run(workspace, tmp_path, KEYS, keys)])
    assert "| chat template settings | `{'enable_thinking': False}` |" in (tmp_path / "run/README.md").read_text()
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    prompt = saved.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<think>\n\n</think>\n\n")


def test_a_setting_that_the_template_does_not_read_is_one_error(workspace, tmp_path, caplog):
    with pytest.raises(UserError, match=r"chat_template_kwargs\.enable_thinkng: .*did you mean 'enable_thinking'"):
        prepare(
            workspace, tmp_path, caplog,
            chat_template=str(TRL / "qwen3.jinja"), chat_template_kwargs={"enable_thinkng": False},
        )  # fmt: skip


@pytest.mark.parametrize("key", ["not a name", "a-b", "1st"])
def test_a_setting_whose_name_no_template_can_read_is_one_error(key, workspace, tmp_path, caplog):
    with pytest.raises(UserError, match=f"chat_template_kwargs.{key}"):
        prepare(workspace, tmp_path, caplog, chat_template_kwargs={key: 1})


# ---- The day ----


@pytest.fixture
def day(monkeypatch):
    """Lets a test say which day it is."""
    return lambda date: [monkeypatch.setattr(module, "today", lambda: date) for module in (run_folder, pipeline)]


def seen_prompts(monkeypatch) -> list[str]:
    prompts: list[str] = []
    original = pipeline.tokenized_splits

    def spy(kind, tokenizer, run_):
        splits = original(kind, tokenizer, run_)
        prompts.append(tokenizer.decode(splits["train"][0]["chosen_input_ids"]))
        return splits

    monkeypatch.setattr(pipeline, "tokenized_splits", spy)
    return prompts


def as_interrupted(output_dir: Path, checkpoint: str) -> None:
    """Turn a finished run back into one that was stopped at a checkpoint."""
    for path in [*output_dir.glob("*.safetensors"), *(p for p in output_dir.glob("checkpoint-*") if p.name != checkpoint)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    status = json.loads((output_dir / "_run/status.json").read_text())
    (output_dir / "_run/status.json").write_text(json.dumps({**status, "state": "interrupted", "reason": "stopped"}))


@pytest.mark.parametrize("cache_is_kept", [True, False])
def test_a_run_taken_up_on_another_day_reads_the_day_on_which_it_began(cache_is_kept, workspace, tmp_path, day, monkeypatch):
    prompts = seen_prompts(monkeypatch)
    recipe = recipe_of_run(workspace, tmp_path, KEYS, {"chat_template": DATED})
    day("2026-07-29")
    run(SIMPO, [recipe])
    day("2026-07-30")
    if not cache_is_kept:
        shutil.rmtree(tmp_path / "cache")
    run(SIMPO, [recipe])  # finished: compares its data, and leaves
    as_interrupted(tmp_path / "run", "checkpoint-2")
    run(SIMPO, [recipe])
    assert [prompt.count("29 Jul 2026") for prompt in prompts] == [1, 1, 1]


def test_a_new_run_reads_its_own_day_though_the_cache_has_another(workspace, tmp_path, day, monkeypatch):
    prompts = seen_prompts(monkeypatch)
    for date in ("2026-07-29", "2026-07-30"):
        day(date)
        changes = {"chat_template": DATED, "output_dir": str(tmp_path / date)}
        run(SIMPO, [recipe_of_run(workspace, tmp_path, KEYS, changes)])
    day("2026-07-31")
    run(SIMPO, [recipe_of_run(workspace, tmp_path, KEYS, changes), "--resume_from_checkpoint=never"])
    assert [prompt.split(" Jul")[0][-2:] for prompt in prompts] == ["29", "30", "31"]
