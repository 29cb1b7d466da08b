"""Pairs -> padded rows, entry by entry."""

import pytest

from alignment.collate import PaddedCollator
from tests.builders import token_rows

PAD = 7


def pair(prompt: list[int], chosen: list[int], rejected: list[int], index: int = 0) -> dict:
    (row,) = token_rows([(len(prompt), len(chosen), len(rejected))])
    return {**row, "chosen_input_ids": prompt + chosen, "rejected_input_ids": prompt + rejected, "index": index}


def collated(*rows: dict) -> dict:
    return {key: value.tolist() for key, value in PaddedCollator(pad_token_id=PAD)(list(rows)).items()}


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
