"""What a dry run shows of a row is what the collator gets, id by id, under every shipped template."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import trl
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from alignment.data.chat import TEXT_COLUMNS, pair_texts
from alignment.data.prepare import to_tokens
from alignment.data.splits import Prepared
from alignment.data.template import shipped_names, shipped_template
from alignment.data.tokenization import SIDES, LengthRules
from alignment.errors import UserError
from alignment.preference.collate import IGNORED, PackedCollator, PaddedCollator
from alignment.preflight.rows import (
    Cut,
    ShownRow,
    chosen_rows,
    place_of,
    shown_conversation,
    shown_pair,
    texts_of,
)
from alignment.preflight.shown import has_colours, show_row
from tests.builders import bpe_tokenizer, pairs, split_pairs

DATE = "2026-07-29"
TRL_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
MARK = re.compile(r"<\|?[\w /-]+\|?>")
MODES = ("published", "exact")
# Limits under which, of the pairs below, some are whole, some lose of the prompt, and some of a response too.
RULES = [(200, 100), (90, 40), (48, 44)]


def tokenizer_for(template: str) -> PreTrainedTokenizerBase:
    """With the template's marks as special tokens, as its model's tokenizer has them."""
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(MARK.findall(template)))})
    tokenizer.chat_template = template
    return tokenizer


def prepared(template: str, mode: str, limits: tuple[int, int], side: str = "keep_end") -> tuple:
    """Twelve pairs of one or two questions, from conversations to tokens; and what they were made with."""
    tokenizer, rules = tokenizer_for(template), LengthRules(*limits, side, mode)
    rows = split_pairs(pairs(12))
    batch = {column: [row[column] for row in rows] for column in TEXT_COLUMNS}
    texts = Dataset.from_dict(pair_texts(batch, list(range(12)), tokenizer, preprocessing=mode, add_system=False, date=DATE))
    return Prepared(to_tokens(texts, tokenizer, rules, num_proc=None), texts, None, []), tokenizer, rules


def from_padded(row: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[list[int], list[bool]]]:
    """Ids of each side, and which of them are scored, as a padded batch has them."""
    batch = PaddedCollator(tokenizer.pad_token_id)([row])
    sides = {}
    for number, side in enumerate(SIDES):
        length = int(batch["attention_mask"][number].sum())
        labels = batch["shift_labels"][number, :length]
        sides[side] = batch["input_ids"][number, :length].tolist(), [False, *(labels != IGNORED).tolist()[:-1]]
    return sides


def from_packed(row: dict) -> dict[str, tuple[list[int], list[bool]]]:
    """The same, read back from the prompt and the branch of a packed row; the last token is a label only."""
    batch = PackedCollator()([row])
    (prompt, *branches) = segments if len(segments := batch["shared_prompt"].segments) == 3 else (None, *segments)
    ids, labels, sides = batch["input_ids"][0].tolist(), batch["shift_labels"][0].tolist(), {}
    for side, branch in zip(SIDES, branches, strict=True):
        places = [*range(prompt.start, prompt.start + prompt.length)] if prompt else []
        places += range(branch.start, branch.start + branch.length)
        sides[side] = (
            [*(ids[place] for place in places), labels[places[-1]]],
            [False, *(labels[place] != IGNORED for place in places)],
        )
    return sides


def check_row(place: int, split: Prepared, tokenizer: PreTrainedTokenizerBase, rules: LengthRules) -> ShownRow:
    shown, row = shown_pair(place, "any", split, tokenizer, rules), split.tokens[place]
    for collated in (from_padded(row, tokenizer), from_packed(row)):
        for side in shown.sides:
            assert ([token.id for token in side.tokens], [token.is_scored for token in side.tokens]) == collated[side.name]
    for side in shown.sides:
        assert "".join(token.text for token in side.tokens) == tokenizer.decode(
            [token.id for token in side.tokens], clean_up_tokenization_spaces=False
        )
    return shown


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", shipped_names())
def test_what_is_shown_is_what_both_collators_get_id_by_id(name, mode):
    for limits in RULES:
        for side in ("keep_end", "keep_start"):
            split, tokenizer, rules = prepared(shipped_template(name), mode, limits, side)
            for place in range(len(split.tokens)):
                check_row(place, split, tokenizer, rules)


def test_it_is_so_under_the_templates_of_trl_too():
    """Those that suit `exact` (docs/templates.md); the others are refused before a row is shown."""
    shown = 0
    for path in TRL_TEMPLATES:
        try:
            split, tokenizer, rules = prepared(path.read_text(encoding="utf-8"), "exact", (90, 40))
        except UserError:
            continue
        flawed = {place for place, found in enumerate(split.texts["findings"]) if found}
        for place in [place for place, index in enumerate(split.tokens["index"]) if index not in flawed][:2]:
            check_row(place, split, tokenizer, rules)
            shown += 1
    assert shown > 40


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["keep_end", "keep_start"])
def test_a_cut_is_marked_where_it_is_and_with_its_tokens(mode, side):
    cut_split, tokenizer, rules = prepared(shipped_template("llama-3"), mode, (48, 44), side)
    whole_split, *_ = prepared(shipped_template("llama-3"), mode, (10**6, 10**5), side)
    whole = {row["index"]: row for row in whole_split.tokens}
    seen = set()
    for place, row in enumerate(cut_split.tokens):
        for shown in shown_pair(place, "any", cut_split, tokenizer, rules).sides:
            before = whole[row["index"]][f"{shown.name}_input_ids"]
            ids = [token.id for token in shown.tokens]
            missing = sum(cut.tokens for cut in shown.cuts)
            assert missing == len(before) - len(ids)
            assert bool(missing) is row[f"{shown.name}_truncated"]
            restored = ids
            for cut in reversed(shown.cuts):  # what stood there, put back, makes the row whole again
                start = cut.before if cut.before < len(ids) else len(before) - cut.tokens
                restored = restored[: cut.before] + before[start : start + cut.tokens] + restored[cut.before :]
                seen.add("prompt" if cut.before <= shown.prompt_length else "response")
            assert restored == before
    assert seen == {"prompt", "response"}


def test_a_conversation_is_shown_as_it_is_cut(tokenizer):
    ids = tokenizer("one river, two mountains and some lanterns")["input_ids"]
    whole, start, end = (
        shown_conversation(0, "any", ids, limit, mode, tokenizer).sides[0]
        for limit, mode in ((None, "keep_start"), (4, "keep_start"), (4, "keep_end"))
    )
    assert [token.id for token in whole.tokens] == ids
    assert whole.cuts == []
    assert ([token.id for token in start.tokens], start.cuts) == (ids[:4], [Cut(4, len(ids) - 4)])
    assert ([token.id for token in end.tokens], end.cuts) == (ids[-4:], [Cut(0, len(ids) - 4)])
    assert [token.is_scored for token in whole.tokens] == [False] + [True] * (len(ids) - 1)


# ---- Texts ----


@pytest.mark.parametrize("text", ["plain words", "wörld, 你好 🙂 end", "a\n\n  b\tc", "<|eot_id|>x<|begin_of_text|>"])
def test_the_texts_of_tokens_are_the_text_of_all(text, tokenizer):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = list(texts_of(ids, tokenizer))
    assert len(texts) == len(ids)
    assert "".join(texts) == text


# ---- Which rows ----


def test_the_first_the_longest_and_a_cut_row_are_chosen():
    assert chosen_rows(np.array([5, 9, 3, 7]), np.array([False, False, False, True])) == {
        0: "the first", 1: "the longest", 3: "the first that is cut",
    }  # fmt: skip
    assert chosen_rows(np.array([5, 9, 3]), np.zeros(3, bool)) == {0: "the first", 1: "the longest", 2: "the shortest"}
    assert chosen_rows(np.array([9, 1]), np.array([True, False])) == {0: "the first, the longest, the first that is cut"}


def test_a_row_is_found_by_its_number_in_the_split_and_a_dropped_one_is_named():
    tokens = Dataset.from_dict({"index": [0, 2, 3]})
    assert place_of(2, tokens, read=5) == 1
    with pytest.raises(UserError, match="show_row = 1: the row was dropped"):
        place_of(1, tokens, read=5)
    with pytest.raises(UserError, match="show_row = 5: the training split has rows 0 to 4"):
        place_of(5, tokens, read=5)


# ---- On a terminal, and in a pipe ----


def printed(row: ShownRow, *, terminal: bool, whole: bool = True, environment: dict | None = None) -> str:
    stream = io.StringIO()
    settings = {"width": 100_000, "markup": False, "highlight": False, "emoji": False}
    console = Console(
        file=stream,
        force_terminal=terminal,
        color_system="auto",
        _environ=environment or {"TERM": "xterm-256color"},
        **settings,
    )
    show_row(console, row, whole=whole)
    return stream.getvalue()


@pytest.fixture(scope="module")
def cut_row() -> ShownRow:
    split, tokenizer, rules = prepared(shipped_template("llama-3"), "exact", (48, 40))
    place = next(place for place, row in enumerate(split.tokens) if row["truncated"])
    return shown_pair(place, "the first that is cut", split, tokenizer, rules)


def test_a_pipe_gets_marks_from_which_every_token_can_be_read_back(cut_row):
    text = printed(cut_row, terminal=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert re.fullmatch(r"row \d+ \(the first that is cut\)", lines[1])
    assert [line.split(",")[0] for line in lines[2::2]] == ["prompt", "chosen", "rejected"]
    for side, line in zip(cut_row.sides, (lines[5], lines[7]), strict=True):
        marked = re.sub(r" ✂ [\d,]+ tokens cut ✂ ", "", line)
        wanted = [token.text.replace("\n", "\\n") for token in side.tokens[side.prompt_length :]]
        assert [piece.strip("⟦⟧") for piece in marked.split("·")] == wanted
    assert "⟦<|begin_of_text|>⟧ ✂ " in text


def test_a_terminal_gets_colours_and_no_marks(cut_row):
    text = printed(cut_row, terminal=True)
    assert "\x1b[" in text
    assert "⟦" not in text
    assert "·" not in text
    assert "tokens cut" in text


def test_no_color_asks_for_marks_on_a_terminal_too(cut_row):
    text = printed(cut_row, terminal=True, environment={"TERM": "xterm-256color", "NO_COLOR": "1"})
    assert "⟦<|begin_of_text|>⟧" in text
    assert not has_colours(Console(force_terminal=True, _environ={"TERM": "xterm-256color", "NO_COLOR": "1"}))


def test_long_parts_are_shortened_unless_the_row_is_asked_for(tokenizer):
    ids = [index % 200 + 5 for index in range(400)]
    row = shown_conversation(7, "any", ids, None, "keep_start", tokenizer)
    assert "... 310 more ..." in printed(row, terminal=False, whole=False)
    assert "more ..." not in printed(row, terminal=False, whole=True)
