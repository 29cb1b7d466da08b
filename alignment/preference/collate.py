"""Tokenized pairs -> batches of tensors: padded rows, one packed row, or a step's packed rows. B pairs, T tokens."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.tokenization import SIDES
from ..model.shared_prompt import shared_prompt_layout

IGNORED = -100
Row = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True)
class PaddedCollator:
    """B pairs -> 2B rows: B chosen, then B rejected, padded on the right to the longest. The readable reference.

    Returns input_ids, attention_mask and shift_labels, (2B, T), where shift_labels[r, t] is the token that position t
    predicts, or -100 where that is not of the response; is_response, (2B, T); and the columns of `about_pairs`.
    """

    pad_token_id: int

    def __call__(self, rows: list[Row]) -> Batch:
        sides = [(row[f"{side}_input_ids"], row[f"{side}_prompt_length"]) for side in SIDES for row in rows]
        input_ids = [torch.tensor(ids) for ids, _ in sides]
        labels = [torch.tensor(labels_of(ids, prompt_length)) for ids, prompt_length in sides]
        shift_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "shift_labels": shift_labels,
            "is_response": shift_labels != IGNORED,
            **about_pairs(rows),
        }


@dataclass(frozen=True)
class PackedCollator:
    """B pairs -> one row of T tokens without padding, each prompt once (see alignment.model.shared_prompt).

    Returns input_ids, position_ids and shift_labels, (1, T); is_response, (2B, T), which tokens of the row are scored
    for which response; shared_prompt, the layout of attention; an attention_mask that only says that no mask is to be
    made; and the columns of `about_pairs`.
    """

    def __call__(self, rows: list[Row]) -> Batch:
        pairs = [packed_pair(row) for row in rows]
        pieces = [piece for pair in pairs for piece in pair]
        shift_labels = torch.tensor([label for piece in pieces for label in piece.labels])
        owner = torch.tensor([owner for piece, owner in zip(pieces, owners(len(rows)), strict=True) for _ in piece.ids])
        return {
            "input_ids": torch.tensor([[token for piece in pieces for token in piece.ids]]),
            "position_ids": torch.cat([torch.arange(p.start, p.start + len(p.ids)) for p in pieces])[None],
            "shift_labels": shift_labels[None],
            "is_response": (owner == torch.arange(2 * len(rows))[:, None]) & (shift_labels != IGNORED),
            "shared_prompt": shared_prompt_layout([tuple(len(piece.ids) for piece in pair) for pair in pairs]),
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool),  # transformers hands a 4D mask on as it is
            **about_pairs(rows),
        }


@dataclass(frozen=True)
class RowCollator:
    """B pairs -> {"rows": Rows}: as they are, to be divided when those of the whole optimizer step are known."""

    def __call__(self, rows: list[Row]) -> Batch:
        return {"rows": Rows([{**row, "sft_scale": scale} for row, scale in zip(rows, sft_scales(rows), strict=True)])}


@dataclass(frozen=True)
class Rows:
    """Nothing that a data loader would look into for tensors."""

    rows: list[Row]


def token_bounded(rows: list[Row], max_tokens: int) -> list[Batch]:
    """Packed micro-batches of at most `max_tokens` tokens each, of the pairs of an optimizer step."""
    bins = within_budget([packed_tokens(row) for row in rows], max_tokens)
    return [PackedCollator()([rows[number] for number in numbers]) for numbers in bins]


def within_budget(sizes: list[int], budget: int) -> list[list[int]]:
    """Numbers of the items in each bin, so that no bin's sizes sum to more than budget: first fit, largest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        place = next((place for place, left in enumerate(room) if sizes[number] <= left), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(budget)
        bins[place].append(number)
        room[place] -= sizes[number]
    return [sorted(numbers) for numbers in bins]


# ---- A pair ----


class Piece(NamedTuple):
    """A segment of the packed row: its tokens, what each predicts, and the position of the first."""

    ids: list[int]
    labels: list[int]
    start: int


def packed_pair(row: Row) -> tuple[Piece, Piece, Piece]:
    """The prompt that both sides share, without its last token, and each side's branch from there on.

    A response's last token is a label only: nothing is predicted from it.
    """
    sides = [(row[f"{side}_input_ids"], row[f"{side}_prompt_length"]) for side in SIDES]
    start = shared_tokens(row)
    prompt = Piece(sides[0][0][:start], [IGNORED] * start, 0)
    return prompt, *(Piece(ids[start:-1], labels_of(ids, prompt_length)[start:-1], start) for ids, prompt_length in sides)


def shared_tokens(row: Row) -> int:
    """Tokens that are computed once for both sides: the prompt they have in common, but its last token.

    The published rules can cut or merge the ends of two prompts differently.
    """
    first, second = (row[f"{side}_input_ids"][: row[f"{side}_prompt_length"]] for side in SIDES)
    shorter = min(len(first), len(second))
    if first[:shorter] != second[:shorter]:
        shorter = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return max(shorter - 1, 0)


def packed_tokens(row: Row) -> int:
    """Tokens of the pair in a packed row."""
    return sum(len(row[f"{side}_input_ids"]) - 1 for side in SIDES) - shared_tokens(row)


def owners(pairs: int) -> list[int]:
    """The response that each piece belongs to, B chosen then B rejected, -1 for a prompt."""
    return [owner for pair in range(pairs) for owner in (-1, pair, pairs + pair)]


def labels_of(ids: list[int], prompt_length: int) -> list[int]:
    """What each position predicts: the next token where it belongs to the response, -100 elsewhere."""
    first = max(prompt_length, 1)  # nothing predicts the first token of a sequence
    return [IGNORED] * (first - 1) + ids[first:] + [IGNORED]


# ---- About the pairs of a micro-batch ----


@dataclass(frozen=True)
class TokenCounts:
    """Of one micro-batch, in tokens."""

    distinct: int  # what the packed row holds
    padded: int  # what 2B rows padded to the longest would hold
    scored: int  # of the distinct ones, those whose prediction is scored: all that the head computes


def about_pairs(rows: list[Row]) -> dict[str, Tensor | TokenCounts]:
    """index, (B,): the pairs' rows in their split; sft_scale, (B,); and the micro-batch's token counts."""
    lengths = [len(row[f"{side}_input_ids"]) for side in SIDES for row in rows]
    prompts = [row[f"{side}_prompt_length"] for side in SIDES for row in rows]
    counts = TokenCounts(
        distinct=sum(packed_tokens(row) for row in rows),
        padded=len(lengths) * max(lengths),
        scored=sum(lengths) - sum(prompts),
    )
    return {
        "index": torch.tensor([row["index"] for row in rows]),
        "sft_scale": torch.tensor([row["sft_scale"] for row in rows] if "sft_scale" in rows[0] else sft_scales(rows)),
        "token_counts": counts,
    }


def sft_scales(rows: list[Row]) -> list[float]:
    """What a pair's chosen nats are multiplied by, so that their sum is B times the micro-batch's mean per chosen token."""
    tokens = sum(len(row["chosen_input_ids"]) - row["chosen_prompt_length"] for row in rows)
    return [len(rows) / tokens] * len(rows)
