"""Tokenized pairs -> batches of tensors: padded rows, one packed row, or a step's packed rows. B pairs, T tokens."""

import bisect
import heapq
from collections.abc import Callable
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
    scores_prompt: label the prompts of the chosen rows too; is_chosen_row, (B, T), is where anything of such a row is scored.
    """

    pad_token_id: int
    scores_prompt: bool = False

    def __call__(self, rows: list[Row]) -> Batch:
        sides = [(row[f"{side}_input_ids"], row[f"{side}_prompt_length"]) for side in SIDES for row in rows]
        labels = [labels_of(ids, prompt_length) for ids, prompt_length in sides]
        shift_labels, whole = padded(labels, IGNORED), {}
        is_response = shift_labels != IGNORED
        if self.scores_prompt:
            labels[: len(rows)] = [labels_of(row["chosen_input_ids"], 0) for row in rows]
            shift_labels = padded(labels, IGNORED)
            whole = {"is_chosen_row": shift_labels[: len(rows)] != IGNORED}
        width = shift_labels.shape[1]
        return {
            "input_ids": padded([ids for ids, _ in sides], self.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids, _ in sides], 0),
            "shift_labels": shift_labels,
            "scored": torch.tensor([row * width + place for row, own in enumerate(labels) for place in places(own)]),
            "is_response": is_response,
            **whole,
            **about_pairs(rows, scores_prompt=self.scores_prompt),
        }


@dataclass(frozen=True)
class PackedCollator:
    """B pairs -> one row of T tokens without padding, each prompt once (see alignment.model.shared_prompt).

    Returns input_ids, position_ids and shift_labels, (1, T); scored, (N,), the positions that are; is_response, (2B, T),
    which tokens of the row are scored for which response; shared_prompt, the layout of attention; an attention_mask that
    only says that no mask is to be made; and the columns of `about_pairs`. scores_prompt: as of PaddedCollator.
    """

    scores_prompt: bool = False

    def __call__(self, rows: list[Row]) -> Batch:
        pairs = [packed_pair(row) for row in rows]
        pieces = [piece for pair in pairs for piece in pair]
        labels = [label for piece in pieces for label in piece.labels]
        shift_labels, whole = torch.tensor(labels), {}
        owner = repeated(owners(len(rows)), [len(piece.ids) for piece in pieces])
        is_response = (owner == torch.arange(2 * len(rows))[:, None]) & (shift_labels != IGNORED)
        if self.scores_prompt:
            labels = [label for row in rows for label in whole_chosen_labels(row)]
            shift_labels = torch.tensor(labels)
            pair = repeated(list(range(len(rows))), [packed_tokens(row) for row in rows])
            in_row = (pair == torch.arange(len(rows))[:, None]) & (owner < len(rows))
            whole = {"is_chosen_row": in_row & (shift_labels != IGNORED)}
        return {
            "input_ids": torch.tensor([[token for piece in pieces for token in piece.ids]]),
            "position_ids": torch.cat([torch.arange(p.start, p.start + len(p.ids)) for p in pieces])[None],
            "shift_labels": shift_labels[None],
            "scored": torch.tensor(places(labels)),
            "is_response": is_response,
            **whole,
            "shared_prompt": shared_prompt_layout([tuple(len(piece.ids) for piece in pair) for pair in pairs]),
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool),  # transformers hands a 4D mask on as it is
            **about_pairs(rows, scores_prompt=self.scores_prompt),
        }


@dataclass(frozen=True)
class RowCollator:
    """B pairs -> {"rows": Rows}: as they are, to be divided by tokens, each with the scales that it has undivided.

    pairs: of an undivided micro-batch; None: all of them.
    """

    pairs: int | None = None

    def __call__(self, rows: list[Row]) -> Batch:
        size = self.pairs or len(rows)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return {"rows": Rows([{**row, **scales(part)} for part in parts for row in part])}


def scales(rows: list[Row]) -> dict[str, float]:
    return {"sft_scale": sft_scale(rows), "whole_scale": whole_scale(rows)}


@dataclass(frozen=True)
class Rows:
    """Nothing that a data loader would look into for tensors."""

    rows: list[Row]


# ---- A step's pairs, divided by tokens ----


def divided(rows: list[Row], collator: PaddedCollator | PackedCollator, budget: int, at_least: int = 1) -> list[list[Row]]:
    """The pairs of a step in micro-batches of at most `budget` tokens each; see `parts_by_tokens`."""
    is_padded = isinstance(collator, PaddedCollator)
    sizes = [2 * max(len(row[f"{side}_input_ids"]) for side in SIDES) if is_padded else packed_tokens(row) for row in rows]
    return [[rows[number] for number in part] for part in parts_by_tokens(sizes, budget, at_least, is_padded=is_padded)]


def parts_by_tokens(sizes: list[int], budget: int, at_least: int = 1, *, is_padded: bool) -> list[list[int]]:
    """Numbers of the rows of each micro-batch of at most `budget` tokens, as few and as even as that allows.

    sizes: tokens of each row by itself; is_padded: every row of a micro-batch is as long as its longest. at_least: how many
    micro-batches to make, where there are as many rows. A row that is over the budget stands alone.
    """
    fill, tokens_of = (filled_by_length, lambda part: len(part) * max(part)) if is_padded else (spread_evenly, sum)
    budget = max(budget, *sizes)
    for count in range(min(at_least, len(sizes)), len(sizes) + 1):
        parts = fill(sizes, count)
        if all(tokens_of([sizes[number] for number in part]) <= budget for part in parts):
            break
    return [sorted(part) for part in parts]


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


def whole_chosen_labels(row: Row) -> list[int]:
    """What each position of the packed pair predicts where the chosen row is scored from its first token on."""
    start = shared_tokens(row)
    whole, rejected = labels_of(row["chosen_input_ids"], 0), labels_of(row["rejected_input_ids"], row["rejected_prompt_length"])
    return [*whole[:start], *whole[start:-1], *rejected[start:-1]]


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


def places(labels: list[int]) -> list[int]:
    """Where something is predicted that is scored."""
    return [place for place, label in enumerate(labels) if label != IGNORED]


def padded(rows: list[list[int]], value: int) -> Tensor:
    """(rows, T) of the longest row's T, the others filled up on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def repeated(values: list[int], times: list[int]) -> Tensor:
    """Each value so many times, one behind the other."""
    return torch.tensor(values).repeat_interleave(torch.tensor(times), output_size=sum(times))


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
    unpadded: int = 0  # of the padded ones, those that are no padding
    chosen: int = 0  # of the chosen responses
    whole_chosen: int = 0  # of the chosen rows, prompt and response, but their first
    pairs: int = 0


def about_pairs(rows: list[Row], *, scores_prompt: bool = False) -> dict[str, Tensor | TokenCounts]:
    """index, (B,): the pairs' rows in their split; sft_scale and whole_scale, (B,); and the micro-batch's token counts."""
    return {
        "index": torch.tensor([row["index"] for row in rows]),
        "sft_scale": scales_of(rows, "sft_scale", sft_scale),
        "whole_scale": scales_of(rows, "whole_scale", whole_scale),
        "token_counts": token_counts(rows, scores_prompt=scores_prompt),
    }


def token_counts(rows: list[Row], *, scores_prompt: bool = False) -> TokenCounts:
    lengths = [len(row[f"{side}_input_ids"]) for side in SIDES for row in rows]
    chosen, rejected = (
        sum(len(row[f"{side}_input_ids"]) - max(row[f"{side}_prompt_length"], 1) for row in rows) for side in SIDES
    )
    whole = sum(length - 1 for length in lengths[: len(rows)])
    return TokenCounts(
        distinct=sum(packed_tokens(row) for row in rows),
        padded=len(lengths) * max(lengths),
        unpadded=sum(lengths),
        scored=(whole if scores_prompt else chosen) + rejected,
        chosen=chosen,
        whole_chosen=whole,
        pairs=len(rows),
    )


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there; on a GPU as soon as what it computes now is done, without a wait for it."""
    if device.type == "cpu":
        return send_to_device(batch, device)
    pinned = {key: value.pin_memory() if hasattr(value, "pin_memory") else value for key, value in batch.items()}
    return send_to_device(pinned, device, non_blocking=True)


def scales_of(rows: list[Row], name: str, scale: Callable[[list[Row]], float]) -> Tensor:
    """(B,): what the rows carry since they were divided by tokens, or what they have among themselves."""
    return torch.tensor([row[name] for row in rows] if name in rows[0] else [scale(rows)] * len(rows))


def sft_scale(rows: list[Row]) -> float:
    """What a pair's chosen nats are multiplied by, so that their sum is B times the micro-batch's mean per chosen token."""
    return len(rows) / sum(len(row["chosen_input_ids"]) - row["chosen_prompt_length"] for row in rows)


def whole_scale(rows: list[Row]) -> float:
    """The same of chosen rows whose prompt is scored too; their first token, which nothing predicts, is not."""
    return len(rows) / sum(len(row["chosen_input_ids"]) - 1 for row in rows)
