"""Text -> token ids, against the published algorithm one text at a time, and against cuts done by hand."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from alignment.data import tokenization
from alignment.data.tokenization import SIDES, LengthRules, encode_texts, tokenize_pair, tokenize_pairs, tokenize_texts
from alignment.errors import UserError
from alignment.preference.collate import PaddedCollator
from tests import reference
from tests.builders import BOS, EOS, WORDS, bpe_tokenizer, text_rows

TOKENIZERS = {bos: bpe_tokenizer(bos=bos) for bos in (True, False)}
BOS_ID, EOS_ID = TOKENIZERS[True].convert_tokens_to_ids([BOS, EOS])
# It writes its bos in front of what it serves.
TOKENIZERS[True].backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])

# Words cut anywhere, so that the end of one text and the beginning of the next merge into a token; and odd characters.
FRAGMENTS = st.sampled_from([*WORDS, *(word[:2] for word in WORDS), *(word[-2:] for word in WORDS), " ", "\n", "  ", EOS])
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=14).map("".join)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}), min_size=1, max_size=4)


@st.composite
def length_rules(draw, preprocessing: str) -> LengthRules:
    max_length = draw(st.integers(2, 40))
    mode = draw(st.sampled_from(["keep_end", "keep_start"]))
    return LengthRules(max_length, draw(st.integers(1, max_length - 1)), mode, preprocessing)


def rules(preprocessing: str, max_length: int = 10, max_prompt_length: int = 4, mode: str = "keep_end") -> LengthRules:
    return LengthRules(max_length, max_prompt_length, mode, preprocessing)


def tokens_of(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, rules: LengthRules) -> list[dict[str, Any]]:
    batch = {column: [row[column] for row in rows] for column in ("prompt", "chosen", "rejected")}
    columns = tokenize_pairs(batch, list(range(len(rows))), tokenizer, rules)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def labels_of(row: dict[str, Any], side: str) -> list[int]:
    ids, prompt = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
    return [-100] * prompt + ids[prompt:]


def prompt_and_response(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
    ids, prompt = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
    assert len(ids) == prompt + row[f"{side}_length"]
    return ids[:prompt], ids[prompt:]


# ---- published: the algorithm in reference.py ----


def same_as_the_reference(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, rules: LengthRules) -> None:
    try:
        expected = [reference.tokenize_row(row, tokenizer, rules) for row in rows]
    except ValueError:
        with pytest.raises(UserError, match="do not begin with the same prompt tokens"):
            tokens_of(rows, tokenizer, rules)
        return
    for row, wanted in zip(tokens_of(rows, tokenizer, rules), expected, strict=True):
        for side in SIDES:
            assert row[f"{side}_input_ids"] == wanted[f"{side}_input_ids"]
            assert labels_of(row, side) == wanted[f"{side}_labels"]


@pytest.mark.parametrize("bos", [True, False])
@settings(max_examples=150)
@given(rows=ROWS, rules=length_rules("published"))
def test_any_text_gives_the_published_tokens_and_labels(bos, rows, rules):
    same_as_the_reference(rows, TOKENIZERS[bos], rules)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(400, 200), (120, 60), (60, 50), (40, 1)])
def test_chat_rows_give_the_published_tokens_and_labels(bos, mode, max_length, max_prompt_length):
    same_as_the_reference(text_rows(24), TOKENIZERS[bos], rules("published", max_length, max_prompt_length, mode))


# One letter is one token: B bos, E eos, a.. the prompt, s.. chosen, R rejected.


def ids(letters: str) -> list[int]:
    return [{"B": BOS_ID, "E": EOS_ID}.get(letter, ord(letter)) for letter in letters]


def cut(prompt: str, chosen: str, rejected: str, rules: LengthRules) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each side, after the cut."""
    row = tokenize_pair(ids(prompt), ids(prompt + chosen), ids(prompt + rejected), TOKENIZERS[True], rules)
    return [prompt_and_response(row, side) for side in SIDES]


@pytest.mark.parametrize(
    ("mode", "given", "expected"),
    [
        ("keep_end", ("ab", "s", "RR"), ("Bab", "sE", "RRE")),
        # 5 + 5 = 10 fits exactly.
        ("keep_end", ("abcd", "stuv", "R"), ("Babcd", "stuvE", "RE")),
        # One more: the prompt falls to 4 tokens and its bos is lost; then 4 + 6 = 10 fits.
        ("keep_end", ("abcd", "stuvw", "R"), ("abcd", "stuvwE", "RE")),
        ("keep_start", ("abcd", "stuvw", "R"), ("Babc", "stuvwE", "RE")),
        # 4 + 7 > 10: every response of the pair keeps its first 10 - 4 tokens, and the longer one loses its eos.
        ("keep_end", ("abcd", "stuvwx", "R"), ("abcd", "stuvwx", "RE")),
        # A short prompt frees nothing: 3 + 8 > 10 cuts the response to 6 all the same.
        ("keep_end", ("ab", "stuvwxy", "R"), ("Bab", "stuvwx", "RE")),
        # bos and eos that are there already are not doubled.
        ("keep_end", ("Ba", "sE", "R"), ("Ba", "sE", "RE")),
    ],
)
def test_the_published_cut_of_10_tokens_with_4_for_the_prompt(mode, given, expected):
    prompt, chosen, rejected = map(ids, expected)
    assert cut(*given, rules("published", mode=mode)) == [(prompt, chosen), (prompt, rejected)]


# ---- exact: what those rules meant ----


@pytest.mark.parametrize(
    ("mode", "given", "expected"),
    [
        ("keep_end", ("ab", "s", "RR"), ("Bab", "s", "RR")),
        # 5 + 6 = 11: one token of the prompt goes, not its bos.
        ("keep_end", ("abcd", "stuvwx", "R"), ("Bbcd", "stuvwx", "R")),
        ("keep_start", ("abcd", "stuvwx", "R"), ("Babc", "stuvwx", "R")),
        # 5 + 7 = 12: the prompt keeps the 4 tokens that it is promised, the response the 6 that are left.
        ("keep_end", ("abcd", "stuvwxy", "R"), ("Bbcd", "stuvwx", "R")),
        # A prompt shorter than that leaves the response more.
        ("keep_end", ("a", "stuvwxyz0", "R"), ("Ba", "stuvwxyz", "R")),
        # A long prompt may fill what short responses leave: 10 - 2 = 8.
        ("keep_end", ("abcdefghij", "st", "R"), ("Bdefghij", "st", "R")),
    ],
)
def test_the_exact_cut_of_10_tokens_with_4_for_the_prompt(mode, given, expected):
    prompt, chosen, rejected = map(ids, expected)
    assert cut(*given, rules("exact", mode=mode)) == [(prompt, chosen), (prompt, rejected)]


def test_a_prompt_limit_of_one_keeps_only_the_bos_in_exact_mode():
    assert cut("ab", "stu", "R", rules("exact", 3, 1)) == [(ids("B"), ids("st")), (ids("B"), ids("R"))]


@pytest.mark.parametrize("bos", [True, False])
@settings(max_examples=150)
@given(rows=ROWS, rules=length_rules("exact"))
def test_any_text_obeys_the_exact_rules(bos, rows, rules):
    """Never too long; cut no more than needed; a bos in front, nothing else added; every response token the text's own."""
    tokenizer = TOKENIZERS[bos]
    try:
        tokens = tokens_of(rows, tokenizer, rules)
    except UserError:
        return  # a merge across more than one token; the published test above says when
    for text, row in zip(rows, tokens, strict=True):
        start = [BOS_ID] if bos else []
        parts = {side: reference.split(tokenizer, text["prompt"], text[side]) for side in SIDES}
        longer = max(len(response) for _, response in parts.values())
        for side, (full_prompt, full_response) in parts.items():
            prompt, response = prompt_and_response(row, side)
            full_prompt = start + full_prompt
            room = max(rules.max_length - longer, rules.max_prompt_length)
            assert len(prompt) == min(len(full_prompt), room)
            assert prompt[: len(start)] == start[: len(prompt)]
            rest, kept = full_prompt[len(start) :], prompt[len(start) :]
            assert kept == (rest[: len(kept)] if rules.truncation_mode == "keep_start" else rest[len(rest) - len(kept) :])
            assert response == full_response[: rules.max_length - len(prompt)]
            assert len(prompt) + len(response) <= rules.max_length


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
@pytest.mark.parametrize("max_length", [400, 60])
def test_both_sides_keep_the_same_prompt_where_nothing_merges(preprocessing, max_length):
    for row in tokens_of(text_rows(24, preprocessing=preprocessing), TOKENIZERS[True], rules(preprocessing, max_length, 40)):
        assert prompt_and_response(row, "chosen")[0] == prompt_and_response(row, "rejected")[0]


@pytest.mark.parametrize(("preprocessing", "added"), [("published", 1), ("exact", 0)])
def test_an_eos_behind_the_templates_own_end_is_added_in_published_mode_only(preprocessing, added):
    """The template ends a turn with a newline behind the eos, as Zephyr's does."""
    rows = [{"prompt": "what is it?", "chosen": f" this{EOS}\n", "rejected": f" that{EOS}\n"}]
    (row,) = tokens_of(rows, TOKENIZERS[True], rules(preprocessing, 400, 200))
    for side in SIDES:
        assert prompt_and_response(row, side)[1].count(EOS_ID) == 1 + added
    assert row["eos_added"] == bool(added)


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
@pytest.mark.parametrize("written", ["", BOS])
def test_a_row_has_exactly_one_bos_whether_its_template_writes_one_or_not(preprocessing, written):
    rows = [{"prompt": f"{written}what is it?", "chosen": " this", "rejected": " that"}]
    (row,) = tokens_of(rows, TOKENIZERS[True], rules(preprocessing, 400, 200))
    for side in SIDES:
        assert row[f"{side}_input_ids"][0] == BOS_ID
        assert row[f"{side}_input_ids"].count(BOS_ID) == 1


@pytest.mark.parametrize(("preprocessing", "added"), [("published", 1), ("exact", 0)])
def test_exact_adds_no_bos_that_neither_the_template_nor_the_tokenizer_writes(preprocessing, added):
    rows = [{"prompt": "what is it?", "chosen": " this", "rejected": " that"}]
    (row,) = tokens_of(rows, bpe_tokenizer(), rules(preprocessing, 400, 200))  # it has a bos, and writes none
    assert [row[f"{side}_input_ids"].count(BOS_ID) for side in SIDES] == [added, added]


# ---- Where the response begins ----


def merging_row() -> dict[str, str]:
    """` the` and ` then` are one token each; ` ` + `the`, cut where prompt and response meet, would be two."""
    return {"prompt": "some of th", "chosen": "e river", "rejected": " river"}


def test_a_token_that_merges_across_the_boundary_belongs_to_the_response():
    tokenizer = TOKENIZERS[True]
    row = merging_row()
    whole = tokenizer.tokenize(row["prompt"] + row["chosen"])
    assert "Ġthe" in whole  # the case in question: " th" alone is another token
    (tokens,) = tokens_of([row], tokenizer, rules("published", 400, 200))
    prompt, response = prompt_and_response(tokens, "chosen")
    assert tokenizer.decode(prompt[1:]) == "some of"
    assert tokenizer.decode(response) == f" the river{EOS}"
    assert tokenizer.decode(prompt_and_response(tokens, "rejected")[0][1:]) == "some of th"


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_no_prompt_token_is_ever_a_label(preprocessing):
    rows = tokens_of(text_rows(24, preprocessing=preprocessing), TOKENIZERS[True], rules(preprocessing, 120, 60))
    batch = PaddedCollator(pad_token_id=0)(rows)
    for labels, (row, side) in zip(batch["shift_labels"], ((r, s) for s in SIDES for r in rows), strict=True):
        prompt, response = prompt_and_response(row, side)
        assert (labels[: len(prompt) - 1] == -100).all()
        assert labels[labels != -100].tolist() == response


def test_pairs_whose_prompts_differ_in_two_tokens_are_an_error_that_names_the_row(monkeypatch):
    encoded = {"p": [11, 12, 13], "pc": [8, 9, 10, 21], "pr": [11, 12, 13, 31]}
    monkeypatch.setattr(tokenization, "encode_texts", lambda _tokenizer, texts: [encoded[text] for text in texts])
    with pytest.raises(UserError, match=r"row 17: .*the same prompt tokens"):
        tokenize_pairs({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]}, [17], TOKENIZERS[True], rules("exact"))


# ---- Tokenizers ----


@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
@settings(max_examples=50)
def test_a_batch_has_the_ids_of_its_texts_one_by_one(texts):
    for tokenizer in (*TOKENIZERS.values(), ByT5Tokenizer()):
        assert encode_texts(tokenizer, texts) == [reference.encode(tokenizer, text) for text in texts]


def test_a_tokenizer_saved_with_truncation_and_padding_still_gives_every_token(tmp_path):
    """Calls with truncation and padding leave their settings in tokenizer.json; many published models have them there."""
    used = bpe_tokenizer()
    used(["what is it?", "no"], truncation=True, max_length=3, padding=True)
    used.save_pretrained(tmp_path)
    texts = ["which mountain is it, because of the river", "no"]
    assert encode_texts(AutoTokenizer.from_pretrained(tmp_path), texts) == encode_texts(bpe_tokenizer(), texts)


def test_conversations_get_one_bos_where_the_tokenizer_has_one():
    texts = {"text": ["what is it?", f"{BOS}what is it?"]}
    plain = encode_texts(TOKENIZERS[False], ["what is it?"])[0]
    assert tokenize_texts(texts, TOKENIZERS[True])["input_ids"] == [[BOS_ID, *plain]] * 2
    assert tokenize_texts({"text": ["what is it?"]}, TOKENIZERS[False])["input_ids"] == [plain]


def test_a_row_says_whether_it_was_cut_and_how_long_it_is():
    fits, cut = tokens_of(
        [
            {"prompt": "what is it?", "chosen": " this", "rejected": " that"},
            {"prompt": "what is it?", "chosen": " this" * 20, "rejected": " that"},
        ],
        TOKENIZERS[True],
        rules("exact", 12, 6),
    )
    assert (fits["truncated"], cut["truncated"]) == (False, True)
    assert cut["length"] == len(cut["chosen_input_ids"]) == 12
    assert (fits["index"], cut["index"]) == (0, 1)
