"""What is computed once, what is computed again, and what is said about it."""

import pytest
from datasets import Dataset

from alignment.data import chat, prepare, tokenization
from alignment.data.chat import TEXT_COLUMNS
from alignment.data.prepare import (
    describe_published,
    describe_tokens,
    to_message_texts,
    to_pair_texts,
    to_sequences,
    to_tokens,
    worker_count,
)
from alignment.data.template import shipped_template
from alignment.data.tokenization import LengthRules
from alignment.errors import UserError
from tests.builders import bpe_tokenizer, pairs, split_pairs, text_rows, token_rows

RULES = LengthRules(200, 100, "keep_end", "published")


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[str]:
    """Names of the encoder and the renderer, once for each time that they were called; on an empty cache."""
    seen = []

    def counted(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(tokenization, "encode_texts")
    counted(chat, "render")
    monkeypatch.setattr(prepare.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return seen


def texts(rows=6, seed=0) -> Dataset:
    return Dataset.from_list(text_rows(rows, seed))


def tokens(rules=RULES, tokenizer=None, rows=6, seed=0) -> Dataset:
    return to_tokens(texts(rows, seed), tokenizer or bpe_tokenizer(), rules, num_proc=None)


def with_template(name: str):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = shipped_template(name)
    return tokenizer


# ---- The cache ----


def test_a_second_run_tokenizes_nothing(calls):
    first = tokens()
    assert calls.count("encode_texts") == 1
    assert tokens()[:] == first[:]
    assert calls.count("encode_texts") == 1


def test_a_tokenizer_that_has_padded_something_finds_what_it_made_before(calls):
    tokens()
    used = bpe_tokenizer()
    used(["what is it?", "no"], truncation=True, max_length=3, padding=True)
    tokens(tokenizer=used)
    assert calls.count("encode_texts") == 1


def test_a_second_run_renders_nothing(calls):
    conversations = Dataset.from_list(split_pairs(pairs(6)))
    first, second = (
        to_pair_texts(conversations, bpe_tokenizer(), preprocessing="exact", add_system=False, num_proc=None)[:]
        for _ in range(2)
    )
    assert calls == ["render"] * 24  # the prompt, a probe and two conversations a row
    assert first == second


@pytest.mark.parametrize(
    "changed",
    [
        {"rules": RULES._replace(max_length=180)},
        {"rules": RULES._replace(max_prompt_length=90)},
        {"rules": RULES._replace(truncation_mode="keep_start")},
        {"rules": RULES._replace(preprocessing="exact")},
        {"tokenizer": bpe_tokenizer(bos=False)},
        {"rows": 7},
        {"seed": 1},
    ],
    ids=["max_length", "max_prompt_length", "truncation_mode", "preprocessing", "tokenizer", "rows", "content"],
)
def test_what_changes_the_tokens_tokenizes_anew(calls, changed):
    tokens()
    tokens(**changed)
    assert calls.count("encode_texts") == 2


@pytest.mark.parametrize(
    ("tokenizer", "settings"),
    [
        (with_template("gemma"), {"preprocessing": "exact", "add_system": False}),
        (bpe_tokenizer(), {"preprocessing": "published", "add_system": False}),
        (bpe_tokenizer(), {"preprocessing": "exact", "add_system": True}),
    ],
    ids=["template", "preprocessing", "add_system"],
)
def test_what_changes_the_text_renders_anew(calls, tokenizer, settings):
    conversations = Dataset.from_list(split_pairs(pairs(6)))
    to_pair_texts(conversations, bpe_tokenizer(), preprocessing="exact", add_system=False, num_proc=None)
    before = len(calls)
    to_pair_texts(conversations, tokenizer, **settings, num_proc=None)
    assert len(calls) > before


def test_changed_code_tokenizes_anew(calls, monkeypatch):
    tokens()
    monkeypatch.setattr(prepare.inspect, "getsource", lambda module: "another version")
    tokens()
    assert calls.count("encode_texts") == 2


def test_two_processes_give_the_rows_of_one(monkeypatch, tmp_path):
    expected = tokens()[:]
    monkeypatch.setattr(prepare.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(prepare, "worker_count", lambda num_proc, rows: num_proc)
    assert to_tokens(texts(), bpe_tokenizer(), RULES, num_proc=2)[:] == expected


@pytest.mark.parametrize(
    ("num_proc", "rows", "workers"),
    [(None, 10**6, None), (1, 10**6, None), (4, 1999, None), (4, 2500, 2), (4, 10**6, 4)],
)
def test_a_second_process_is_started_for_a_thousand_rows_each(num_proc, rows, workers):
    assert worker_count(num_proc, rows) == workers


# ---- Rows ----


def test_a_pair_without_a_response_token_is_dropped_and_the_others_keep_their_numbers():
    rows = text_rows(4, preprocessing="exact")
    rows[1]["chosen"] = ""
    kept = to_tokens(Dataset.from_list(rows), bpe_tokenizer(), RULES._replace(preprocessing="exact"), num_proc=None)
    assert kept["index"] == [0, 2, 3]


def test_data_without_any_token_to_score_is_an_error():
    rows = [{**row, "rejected": ""} for row in text_rows(3, preprocessing="exact")]
    with pytest.raises(UserError, match=r"none of 3 pairs has a token left to score .* max_length \(200\)"):
        to_tokens(Dataset.from_list(rows), bpe_tokenizer(), RULES._replace(preprocessing="exact"), num_proc=None)


def test_a_response_whose_only_token_nothing_predicts_is_dropped():
    """Without a bos and without a prompt token of its own, `a` + `t` is one token and the first of its row."""
    row = {"prompt": "a", "chosen": "t", "rejected": "t it is"}
    rules = RULES._replace(preprocessing="exact")
    kept = to_tokens(Dataset.from_list([row, *text_rows(1)]), bpe_tokenizer(bos=False), rules, num_proc=None)
    assert kept["index"] == [1]


def test_conversations_become_sequences_with_a_bos():
    tokenizer = bpe_tokenizer()
    conversations = Dataset.from_list([{"messages": row["chosen"]} for row in pairs(3)])
    rendered = to_message_texts(conversations, tokenizer, preprocessing="exact", add_system=False, num_proc=None)
    sequences = to_sequences(rendered, tokenizer, num_proc=None)
    assert sequences["input_ids"] == tokenizer(rendered["text"][:], add_special_tokens=False)["input_ids"]
    assert [row[0] for row in sequences["input_ids"]] == [tokenizer.bos_token_id] * 3


# ---- What is said about them ----


def test_the_description_gives_lengths_cuts_and_the_longer_side():
    """Chosen 10, 20, 60: the 95th percentile of three values lies 0.9 of the way from the second to the third."""
    rows = token_rows([(2, 10, 11), (4, 20, 12), (6, 60, 13)])
    rows[2]["truncated"] = True
    assert describe_tokens(Dataset.from_list(rows), dropped=1200, rules=RULES) == (
        "tokens (median / 95 % / max): prompt 4 / 6 / 6, chosen 20 / 56 / 60, rejected 12 / 13 / 13; "
        "1 rows truncated to 200; chosen is the longer in 67%; 1,200 rows dropped (no response token left)"
    )


def test_nothing_is_said_of_dropped_rows_where_there_are_none():
    assert "dropped" not in describe_tokens(Dataset.from_list(token_rows([(2, 3, 4)])), dropped=0, rules=RULES)


def test_published_mode_says_how_many_rows_each_of_its_oddities_touches():
    conversations, tokenizer = Dataset.from_list(split_pairs(pairs(6))), with_template("zephyr")
    rendered = to_pair_texts(conversations, tokenizer, preprocessing="published", add_system=True, num_proc=None)
    cut = to_tokens(rendered, tokenizer, RULES._replace(max_length=60, max_prompt_length=30), num_proc=None)
    truncated = sum(cut["truncated"])
    assert truncated > 0
    assert describe_published(rendered, cut, tokenizer) == (
        "published rules: assistant header scored with the response in 6 rows, empty system turn added in 6 rows, "
        f"eos added behind the template's own end in 6 rows, cut to fixed parts of max_length in {truncated} rows "
        "(preprocessing: exact does none of this)"
    )


def test_a_template_that_suits_the_published_rules_is_said_to_be_untouched():
    columns = dict(zip(TEXT_COLUMNS, ("[INST] Why? [/INST]", " So. <|eot_id|>", " No. <|eot_id|>"), strict=True))
    rendered = Dataset.from_list([{**columns, "system_added": False}])
    text = describe_published(rendered, to_tokens(rendered, bpe_tokenizer(), RULES, num_proc=None), with_template("mistral"))
    assert text.count(" in 0 rows") == 4
