"""Pairs -> padded rows, entry by entry; and a step's pairs -> micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignment.preference.collate import (
    PackedCollator,
    PaddedCollator,
    RowCollator,
    TokenCounts,
    divided,
    filled_by_length,
    packed_tokens,
    spread_evenly,
)
from tests.builders import token_rows

PAD = 7


def pair(prompt: list[int], chosen: list[int], rejected: list[int], index: int = 0) -> dict:
    (row,) = token_rows([(len(prompt), len(chosen), len(rejected))])
    return {**row, "chosen_input_ids": prompt + chosen, "rejected_input_ids": prompt + rejected, "index": index}


def collated(*rows: dict) -> dict:
    batch = PaddedCollator(pad_token_id=PAD)(list(rows))
    return {key: value.tolist() for key, value in batch.items() if isinstance(value, Tensor)}


def test_chosen_rows_come_first_and_everything_is_padded_on_the_right_to_the_longest():
    batch = collated(pair([1, 2], [11, 12], [21], index=5), pair([3], [13], [22, 23, 24], index=2))
    assert batch["input_ids"] == [[1, 2, 11, 12], [3, 13, PAD, PAD], [1, 2, 21, PAD], [3, 22, 23, 24]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["index"] == [5, 2]


def test_a_label_is_the_token_that_its_position_predicts_if_it_is_of_the_response():
    batch = collated(pair([1, 2], [11, 12], [21]), pair([3], [13], [22, 23, 24]))
    ignored = -100
    assert batch["shift_labels"] == [
        [ignored, 11, 12, ignored],
        [13, ignored, ignored, ignored],
        [ignored, 21, ignored, ignored],
        [22, 23, 24, ignored],
    ]
    assert batch["is_response"] == [[label != ignored for label in labels] for labels in batch["shift_labels"]]


def test_padding_is_told_by_length_and_not_by_its_token():
    batch = collated(pair([PAD], [PAD, PAD], [PAD]))
    assert batch["attention_mask"] == [[1, 1, 1], [1, 1, 0]]
    assert batch["shift_labels"] == [[PAD, PAD, -100], [PAD, -100, -100]]


def test_the_shortest_pair_has_one_label_on_each_side():
    assert collated(pair([1], [11], [21]))["shift_labels"] == [[11, -100], [21, -100]]


def test_nothing_predicts_the_first_token_of_a_row_without_a_prompt():
    assert collated(pair([], [11, 12], [21, 22]))["shift_labels"] == [[12, -100], [22, -100]]


@pytest.mark.parametrize("rows", [1, 5])
def test_as_many_labels_as_the_rows_say_response_tokens(rows):
    made = token_rows([(3 + i, 2 * i + 1, 4) for i in range(rows)])
    batch = PaddedCollator(pad_token_id=PAD)(made)
    counts = (batch["shift_labels"] != -100).sum(-1).tolist()
    assert counts == [row[f"{side}_length"] for side in ("chosen", "rejected") for row in made]


# ---- What is known of a micro-batch ----


def test_tokens_are_counted_as_distinct_as_padded_and_as_scored():
    """Pairs of 2 + (2, 1) and 1 + (1, 3) tokens; a response's last token is only predicted, never read.

    distinct: 1 shared + 2 + 1 and no shared, since the last prompt token opens both sides, + 1 + 3, but each branch begins
    with that last token: (1 + 2 + 1) + (0 + 1 + 3) = 8. padded: 4 rows of 4. scored: 2 + 1 + 1 + 3.
    """
    batch = PaddedCollator(pad_token_id=PAD)([pair([1, 2], [11, 12], [21]), pair([3], [13], [22, 23, 24])])
    assert batch["token_counts"] == TokenCounts(distinct=8, padded=16, scored=7, unpadded=13, chosen=3, whole_chosen=4, pairs=2)


def test_the_scale_of_the_published_cross_entropy_is_pairs_per_chosen_token_of_the_micro_batch():
    assert collated(pair([1], [11, 12, 13], [21]), pair([1], [11], [21]))["sft_scale"] == [2 / 4, 2 / 4]


# ---- A step divided by tokens ----


def test_the_longest_goes_first_into_the_part_that_is_emptiest():
    """7 and 6 open a part each; 4 joins the 6; 3 the 7; both have 10, and 1 goes to the first."""
    assert spread_evenly([1, 4, 7, 3, 6], 2) == [[2, 3, 0], [4, 1]]


def test_padded_rows_of_like_lengths_stand_together():
    """In two parts, 9 and 8 would make 2 x 9 = 18, and 3, 2, 2 then 3 x 3 = 9; any other cut has a larger part."""
    assert filled_by_length([2, 9, 3, 8, 2], 2) == [[1, 3], [2, 0, 4]]


some_lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=20)


@given(some_lengths, st.integers(1, 150), st.integers(1, 25), st.sampled_from([PackedCollator(), PaddedCollator(PAD)]))
def test_micro_batches_hold_every_pair_once_within_their_tokens(lengths, budget, at_least, collator):
    rows = token_rows(lengths)
    parts = divided(rows, collator, budget, at_least)
    assert sorted(row["index"] for part in parts for row in part) == list(range(len(rows)))
    assert len(parts) >= min(at_least, len(rows)) or isinstance(collator, PaddedCollator)
    allowed = max(budget, *(collator([row])["input_ids"].numel() for row in rows))
    assert all(collator(part)["input_ids"].numel() <= allowed for part in parts)


def test_a_step_makes_no_more_micro_batches_than_its_tokens_ask_for():
    """Five pairs of 16, 17, 2, 20 and 25 tokens: 80 in all, so that two micro-batches of 40 hold them."""
    rows = token_rows([(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6), (4, 20, 2)])
    assert [packed_tokens(row) for row in rows] == [16, 17, 2, 20, 25]
    assert [sum(map(packed_tokens, part)) for part in divided(rows, PackedCollator(), 45)] == [41, 39]
    assert [len(part) for part in divided(rows, PackedCollator(), 1000)] == [5]


def test_the_published_cross_entropy_keeps_the_scale_of_the_fixed_micro_batches():
    """Pairs 0 and 1, then 2 and 3, then 4 alone: 2 / 15, 2 / 7, 1 / 20."""
    rows = token_rows([(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6), (4, 20, 2)])
    loaded = [row for fixed in (rows[:2], rows[2:4], rows[4:]) for row in RowCollator()(fixed)["rows"].rows]
    batches = [PackedCollator()(part) for part in divided(loaded, PackedCollator(), 40)]
    scales = {i: s for batch in batches for i, s in zip(batch["index"].tolist(), batch["sft_scale"].tolist(), strict=True)}
    expected = {0: 2 / 15, 1: 2 / 15, 2: 2 / 7, 3: 2 / 7, 4: 1 / 20}
    assert scales == pytest.approx(expected)
