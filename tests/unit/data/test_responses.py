"""What is a response, proved: one reply, whole, with one end, whatever the template does and the rows hold."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import AutoTokenizer

from alignment.data import chat
from alignment.data.chat import (
    ENDED,
    GLUED,
    LOST,
    REWRITTEN,
    SCORED_OPENING,
    SECOND_BOS,
    SHARED_OPENING,
    SPECIAL,
    UNSEEN_TOOLS,
    UNWRITTEN,
    Fault,
    check_published_template,
    exact_pair_text,
    message_texts,
    pair_texts,
    published_pair_text,
)
from alignment.data.prepare import describe_tokens, same_responses, to_message_texts, to_pair_texts, to_sequences, to_tokens
from alignment.data.rows import REFUSED
from alignment.data.template import (
    TemplateRefusal,
    clock,
    find_chat_template,
    literal,
    read_template,
    render,
    shipped_names,
    shipped_template,
    with_settings,
)
from alignment.data.tokenization import LengthRules
from alignment.errors import UserError
from tests.builders import BOS, EOS, bpe_tokenizer

TRL = Path(trl.__file__).parent / "chat_templates"
RULES = LengthRules(200, 100, "keep_end", "exact")
QUESTION = {"role": "user", "content": "Why?"}


def reply(content: str = "Because.", **keys) -> dict:
    return {"role": "assistant", "content": content, **keys}


def row(chosen="Because.", rejected="No.", *, prompt=(QUESTION,), **columns) -> dict:
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": list(prompt)} | {k: [reply(v) if isinstance(v, str) else v] for k, v in sides.items()} | columns


def with_template(template: str, **kwargs):
    tokenizer = bpe_tokenizer(**kwargs)
    tokenizer.chat_template = template
    return tokenizer


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as raised:
        function(*args, **kwargs)
    return str(raised.value)


def fault(row_: dict, tokenizer) -> str:
    with pytest.raises(Fault) as raised:
        exact_pair_text(row_, tokenizer)
    return raised.value.finding.reason


def reasons(text: dict) -> list[str]:
    return [finding.reason for finding in text["findings"]]


def tokens_of(row_: dict, tokenizer, preprocessing: str = "exact") -> Dataset:
    texts = to_pair_texts(Dataset.from_list([row_]), tokenizer, preprocessing=preprocessing, add_system=False, num_proc=None)
    return to_tokens(texts, tokenizer, RULES._replace(preprocessing=preprocessing), num_proc=None)


def response_of(row_: dict, tokenizer) -> str:
    tokens = tokens_of(row_, tokenizer)[0]
    return tokenizer.decode(tokens["chosen_input_ids"][tokens["chosen_prompt_length"] :])


TURNS = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + MARK }}{% endfor %}"
HEADER = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


def turns(mark: str = "eos_token", header: str = HEADER) -> str:
    return TURNS.replace("MARK", mark) + header


# ---- Glued text ----


@pytest.mark.parametrize(
    "template",
    [
        turns("'.'", "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}{% endif %}"),
        turns(header="<assistant>"),
        "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
        turns("(eos_token if loop.last else '')"),
        "{{ '[' ~ messages | length ~ ']' }}" + turns(),
    ],
    ids=["eos ends it all", "always the next header", "line between turns", "eos behind the last", "counts its turns"],
)
def test_published_refuses_a_template_whose_parts_make_no_conversation_of_it_and_exact_helps(template):
    tokenizer = with_template(template)
    message = refusal(check_published_template, tokenizer)
    assert "in front of every response" in message or "prompt + response would be" in message
    if message.endswith("Use preprocessing: exact."):
        exact_pair_text(row(), tokenizer)
    else:
        assert fault(row(), tokenizer) == REWRITTEN


def test_published_tells_of_single_rows_whose_glued_text_is_none():
    template = "{% if messages | length > 5 %}{{ '<long>' }}{% endif %}" + turns()
    long = [QUESTION, reply(), QUESTION, reply(), QUESTION]
    tokenizer = with_template(template)
    check_published_template(tokenizer)
    assert reasons(published_pair_text(row(), tokenizer, add_system=False)) == []
    assert reasons(published_pair_text(row(prompt=long), tokenizer, add_system=False)) == [GLUED, GLUED]


@pytest.mark.parametrize("name", shipped_names())
def test_the_shipped_templates_glue_into_their_own_conversations(name):
    text = published_pair_text(row(), with_template(shipped_template(name)), add_system=True)
    assert text["findings"] == []


# ---- Ends ----


@pytest.mark.parametrize("name", shipped_names())
def test_a_response_ends_in_one_eos_with_every_shipped_template(name):
    response = response_of(row(), with_template(shipped_template(name)))
    assert response.startswith((" Because.", "Because."))
    assert response.count(EOS) == 1
    assert response.rstrip().endswith(EOS)


def test_the_next_turns_header_is_not_scored():
    assert response_of(row(), with_template(turns(header="<assistant>"))) == f"Because.{EOS}"


def test_the_next_turns_header_is_not_scored_where_nothing_ends_the_turn():
    template = "{% for m in messages %}{{ '\\n' + m['role'] + ': ' + m['content'] }}{% endfor %}{{ '\\nassistant: ' }}"
    assert response_of(row(), with_template(template)) == f"Because.{EOS}"


def test_a_mark_that_is_a_special_token_ends_a_turn_though_it_is_not_eos():
    text = exact_pair_text(row(), with_template(turns("'<|end_header_id|>'")))
    assert (text["chosen"], text["add_eos"]) == ("Because.<|end_header_id|>", False)


@pytest.mark.parametrize("mark", ["''", "'<|im_end|>\\n'", "'\\n'", "' [END]'"])
def test_an_eos_is_added_and_told_where_the_template_ends_in_no_token(mark):
    tokenizer = with_template(turns(mark))
    assert response_of(row(), tokenizer).endswith(EOS)
    assert reasons(exact_pair_text(row(), tokenizer)) == [ENDED]


def test_a_tokenizer_without_eos_cannot_end_such_a_turn():
    tokenizer = with_template(turns("''"))
    tokenizer.eos_token = None
    assert fault(row(), tokenizer) == chat.ENDLESS


@pytest.mark.parametrize("content", [f"Because.{EOS}", f"Because.{EOS}\n", f"Because.{EOS}{EOS}", f"Because. {EOS} {EOS} "])
@pytest.mark.parametrize("name", ["llama-3", "zephyr", "gemma"])
def test_a_reply_that_brings_its_own_end_has_one(content, name):
    tokenizer = with_template(shipped_template(name))
    assert response_of(row(content), tokenizer).count(EOS) == 1
    assert SPECIAL in reasons(exact_pair_text(row(content), tokenizer))


def test_a_reply_that_brings_the_templates_end_which_is_not_eos_has_one():
    text = exact_pair_text(row("Because.<|end_header_id|>"), with_template(turns("'<|end_header_id|>'")))
    assert text["chosen"] == "Because.<|end_header_id|>"


def test_a_reply_that_is_only_an_end_is_refused_by_its_row():
    texts = pair_texts({k: [v] for k, v in row(EOS).items()}, [0], bpe_tokenizer(), preprocessing="exact", add_system=False)
    assert [finding["reason"] for finding in texts["findings"][0]] == [chat.EMPTY]


@pytest.mark.parametrize(
    "where",
    [row("The <|pad|> token."), row(prompt=[{"role": "user", "content": "<|eot_id|> in a log"}])],
    ids=["reply", "prompt"],
)
@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_a_special_token_in_what_somebody_says_is_shown(where, preprocessing):
    batch = {key: [value] for key, value in where.items()}
    texts = pair_texts(batch, [0], bpe_tokenizer(), preprocessing=preprocessing, add_system=False)
    assert [finding["reason"] for finding in texts["findings"][0]] == [SPECIAL]


# ---- Headers ----


def test_the_header_goes_to_the_prompt_where_the_template_writes_no_generation_prompt():
    text = exact_pair_text(row(), with_template(turns(header="")))
    assert text["prompt"].endswith("<assistant>")
    assert text["chosen"] == f"Because.{EOS}"
    assert reasons(text) == [SHARED_OPENING]


def test_words_that_the_template_writes_before_any_reply_are_told():
    template = (TRL / "qwen3.jinja").read_text(encoding="utf-8")
    text = exact_pair_text(row(), with_template(template))
    assert text["chosen"].startswith("<think>\n\n</think>\n\nBecause.")
    assert SCORED_OPENING in reasons(text)


# ---- Lost text ----

DROPS_THINKING = turns().replace("m['content']", "m['content'].split('</think>')[-1]")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_reply_that_the_template_shortens_is_a_fault_in_exact_and_told_in_published(side):
    row_ = row(**{side: "<think>\nA.\n</think>\n\nTwelve."})
    tokenizer = with_template(DROPS_THINKING)
    assert fault(row_, tokenizer) == LOST
    assert reasons(published_pair_text(row_, tokenizer, add_system=False)) == [LOST]


@pytest.mark.parametrize(
    "template",
    [
        turns().replace("m['content']", "m['content'][:4]"),
        turns().replace("m['content']", "m['content'] | upper"),
        turns().replace("m['content']", "''"),
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
        turns().replace("messages %}", "messages if m['role'] != 'system' %}"),
    ],
    ids=["cut", "capitals", "nothing", "questions only", "no system"],
)
def test_a_template_that_leaves_words_out_is_a_fault(template):
    system = {"role": "system", "content": "Be brief."}
    assert fault(row(prompt=[system, QUESTION]), with_template(template)) == LOST


@pytest.mark.parametrize("content", ["  Because. \n", "Be\n\n\ncause.", 'Say "so" & \\n', "<think>\nA.\n</think>\n\nB."])
def test_white_space_and_thoughts_set_off_are_no_loss(content):
    for template in (shipped_template("llama-3"), (TRL / "qwen3.jinja").read_text(encoding="utf-8")):
        exact_pair_text(row(content), with_template(template))


def test_pairs_are_compared_by_their_tokens():
    tokens = tokens_of(row("Because. ", " Because.\n"), bpe_tokenizer())
    assert same_responses(tokens) == 1
    assert "chosen and rejected are the same tokens in 1 rows" in describe_tokens(tokens, dropped=0, rules=RULES)


# ---- Keys and tools ----

QWEN3 = (TRL / "qwen3.jinja").read_text(encoding="utf-8")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


def test_reasoning_and_calls_are_written_where_the_template_knows_them():
    text = exact_pair_text(row(reply(reasoning_content="I think."), reply("Hm.", tool_calls=[CALL])), with_template(QWEN3))
    assert text["chosen"].startswith("<think>\nI think.\n</think>\n\nBecause.")
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in text["rejected"]


@pytest.mark.parametrize("keys", [{"reasoning_content": "I think."}, {"tool_calls": [CALL]}, {"reasoning": "So."}])
def test_what_a_turn_says_beside_its_content_is_never_dropped_in_silence_and_the_advice_works(keys):
    assert fault(row(reply(**keys)), bpe_tokenizer()) == UNWRITTEN
    message = refusal(exact_pair_text, row(reply(**keys)), bpe_tokenizer())
    (key,) = keys
    assert message.endswith(f"Set chat_template to one that writes {key}, or remove {key} from the rows")
    exact_pair_text(row(reply(**keys)), with_template(QWEN3))
    exact_pair_text(row(reply()), bpe_tokenizer())


@pytest.mark.parametrize("keys", [{"name": "x"}, {"score": 1.5}, {"id": "7"}, {"tool_calls": []}, {"weight": None}])
def test_other_keys_of_a_turn_are_no_loss(keys):
    exact_pair_text(row(reply(**keys)), bpe_tokenizer())


def test_a_turn_that_only_calls_a_tool_is_a_response_and_results_stand_in_the_prompt():
    prompt = [QUESTION, reply("", tool_calls=[CALL]), {"role": "tool", "content": "12 degrees"}]
    text = exact_pair_text(row("Cool.", reply("", tool_calls=[CALL]), prompt=prompt), with_template(QWEN3))
    assert "12 degrees" in text["prompt"]
    assert "<tool_call>" in text["rejected"]
    assert fault(row(prompt=prompt), with_template(shipped_template("zephyr"))) == LOST


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]]])
def test_tools_are_handed_to_the_template_and_a_template_without_them_is_a_fault(tools):
    assert '"name": "weather"' in exact_pair_text(row(tools=tools), with_template(QWEN3))["prompt"]
    assert fault(row(tools=tools), bpe_tokenizer()) == UNWRITTEN
    assert reasons(published_pair_text(row(tools=tools), bpe_tokenizer(), add_system=False)) == [UNSEEN_TOOLS]


JUNK = [{"tools": "hammer"}, {"tools": {"a": 1}}, {"tools": ["x"]}, {"documents": 5}]


@pytest.mark.parametrize("column", JUNK)
def test_a_column_called_as_one_of_the_templates_matters_only_where_it_is_read(column):
    asks = "{% if tools or documents %}{{ tools }}{{ documents }}{% endif %}" + shipped_template("llama-3")
    with pytest.raises(Fault, match=r"the template reads a list of .* there; mend the column, or remove it"):
        exact_pair_text(row(**column), with_template(asks))
    assert exact_pair_text(row(**column), bpe_tokenizer())["prompt"] == exact_pair_text(row(), bpe_tokenizer())["prompt"]
    exact_pair_text(row(), with_template(asks))  # the advice


def test_a_tool_whose_function_is_only_a_name_is_no_crash():
    asks = QWEN3.replace("tool | tojson", "tool.function")
    assert exact_pair_text(row(tools=[{"type": "function", "function": "weather"}]), with_template(asks))["chosen"]


def test_published_tells_of_what_the_template_leaves_out_of_the_prompt():
    drops = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + shipped_template("llama-3")
    prompt = [{"role": "system", "content": "Be brief."}, QUESTION]
    found = published_pair_text(row(prompt=prompt), with_template(drops), add_system=False)["findings"]
    assert [(finding.reason, "'Be brief.'" in finding.detail) for finding in found] == [(LOST, True)]


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', '{"city":"Oslo"}', {"city": 'the "city"'}, {"n": 3}])
def test_arguments_are_found_however_they_are_spelt(arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    exact_pair_text(row(reply("", tool_calls=[call])), with_template(QWEN3))


# ---- One bos ----


@pytest.mark.parametrize(
    "template",
    ["{{ '\\ufeff' + bos_token }}", "{{ bos_token + bos_token }}", "{{ '\\n' }}{{ bos_token }}", "x{{ bos_token }}"],
)
def test_a_bos_that_is_not_the_first_and_only_one_is_a_fault(template):
    tokenizer = with_template(template + turns())
    assert fault(row(), tokenizer) == SECOND_BOS
    assert SECOND_BOS in reasons(published_pair_text(row(), tokenizer, add_system=False))


def test_a_bos_for_every_question_is_a_fault():
    template = "{% for m in messages %}{{ (bos_token if m['role'] == 'user' else '') + m['content'] + eos_token }}{% endfor %}"
    asked_twice = [QUESTION, {"role": "assistant", "content": "So."}, QUESTION]
    assert fault(row(prompt=asked_twice), with_template(template)) == SECOND_BOS


def test_a_bos_that_opens_every_turn_is_the_templates_mark_of_a_turn():
    """SmolLM's tokenizers call ChatML's <|im_start|> their bos."""
    template = "{% for m in messages %}{{ bos_token + m['role'] + '\n' + m['content'] + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
    texts = exact_pair_text(row(), tokenizer := with_template(template))
    assert texts["prompt"].count(BOS) == 2
    assert texts["chosen"] == "Because." + tokenizer.eos_token
    assert SECOND_BOS not in reasons(published_pair_text(row(), tokenizer, add_system=False))
    doubled = template.replace("bos_token +", "bos_token + bos_token +")
    assert fault(row(), with_template(doubled)) == SECOND_BOS


@pytest.mark.parametrize("way", ["file", "tokenizer", "text"])
def test_a_byte_order_mark_does_not_stand_in_front_of_conversations(way, tmp_path):
    text = "\ufeff" + shipped_template("llama-3")
    (tmp_path / "my.jinja").write_text(text, encoding="utf-8")
    tokenizer = with_template(text)
    recipe = {"file": str(tmp_path / "my.jinja"), "tokenizer": None, "text": text}[way]
    found, _ = find_chat_template(tokenizer, "x", recipe_template=recipe, preprocessing="exact")
    assert found == shipped_template("llama-3")


# ---- Templates that fail ----


@pytest.mark.parametrize(
    "template",
    [
        "{{ none + 'x' }}",
        "{{ catalogue | tojson }}",
        "{{ 1 // 0 }}",
        "{{ messages[9]['content'] }}",
        "{{ messages[0].content.nothing() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages %}",
        "{{ 'a' | nofilter }}",
        "{{ raise_exception('no') }}",
    ],
)
@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_a_template_that_fails_is_one_refusal_with_the_row(template, preprocessing):
    tokenizer = with_template(template)
    with pytest.raises(TemplateRefusal):
        render([QUESTION], tokenizer)
    batch = {key: [value] for key, value in row().items()} | {"place": ["a.jsonl, line 7"]}
    if preprocessing == "published":
        assert refusal(pair_texts, batch, [0], tokenizer, preprocessing="published", add_system=False).startswith(
            "a.jsonl, line 7"
        )
    else:
        texts = pair_texts(batch, [0], tokenizer, preprocessing="exact", add_system=False)
        assert texts["findings"][0][0]["reason"] == REFUSED
        assert texts["place"] == ["a.jsonl, line 7"]


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("prompt", [[QUESTION], [{"role": "system", "content": "s"}, QUESTION], [QUESTION, QUESTION]])
def test_the_shipped_templates_that_refusals_advise_take_any_roles(name, prompt):
    exact_pair_text(row(prompt=prompt), with_template(shipped_template(name)))
    check_published_template(with_template(shipped_template(name)))


def test_named_templates_without_a_default_are_refused_and_the_advice_works():
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = {"tool_use": turns(), "rag": "{{ 'rag' }}"}
    message = refusal(find_chat_template, tokenizer, "m", recipe_template=None, preprocessing="exact")
    assert "tool_use, rag, and none is the default; choose one: chat_template: tool_use" in message
    assert find_chat_template(tokenizer, "m", recipe_template="tool_use", preprocessing="exact")[0] == turns()


def test_named_templates_keep_their_names_and_render_by_their_default():
    tokenizer = bpe_tokenizer()
    named = {"default": turns(), "rag": "{{ 'rag' }}"}
    tokenizer.chat_template = named
    assert find_chat_template(tokenizer, "m", recipe_template=None, preprocessing="exact")[0] == named
    assert exact_pair_text(row(), tokenizer)["chosen"] == f"Because.{EOS}"
    assert published_pair_text(row(), tokenizer, add_system=True)["system_added"] is False


def test_a_template_file_that_is_no_text_is_one_error(tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"caf\xe9")
    assert "is not UTF-8" in refusal(read_template, str(tmp_path / "t.jinja"))
    assert "no such file" in refusal(read_template, str(tmp_path))


# ---- Settings and the clock ----


def test_a_setting_reaches_the_template_and_the_saved_tokenizer(tmp_path):
    tokenizer = with_template(QWEN3)
    tokenizer.chat_template = with_settings(QWEN3, {"enable_thinking": False}, tokenizer)
    text = exact_pair_text(row(), tokenizer)
    assert text["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert text["chosen"].startswith("Because.")
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    options = {"tokenize": False, "add_generation_prompt": True}
    assert saved.apply_chat_template([QUESTION], **options) == text["prompt"]
    assert saved.apply_chat_template([QUESTION], enable_thinking=True, **options).endswith("assistant\n")


@pytest.mark.parametrize(
    "value", [True, False, None, 3, -1.5, "text", 'a "b" {{ c }} \\n é', "😀", ["a", 1], {"key": [None, "v"]}, 1e-7]
)
def test_a_setting_is_read_as_it_was_written(value):
    tokenizer = bpe_tokenizer()
    probe = "{{ given | tojson }}{% macro m() %}{{ given | tojson }}{% endmacro %}{% for m_ in messages %}{{ m() }}{% endfor %}"
    tokenizer.chat_template = with_settings(probe, {"given": value}, tokenizer)
    assert render([QUESTION], tokenizer) == json.dumps(value, ensure_ascii=False) * 2


def test_settings_leave_the_text_of_a_template_as_it_was():
    tokenizer = bpe_tokenizer()
    for template in ("\n  {% if x %}a{% endif %}\n  b", "  text {{ x }}", "{%- if x %}a{% endif %}", "\n\n{{ x }}"):
        tokenizer.chat_template = template
        plain = tokenizer.apply_chat_template([QUESTION], tokenize=False, x="x")
        tokenizer.chat_template = with_settings(template, {"x": "x"}, tokenizer)
        assert render([QUESTION], tokenizer) == plain


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("enable_thinkng", "did you mean 'enable_thinking'"),
        ("colour_of_hair", "reads nothing of this name"),
        ("message", "reads nothing of this name"),  # a word of the template, and no variable
        ("messages", "is given by"),
        ("bos_token", "is given by"),
    ],
)
def test_a_setting_without_an_effect_is_refused(key, advice):
    message = refusal(with_settings, QWEN3, {key: True}, bpe_tokenizer())
    assert message.startswith(f"chat_template_kwargs.{key}: ")
    assert advice in message


def test_a_setting_reaches_every_named_template():
    named = with_settings({"default": "{{ x }}", "rag": "{{ x }}r"}, {"x": 1}, bpe_tokenizer())
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = named
    assert render([QUESTION], tokenizer) == "1"


def test_literals_are_jinjas():
    assert literal({"a": [None, True, "x"]}) == '{"a": [none, true, "x"]}'


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %-d. %B %y", "100%% %H:%M:%S", "%j %x"])
def test_the_clock_of_a_template_stands_on_the_runs_day(form):
    template = (
        "{% macro now() %}{{ strftime_now('"
        + form
        + "') }}{% endmacro %}{% if strftime_now is defined %}{{ now() }}{% endif %}"
    )
    assert render([QUESTION], with_template(template), date="2024-02-09") == datetime(2024, 2, 9).strftime(form)


def test_rows_are_rendered_again_on_another_day_only_if_the_template_reads_the_clock():
    rows = Dataset.from_list([row()])
    options = {"preprocessing": "exact", "add_system": False, "num_proc": None}
    for template, differs in ((turns(), False), ("{{ strftime_now('%d') }}" + turns(), True)):
        tokenizer = with_template(template)
        texts = [to_pair_texts(rows, tokenizer, date=date, **options) for date in ("2024-02-09", "2024-02-10")]
        assert (texts[0]._fingerprint != texts[1]._fingerprint) is differs
        assert ("09" in texts[0][0]["prompt"]) is differs


def test_the_clock_is_jinja_that_starts_a_template():
    assert clock("2024-02-09").startswith("{% macro strftime_now(format) %}")


# ---- Whole conversations ----


def conversations(template: str, *messages: dict) -> list[str]:
    tokenizer = with_template(template)
    rows = Dataset.from_list([{"messages": [QUESTION, *messages]}])
    texts = to_message_texts(rows, tokenizer, preprocessing="exact", add_system=False, num_proc=None)
    return [tokenizer.decode(ids) for ids in to_sequences(texts, tokenizer, num_proc=None)["input_ids"]]


@pytest.mark.parametrize("template", [turns(), turns("''"), turns(header="<assistant>"), turns("'<|im_end|>'")])
def test_a_conversation_for_supervised_training_ends_its_last_turn_once(template):
    (text,) = conversations(template, reply(f"Because.{EOS}"))
    assert text.endswith(EOS)
    assert text.count(EOS) == (2 if "eos_token" in template else 1)


def test_a_conversation_that_the_template_shortens_is_told():
    batch = {"messages": [[QUESTION, reply("<think>Twice two.</think>Four.")]]}
    for preprocessing in ("published", "exact"):
        texts = message_texts(batch, [0], with_template(DROPS_THINKING), preprocessing=preprocessing, add_system=False)
        assert texts["findings"][0][0]["reason"] == LOST
