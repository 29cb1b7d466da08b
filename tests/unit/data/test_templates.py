"""The shipped chat templates, rendered by transformers, character for character."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from alignment.data.chat import with_empty_system_turn
from alignment.data.template import TEMPLATE_FOLDER, shipped_template

ZEPHYR_TOKENIZER_CONFIG = Path(__file__).parents[2] / "golden" / "data" / "policy-zephyr" / "tokenizer_config.json"

SYSTEM = {"role": "system", "content": " Be brief. "}
EMPTY_SYSTEM = {"role": "system", "content": ""}
QUESTION = {"role": "user", "content": " 2 + 2?\n"}
REPLY = {"role": "assistant", "content": " 4 "}
FOLLOW_UP = {"role": "user", "content": "Sure?"}
DIALOGUE = [QUESTION, REPLY, FOLLOW_UP]

DIALOGUE_TEXT = {
    "llama-3": "<bos><|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>",
    "mistral": "[INST] 2 + 2? [/INST] 4 <eos>[INST] Sure? [/INST]",
    "gemma": "<bos><start_of_turn>user\n2 + 2?<end_of_turn>\n"
    "<start_of_turn>model\n4<end_of_turn>\n"
    "<start_of_turn>user\nSure?<end_of_turn>\n",
    "zephyr": "<|user|>\n 2 + 2?\n<eos>\n<|assistant|>\n 4 <eos>\n<|user|>\nSure?<eos>\n",
}
GENERATION_PROMPT = {
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "",
    "gemma": "<start_of_turn>model\n",
    "zephyr": "<|assistant|>\n",
}
SYSTEM_AND_QUESTION_TEXT = {
    "llama-3": "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>",
    "mistral": "[INST] Be brief.\n\n 2 + 2? [/INST]",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\n 2 + 2?<end_of_turn>\n",
    "zephyr": "<|system|>\n Be brief. <eos>\n<|user|>\n 2 + 2?\n<eos>\n",
}
RESPONSE_TEXT = {
    "llama-3": "<bos><|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
    "mistral": " 4 <eos>",
    "gemma": "<bos><start_of_turn>model\n4<end_of_turn>\n",
    "zephyr": "<|assistant|>\n 4 <eos>\n",
}
every_template = pytest.mark.parametrize("name", sorted(DIALOGUE_TEXT))


def render(template: str, turns: list[dict[str, str]], *, generation_prompt: bool = False, bos: str | None = "<bos>") -> str:
    backend = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<eos>")
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt)


def test_every_shipped_template_has_its_expected_text_here():
    assert sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja")) == sorted(DIALOGUE_TEXT)


@every_template
def test_a_dialogue_has_the_text_its_model_was_trained_on(name):
    assert render(shipped_template(name), DIALOGUE) == DIALOGUE_TEXT[name]


@every_template
def test_the_generation_prompt_only_appends(name):
    expected = DIALOGUE_TEXT[name] + GENERATION_PROMPT[name]
    assert render(shipped_template(name), DIALOGUE, generation_prompt=True) == expected


@every_template
def test_a_system_message_stands_in_front_of_the_question(name):
    assert render(shipped_template(name), [SYSTEM, QUESTION]) == SYSTEM_AND_QUESTION_TEXT[name]


@every_template
def test_a_response_alone_is_rendered_as_it_stands_in_the_dialogue(name):
    text = render(shipped_template(name), [REPLY])
    assert text == RESPONSE_TEXT[name]
    assert text.removeprefix("<bos>") in DIALOGUE_TEXT[name]


@pytest.mark.parametrize(("name", "inserted"), [("llama-3", 0), ("mistral", 1), ("gemma", 1), ("zephyr", 1)])
def test_only_a_template_that_speaks_of_system_turns_gets_an_empty_one(name, inserted):
    # By the word in its text, comments included: a comment can change what the published preprocessing trains on.
    assert len(with_empty_system_turn([QUESTION], shipped_template(name))) == 1 + inserted


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_an_empty_system_message_leaves_no_trace_where_it_is_merged(name):
    template = shipped_template(name)
    assert render(template, [EMPTY_SYSTEM, *DIALOGUE]) == DIALOGUE_TEXT[name]


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("turns", [DIALOGUE, [EMPTY_SYSTEM, *DIALOGUE], [REPLY]])
def test_the_zephyr_template_equals_the_published_policys(turns, generation_prompt):
    published = json.loads(ZEPHYR_TOKENIZER_CONFIG.read_text(encoding="utf-8"))["chat_template"]
    ours = render(shipped_template("zephyr"), turns, generation_prompt=generation_prompt)
    assert ours == render(published, turns, generation_prompt=generation_prompt)


@every_template
def test_a_tokenizer_without_bos_is_no_obstacle(name):
    text = render(shipped_template(name), DIALOGUE, bos=None)
    assert text == DIALOGUE_TEXT[name].removeprefix("<bos>")
