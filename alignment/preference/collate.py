"""Tokenized pairs -> batches of tensors: padded rows, one packed row, or a step's packed rows. B pairs, T tokens."""

import bisect
import heapq
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
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
    predicts, or -100 where that is not of the response; scored, (N,), where that is in the flat rows; is_response, (2B, T);
    and the columns of `about_pairs`.
    """

    pad_token_id: int

    def __call__(self, rows: list[Row]) -> Batch:
        sides = [(row[f"{side}_input_ids"], row[f"{side}_prompt_length"]) for side in SIDES for row in rows]
        input_ids = [torch.tensor(ids) for ids, _ in sides]
        labels = [torch.tensor(labels_of(ids, prompt_length)) for ids, prompt_length in sides]
        shift_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        is_response = shift_labels != IGNORED
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "shift_labels": shift_labels,
            "scored": is_response.flatten().nonzero().squeeze(-1),
            "is_response": is_response,
            **about_pairs(rows),
        }


@dataclass(frozen=True)
class PackedCollator:
    """B pairs -> one row of T tokens without padding, each prompt once (see alignment.model.shared_prompt).

    Returns input_ids, position_ids and shift_labels, (1, T); scored, (N,), the positions that are; is_response, (2B, T),
    which tokens of the row are scored for which response; shared_prompt, the layout of attention; an attention_mask that
    only says that no mask is to be made; and the columns of `about_pairs`.
    """

    def __call__(self, rows: list[Row]) -> Batch:
        pairs = [packed_pair(row) for row in rows]
        pieces = [piece for pair in pairs for piece in pair]
        shift_labels = torch.tensor([label for piece in pieces for label in piece.labels])
        lengths = torch.tensor([len(piece.ids) for piece in pieces])
        owner = torch.tensor(owners(len(rows))).repeat_interleave(lengths)
        return {
            "input_ids": torch.tensor([[token for piece in pieces for token in piece.ids]]),
            "position_ids": torch.cat([torch.arange(p.start, p.start + len(p.ids)) for p in pieces])[None],
            "shift_labels": shift_labels[None],
            "scored": (shift_labels != IGNORED).nonzero().squeeze(-1),
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


# ---- A step's pairs, divided by tokens ----


def divided(rows: list[Row], collator: PaddedCollator | PackedCollator, budget: int, at_least: int = 1) -> list[list[Row]]:
    """The rows of a step in micro-batches of at most `budget` tokens each, as few and as even as that allows.

    at_least: how many micro-batches to make, where there are as many rows. A row that is over the budget stands alone.
    """
    if isinstance(collator, PaddedCollator):  # every row is as long as the longest
        sizes = [2 * max(len(row[f"{side}_input_ids"]) for side in SIDES) for row in rows]
        fill, tokens_of = filled_by_length, lambda part: len(part) * max(part)
    else:
        sizes = [packed_tokens(row) for row in rows]
        fill, tokens_of = spread_evenly, sum
    budget = max(budget, *sizes)
    for count in range(min(at_least, len(rows)), len(rows) + 1):
        parts = fill(sizes, count)
        if all(tokens_of([sizes[number] for number in part]) <= budget for part in parts):
            break
    return [[rows[number] for number in sorted(part)] for part in parts]


def spread_evenly(sizes: list[int], count: int) -> list[list[int]]:
    """Numbers of the items of each of `count` parts, whose sums are close to one another: longest first into the emptiest."""
    parts: list[list[int]] = [[] for _ in range(count)]
    sums = [(0, part) for part in range(count)]
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        total, part = heapq.heappop(sums)
        parts[part].append(number)
        heapq.heappush(sums, (total + sizes[number], part))
    return parts


def filled_by_length(sizes: list[int], count: int) -> list[list[int]]:
    """Items of like sizes together, in at most `count` parts whose largest, its items x their longest, is the smallest."""
    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])

    def parts(limit: int) -> list[list[int]]:
        made: list[list[int]] = []
        for number in order:
            if not made or (len(made[-1]) + 1) * sizes[made[-1][0]] > limit:
                made.append([])
            made[-1].append(number)
        return made

    limits = range(sizes[order[0]], len(sizes) * sizes[order[0]] + 1)
    return parts(limits[bisect.bisect_left(limits, 1, key=lambda limit: len(parts(limit)) <= count)])


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
    chosen: int  # of the scored ones, the chosen responses'
    pairs: int


def about_pairs(rows: list[Row]) -> dict[str, Tensor | TokenCounts]:
    """index, (B,): the pairs' rows in their split; sft_scale, (B,); and the micro-batch's token counts."""
    return {
        "index": torch.tensor([row["index"] for row in rows]),
        "sft_scale": torch.tensor([row["sft_scale"] for row in rows] if "sft_scale" in rows[0] else sft_scales(rows)),
        "token_counts": token_counts(rows),
    }


def token_counts(rows: list[Row]) -> TokenCounts:
    lengths = [len(row[f"{side}_input_ids"]) for side in SIDES for row in rows]
    responses = [sum(len(row[f"{side}_input_ids"]) - max(row[f"{side}_prompt_length"], 1) for row in rows) for side in SIDES]
    return TokenCounts(
        distinct=sum(packed_tokens(row) for row in rows),
        padded=len(lengths) * max(lengths),
        scored=sum(responses),
        chosen=responses[0],
        pairs=len(rows),
    )


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there; on a GPU as soon as what it computes now is done, without a wait for it."""
    if device.type == "cpu":
        return send_to_device(batch, device)
    pinned = {key: value.pin_memory() if hasattr(value, "pin_memory") else value for key, value in batch.items()}
    return send_to_device(pinned, device, non_blocking=True)


def sft_scales(rows: list[Row]) -> list[float]:
    """What a pair's chosen nats are multiplied by, so that their sum is B times the micro-batch's mean per chosen token."""
    tokens = sum(len(row["chosen_input_ids"]) - row["chosen_prompt_length"] for row in rows)
    return [len(rows) / tokens] * len(rows)
