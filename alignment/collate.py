"""Tokenized pairs -> one batch of tensors: padded rows, or one packed row. B pairs, T tokens."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from .shared_prompt import shared_prompt_layout
from .tokenization import SIDES

IGNORED = -100
Row = dict[str, Any]


@dataclass(frozen=True)
class PaddedCollator:
    """B pairs -> 2B rows: B chosen, then B rejected, padded on the right to the longest. The readable reference.

    Returns input_ids, attention_mask and shift_labels, (2B, T), where shift_labels[r, t] is the token that position t
    predicts, or -100 where that is not of the response; is_response, (2B, T); and index, (B,), the pairs' rows in
    their split.
    """

    pad_token_id: int

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        sides = [(row[f"{side}_input_ids"], row[f"{side}_prompt_length"]) for side in SIDES for row in rows]
        input_ids = [torch.tensor(ids) for ids, _ in sides]
        labels = [torch.tensor(labels_of(ids, prompt_length)) for ids, prompt_length in sides]
        shift_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "shift_labels": shift_labels,
            "is_response": shift_labels != IGNORED,
            "index": torch.tensor([row["index"] for row in rows]),
        }


@dataclass(frozen=True)
class PackedCollator:
    """B pairs -> one row of T tokens without padding, each prompt once (see alignment.shared_prompt).

    Returns input_ids, position_ids and shift_labels, (1, T); is_response, (2B, T), which tokens of the row are scored
    for which response; index, (B,); shared_prompt, the layout of attention; and an attention_mask that only says that
    no mask is to be made.
    """

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        pairs = [packed_pair(row) for row in rows]
        pieces = [piece for pair in pairs for piece in pair]
        shift_labels = torch.tensor([label for piece in pieces for label in piece.labels])
        owner = torch.tensor([owner for piece, owner in zip(pieces, owners(len(rows)), strict=True) for _ in piece.ids])
        return {
            "input_ids": torch.tensor([[token for piece in pieces for token in piece.ids]]),
            "position_ids": torch.cat([torch.arange(p.start, p.start + len(p.ids)) for p in pieces])[None],
            "shift_labels": shift_labels[None],
            "is_response": (owner == torch.arange(2 * len(rows))[:, None]) & (shift_labels != IGNORED),
            "index": torch.tensor([row["index"] for row in rows]),
            "shared_prompt": shared_prompt_layout([tuple(len(piece.ids) for piece in pair) for pair in pairs]),
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool),  # transformers hands a 4D mask on as it is
        }


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
    start = max(common_prefix([ids[:prompt_length] for ids, prompt_length in sides]) - 1, 0)
    prompt = Piece(sides[0][0][:start], [IGNORED] * start, 0)
    return prompt, *(Piece(ids[start:-1], labels_of(ids, prompt_length)[start:-1], start) for ids, prompt_length in sides)


def common_prefix(sequences: list[list[int]]) -> int:
    """How many tokens two prompts share; the published rules can cut or merge their ends differently."""
    first, second = sequences
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def owners(pairs: int) -> list[int]:
    """The response that each piece belongs to, B chosen then B rejected, -1 for a prompt."""
    return [owner for pair in range(pairs) for owner in (-1, pair, pairs + pair)]


def labels_of(ids: list[int], prompt_length: int) -> list[int]:
    """What each position predicts: the next token where it belongs to the response, -100 elsewhere."""
    first = max(prompt_length, 1)  # nothing predicts the first token of a sequence
    return [IGNORED] * (first - 1) + ids[first:] + [IGNORED]
