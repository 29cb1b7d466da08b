"""Rows as training gets them, token by token: each id's own text, what is scored, and where something was cut."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from ..data.splits import Prepared
from ..data.tokenization import SIDES, LengthRules, tokenize_pairs
from ..errors import UserError
from ..preference.collate import IGNORED, labels_of

UNLIMITED = 10**9  # tokens


class Token(NamedTuple):
    """One id, and what it adds to the text; no text where it ends in the middle of a character."""

    id: int
    text: str
    is_special: bool
    is_scored: bool


class Cut(NamedTuple):
    """Tokens that are missing in front of the token number `before`."""

    before: int
    tokens: int


class Side(NamedTuple):
    """A prompt and its response, or a whole conversation."""

    name: str
    tokens: list[Token]
    prompt_length: int
    cuts: list[Cut]


class ShownRow(NamedTuple):
    """A row of the training split. index: its number there; why: what it was chosen for."""

    index: int
    why: str
    sides: list[Side]


# ---- Which rows ----


def chosen_rows(lengths: np.ndarray, is_cut: np.ndarray) -> dict[int, str]:
    """Positions of three rows, and why these: the first, the longest, the first that is cut; the shortest, if none is."""
    cut = np.flatnonzero(is_cut)
    last = (int(cut[0]), "the first that is cut") if len(cut) else (int(lengths.argmin()), "the shortest")
    reasons = [(0, "the first"), (int(lengths.argmax()), "the longest"), last]
    return {place: ", ".join(why for other, why in reasons if other == place) for place, _ in reasons}


def place_of(index: int, tokens: Dataset, read: int) -> int:
    """Where the row of that number is among those that are left. Raises UserError if it is not."""
    numbers = np.asarray(tokens["index"][:]) if "index" in tokens.column_names else np.arange(len(tokens))
    places = np.flatnonzero(numbers == index)
    if len(places):
        return int(places[0])
    if index < read:
        raise UserError(f"show_row = {index}: the row was dropped, because no token of a response is left to score")
    raise UserError(f"show_row = {index}: the training split has rows 0 to {read - 1:,}")


# ---- Pairs ----


def shown_pair(place: int, why: str, split: Prepared, tokenizer: PreTrainedTokenizerBase, rules: LengthRules) -> ShownRow:
    """The pair at a place among the tokens, from these very tokens; its text only tells what was cut of it."""
    row = split.tokens[place]
    whole = uncut(split.texts[row["index"]], row["index"], tokenizer, rules)
    return ShownRow(row["index"], why, [shown_side(side, row, whole, tokenizer, rules) for side in SIDES])


def uncut(text: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, rules: LengthRules) -> dict[str, Any]:
    """The pair's tokens under rules that cut nothing."""
    batch = {column: [value] for column, value in text.items()}
    columns = tokenize_pairs(batch, [index], tokenizer, rules._replace(max_length=UNLIMITED, max_prompt_length=UNLIMITED - 1))
    return {key: values[0] for key, values in columns.items()}


def shown_side(
    side: str, row: dict[str, Any], whole: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rules: LengthRules
) -> Side:
    ids, prompt = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
    lost_prompt = whole[f"{side}_prompt_length"] - prompt
    lost_response = whole[f"{side}_length"] - row[f"{side}_length"]
    keeps_bos = rules.preprocessing == "exact" and tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    start = prompt if rules.truncation_mode == "keep_start" else int(keeps_bos)
    cuts = [Cut(start, lost_prompt)] * (lost_prompt > 0) + [Cut(len(ids), lost_response)] * (lost_response > 0)
    scored = [False, *(label != IGNORED for label in labels_of(ids, prompt)[:-1])]  # each label is of the token behind it
    return Side(side, tokens_of(ids, scored, tokenizer), prompt, cuts)


# ---- Conversations ----


def shown_conversation(
    index: int, why: str, whole: list[int], limit: int | None, truncation_mode: str, tokenizer: PreTrainedTokenizerBase
) -> ShownRow:
    """Ids as the collator gets them, of which all but the first are scored. whole: before they are cut to `limit`."""
    ids = whole if limit is None else whole[-limit:] if truncation_mode == "keep_end" else whole[:limit]
    place = 0 if truncation_mode == "keep_end" else len(ids)
    cuts = [Cut(place, len(whole) - len(ids))] * (len(whole) > len(ids))
    scored = [number > 0 for number in range(len(ids))]
    return ShownRow(index, why, [Side("text", tokens_of(ids, scored, tokenizer), 0, cuts)])


# ---- Tokens ----


def tokens_of(ids: list[int], scored: list[bool], tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    special = {*tokenizer.all_special_ids, *(n for n, token in tokenizer.added_tokens_decoder.items() if token.special)}
    texts = texts_of(ids, tokenizer)
    return [
        Token(number, text, number in special, is_scored) for number, text, is_scored in zip(ids, texts, scored, strict=True)
    ]


def texts_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What each id adds to the text of those before it. Of a slow tokenizer, its own names of them."""
    if not tokenizer.is_fast:
        yield from map(str, tokenizer.convert_ids_to_tokens(ids))
        return
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    for number in ids:
        yield stream.step(backend, number) or ""
