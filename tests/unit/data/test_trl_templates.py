"""Every chat template that trl ships, in both modes: right, or one refusal; docs/templates.md says which is which."""

import re
from pathlib import Path

import pytest
import trl
from transformers import PreTrainedTokenizerBase

from alignment.data import chat
from alignment.data.chat import check_published_template, exact_pair_text, published_pair_text
from alignment.data.template import read_template, shipped_names, shipped_template, variables
from alignment.errors import UserError
from tests.builders import EOS, bpe_tokenizer

TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
TABLE = Path(__file__).parents[3] / "docs" / "templates.md"
DATE = "2026-07-29"
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Name a colour."}
OTHER = {"role": "user", "content": "And another?"}
MARK = re.compile(r"<\|?[\w /-]+\|?>|<[\uff5c|][^'\"{}<>]+[\uff5c|]>")  # `<|im_end|>`, `<end_of_turn>`, DeepSeek's wide bars
PLAIN_TEXT = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tools>", "</tools>")


def reply(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


PROMPTS = {
    "one question": [QUESTION],
    "a system turn": [SYSTEM, QUESTION],
    "several turns": [QUESTION, reply("Violet."), OTHER],
}


def tokenizer_for(template: str) -> PreTrainedTokenizerBase:
    """A tokenizer that has the template's marks as tokens, as its model's has."""
    tokenizer = bpe_tokenizer()
    marks = sorted({mark for mark in MARK.findall(template) if mark not in PLAIN_TEXT})
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def row(prompt: list[dict]) -> dict[str, list[dict]]:
    return {"prompt": prompt, "chosen": [reply("Blue is one of them.")], "rejected": [reply("No.")]}


def outcome(tokenizer: PreTrainedTokenizerBase, mode: str, prompt: list[dict]) -> dict | str:
    """The pair's text, or the refusal."""
    try:
        if mode == "exact":
            return exact_pair_text(row(prompt), tokenizer, date=DATE)
        check_published_template(tokenizer, date=DATE)
        text = published_pair_text(row(prompt), tokenizer, add_system=True, date=DATE)
    except UserError as error:
        return str(error)
    faults = [finding.detail for finding in text["findings"] if finding.reason not in chat.REMARKS]
    return faults[0] if faults else text


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("mode", ["published", "exact"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_right_or_refused(name, mode, prompt):
    tokenizer = tokenizer_for(read_template(str(TEMPLATES[name])))
    text = outcome(tokenizer, mode, prompt)
    if isinstance(text, str):
        assert text
        return
    for side, words in (("chosen", "Blue is one of them."), ("rejected", "No.")):
        response = text[side]
        assert response.count(words) == 1
        assert "Name a colour." not in response
        assert "And another?" not in response
        assert tokenizer.bos_token not in response
        if mode == "exact":
            end = response.partition(words)[2]
            assert text["add_eos"] or chat.special_pattern(tokenizer).search(end)
            assert not text["prompt"].endswith(end) or not end.strip()
    assert prompt[-1]["content"] in text["prompt"]
    assert text["prompt"].count(tokenizer.bos_token) <= 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_advice_of_a_refusal_works(name):
    tokenizer = tokenizer_for(read_template(str(TEMPLATES[name])))
    refused = outcome(tokenizer, "published", [QUESTION])
    if isinstance(refused, dict):
        return
    if refused.endswith("Use preprocessing: exact."):
        assert isinstance(outcome(tokenizer, "exact", [QUESTION]), dict)
    else:
        assert isinstance(outcome(tokenizer, "exact", [QUESTION]), str)
        for shipped in shipped_names():
            assert shipped in refused
            tokenizer.chat_template = shipped_template(shipped)
            assert isinstance(outcome(tokenizer, "published", [QUESTION]), dict)
            assert isinstance(outcome(tokenizer, "exact", [QUESTION]), dict)


# ---- The table ----

REFUSALS = {
    "in front of every response": "refused: writes a system block above every response",
    "rendered in parts": "refused: is not made to be rendered in parts",
    "refuses a conversation": "refused: takes no such conversation",
    "does not write a response": "refused: does not write text contents",
    "does not write the content": "refused: does not write text contents",
    "writes a conversation differently": "refused: rewrites an answered prompt",
}
REMARKS = {chat.SCORED_OPENING: "words before the reply are scored", chat.ENDED: "eos is added"}


def cell(tokenizer: PreTrainedTokenizerBase, mode: str) -> str:
    text = outcome(tokenizer, mode, [QUESTION])
    if isinstance(text, str):
        return next(short for words, short in REFUSALS.items() if words in text)
    return "; ".join(["right", *(REMARKS[finding.reason] for finding in text["findings"])])


def table_row(name: str) -> str:
    tokenizer = tokenizer_for(read_template(str(TEMPLATES[name])))
    return f"| {name} | {cell(tokenizer, 'published')} | {cell(tokenizer, 'exact')} |"


def test_the_table_of_templates_is_true():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert rows == [table_row(name) for name in TEMPLATES]


def test_the_marks_of_a_template_are_found():
    assert MARK.findall("'<|im_end|>' '<end_of_turn>' '<\uff5cend\u2581of\u2581sentence\uff5c>' a < b") == [
        "<|im_end|>",
        "<end_of_turn>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ]
    assert EOS in tokenizer_for("{{ '<|eot_id|>' }}").all_special_tokens


@pytest.mark.parametrize(
    ("name", "key"),
    [("qwen3", "enable_thinking"), ("llama3_2", "date_string"), ("gptoss", "reasoning_effort")],
)
def test_settings_of_known_templates_are_known(name, key):
    assert key in variables(read_template(str(TEMPLATES[name])))
