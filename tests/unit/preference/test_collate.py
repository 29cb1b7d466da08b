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
    packed_tokens,
    token_bounded,
    within_budget,
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
    assert batch["token_counts"] == TokenCounts(distinct=8, padded=16, scored=7)


def test_the_scale_of_the_published_cross_entropy_is_pairs_per_chosen_token_of_the_micro_batch():
    assert collated(pair([1], [11, 12, 13], [21]), pair([1], [11], [21]))["sft_scale"] == [2 / 4, 2 / 4]


# ---- A step divided by tokens ----


def test_bins_are_filled_first_fit_the_largest_first():
    """7 opens a bin of 10; 6 another; 4 fits the second; 3 fits the first; 1 opens the third."""
    assert within_budget([1, 4, 7, 3, 6], budget=10) == [[2, 3], [1, 4], [0]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(20, 60))
def test_every_item_is_in_one_bin_and_no_bin_is_over_budget(sizes, budget):
    bins = within_budget(sizes, budget)
    assert sorted(number for numbers in bins for number in numbers) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in numbers) <= budget for numbers in bins)


def test_micro_batches_hold_every_pair_once_within_their_tokens():
    rows = token_rows([(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6), (4, 20, 2)])
    budget = max(packed_tokens(row) for row in rows)
    batches = token_bounded(rows, budget, PackedCollator())
    assert sorted(number for batch in batches for number in batch["index"].tolist()) == [0, 1, 2, 3, 4]
    assert all(batch["input_ids"].shape[1] <= budget for batch in batches)


def test_the_published_cross_entropy_keeps_the_scale_of_the_fixed_micro_batches():
    """Pairs 0 and 1, then 2 and 3, then 4 alone: 2 / 15, 2 / 7, 1 / 20."""
    rows = token_rows([(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6), (4, 20, 2)])
    loaded = [row for fixed in (rows[:2], rows[2:4], rows[4:]) for row in RowCollator()(fixed)["rows"].rows]
    batches = token_bounded(loaded, 40, PackedCollator())
    scales = {i: s for batch in batches for i, s in zip(batch["index"].tolist(), batch["sft_scale"].tolist(), strict=True)}
    expected = {0: 2 / 15, 1: 2 / 15, 2: 2 / 7, 3: 2 / 7, 4: 1 / 20}
    assert scales == pytest.approx(expected)
