"""Conversations -> text, by the published rules and by the exact ones."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignment.data.chat import check_published_template, exact_pair_text, message_texts, pair_texts, published_pair_text
from alignment.data.template import find_chat_template, render, shipped_template
from alignment.errors import UserError
from tests.builders import bpe_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Why?"}
ROW = {
    "prompt": [QUESTION],
    "chosen": [{"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}

# Writes a system block above every conversation that has none.
QWEN_LIKE = """\
{%- if messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Writes one with a date above every conversation, and puts the conversation's own into it.
LLAMA_31_LIKE = """\
{{- bos_token }}
{%- set own = messages[0]['role'] == 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' }}
{{- (messages[0]['content'] if own else '') + '<|eot_id|>' }}
{%- for m in (messages[1:] if own else messages) %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
STRICT = """\
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate') }}
{%- endif %}
{{- '[' + m['role'] + '] ' + m['content'] }}
{%- endfor %}"""


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# ---- Which template ----


def found(tokenizer: PreTrainedTokenizerBase, path: str = "models/x", recipe: str | None = None, mode: str = "published"):
    return find_chat_template(tokenizer, path, recipe_template=recipe, preprocessing=mode)[0]


def test_the_recipes_template_goes_before_the_tokenizers_and_zephyrs_comes_last(tmp_path):
    own = with_template(QWEN_LIKE)
    assert found(own, recipe="gemma") == shipped_template("gemma")
    assert found(own, recipe="{{ 'text' }}") == "{{ 'text' }}"
    (tmp_path / "mine.jinja").write_text("{{ 'file' }}")
    assert found(own, recipe=str(tmp_path / "mine.jinja")) == "{{ 'file' }}"
    assert found(own) == QWEN_LIKE
    assert found(with_template(None)) == shipped_template("zephyr")


def test_a_model_path_with_mistral_in_it_decides_alone_in_published_mode():
    own = with_template(QWEN_LIKE)
    assert found(own, path="me/My-MISTRAL-7B", recipe="gemma") == shipped_template("mistral")
    assert found(own, path="me/My-MISTRAL-7B", recipe="gemma", mode="exact") == shipped_template("gemma")
    assert found(own, path="me/My-MISTRAL-7B", mode="exact") == QWEN_LIKE


def test_a_template_that_does_not_exist_is_refused_with_the_shipped_names():
    with pytest.raises(UserError, match=r"chat_template = 'lama-3': no such file, .* gemma, llama-3, mistral, zephyr"):
        found(with_template(None), recipe="lama-3")


def test_a_recipes_template_that_is_no_jinja_is_refused_before_any_row_is_rendered(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for message in messages %}\n{{ message['content'] }\n{% endfor %}", encoding="utf-8")
    with pytest.raises(UserError, match=r"chat_template = .*mine\.jinja': is no Jinja template: line 2: unexpected '}'"):
        found(with_template(None), recipe=str(path))
    tagged = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}"
    assert found(with_template(None), recipe=tagged) == tagged  # what transformers adds to Jinja


def test_a_saved_tokenizer_carries_the_template_that_was_trained_on(tmp_path):
    tokenizer = with_template(QWEN_LIKE)
    tokenizer.chat_template = found(tokenizer, recipe="gemma")
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == shipped_template("gemma")


# ---- published ----


def test_published_text_opens_the_response_with_the_assistants_header_and_has_one_bos(tokenizer):
    assert published_pair_text(ROW, tokenizer, add_system=True) == {
        "prompt": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>",
        "chosen": "<|start_header_id|>assistant<|end_header_id|>\n\nBecause.<|eot_id|>",
        "rejected": "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>",
        "system_added": False,
        "add_eos": False,
        "findings": [],
    }


def test_published_text_gets_an_empty_system_turn_where_the_template_says_system():
    text = published_pair_text(ROW, with_template(shipped_template("zephyr")), add_system=True)
    assert text["prompt"] == "<|system|>\n<|eot_id|>\n<|user|>\nWhy?<|eot_id|>\n"
    assert text["chosen"] == "<|assistant|>\nBecause.<|eot_id|>\n"
    assert text["system_added"]


@pytest.mark.parametrize(("prompt", "add_system"), [([SYSTEM, QUESTION], True), ([QUESTION], False)])
def test_no_system_turn_is_added_to_one_or_against_the_recipe(prompt, add_system):
    tokenizer = with_template(shipped_template("zephyr"))
    text = published_pair_text({**ROW, "prompt": prompt}, tokenizer, add_system=add_system)
    assert text["prompt"] == render(prompt, tokenizer)
    assert not text["system_added"]


def test_published_text_of_the_mistral_format_has_no_bos_and_a_space_around_the_response():
    text = published_pair_text(
        {**ROW, "prompt": [SYSTEM, QUESTION]}, with_template(shipped_template("mistral")), add_system=True
    )
    assert text["prompt"] == "[INST] Be brief.\n\nWhy? [/INST]"
    assert text["chosen"] == " Because. <|eot_id|>"


def test_a_tokenizer_without_bos_keeps_its_responses_whole(tokenizer_without_bos):
    text = published_pair_text(ROW, tokenizer_without_bos, add_system=False)
    assert text["chosen"] == "<|start_header_id|>assistant<|end_header_id|>\n\nBecause.<|eot_id|>"


@pytest.mark.parametrize(
    ("template", "block"),
    [(QWEN_LIKE, "You are a helpful assistant"), (LLAMA_31_LIKE, "Today Date: 26 Jul 2024")],
    ids=["Qwen2.5", "Llama-3.1"],
)
def test_a_template_that_writes_a_system_block_above_anything_is_refused_in_published_mode(template, block):
    with pytest.raises(UserError, match=rf"{block}.*preprocessing: exact"):
        check_published_template(with_template(template))


@pytest.mark.parametrize("name", ["llama-3", "mistral", "gemma", "zephyr"])
def test_the_shipped_templates_suit_published_mode(name):
    check_published_template(with_template(shipped_template(name)))


# ---- exact ----


@pytest.mark.parametrize(
    ("template", "prompt_end", "response_end"),
    [
        (shipped_template("llama-3"), "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        (shipped_template("zephyr"), "Why?<|eot_id|>\n<|assistant|>\n", "<|eot_id|>\n"),
        (QWEN_LIKE, "Why?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
        (LLAMA_31_LIKE, "Why?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ],
    ids=["llama-3", "zephyr", "Qwen2.5", "Llama-3.1"],
)
def test_exact_text_gives_the_assistants_header_to_the_prompt(template, prompt_end, response_end):
    tokenizer = with_template(template)
    text = exact_pair_text(ROW, tokenizer)
    assert text["add_eos"] == ("<|eot_id|>" not in response_end)  # <|im_end|> is no token of this tokenizer
    assert text["prompt"].endswith(prompt_end)
    assert (text["chosen"], text["rejected"]) == (f"Because.{response_end}", f"No.{response_end}")
    assert text["prompt"] + text["chosen"] == render(ROW["prompt"] + ROW["chosen"], tokenizer)


@pytest.mark.parametrize("template", [shipped_template("zephyr"), QWEN_LIKE], ids=["zephyr", "Qwen2.5"])
def test_exact_text_gets_no_empty_system_turn(template):
    tokenizer = with_template(template)
    batch = {key: [turns] for key, turns in ROW.items()}
    texts = pair_texts(batch, [0], tokenizer, preprocessing="exact", add_system=True)
    assert texts["prompt"] == [render([QUESTION], tokenizer, generation_prompt=True)]
    assert texts["system_added"] == [False]


def test_a_template_that_writes_an_answered_prompt_differently_is_refused_in_exact_mode():
    thinks_first = shipped_template("zephyr").replace("'<|assistant|>\\n' }}", "'<|assistant|>\\n<think>\\n' }}")
    with pytest.raises(UserError, match=r"the chosen response cannot be told from it.*<think>"):
        exact_pair_text(ROW, with_template(thinks_first))


# ---- Both ----


def test_a_template_that_refuses_a_conversation_is_reported_with_its_words_and_the_roles():
    with pytest.raises(UserError, match=r"roles \(system, user\): Conversation roles must alternate.*chat_template"):
        render([SYSTEM, QUESTION], with_template(STRICT))


def test_a_template_that_cannot_render_a_response_alone_is_refused_in_published_mode():
    with pytest.raises(UserError, match=r"roles \(assistant\): Conversation roles must alternate"):
        check_published_template(with_template(STRICT))


def test_a_template_with_a_mistake_in_it_is_reported():
    with pytest.raises(UserError, match="chat_template"):
        render([QUESTION], with_template("{% for m in messages %}"))


def test_conversations_are_rendered_whole_with_the_empty_system_turn_of_published_mode():
    tokenizer = with_template(shipped_template("zephyr"))
    batch = {"messages": [[QUESTION, *ROW["chosen"]]]}
    (published,) = message_texts(batch, [0], tokenizer, preprocessing="published", add_system=True)["text"]
    (exact,) = message_texts(batch, [0], tokenizer, preprocessing="exact", add_system=True)["text"]
    assert exact == "<|user|>\nWhy?<|eot_id|>\n<|assistant|>\nBecause.<|eot_id|>\n"
    assert published == f"<|system|>\n<|eot_id|>\n{exact}"
