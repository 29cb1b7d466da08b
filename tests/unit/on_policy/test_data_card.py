"""The card of an on-policy data set: what it tells of the pairs."""

import pytest

from on_policy_data_gen.card import data_card, statistics
from on_policy_data_gen.pair_data import word_counts


def row(prompt: str, chosen: str, rejected: str, number: int = 0) -> dict:
    asked = [{"role": "user", "content": prompt}]
    replies = {"chosen": chosen, "rejected": rejected}
    conversations = {side: [*asked, {"role": "assistant", "content": text}] for side, text in replies.items()}
    return {"prompt_id": f"{number}", **conversations, "chosen_score": 1.0, "rejected_score": 0.5}


ROWS = [
    row("q", "a b", "a", 0),
    row("q", "a", "a", 1),  # asked before, under another id; nothing preferred
    row("p", "word " * 1000, "a", 2),
    row("p r", "word " * 1022, "a", 3),  # 1,024 with its prompt: not cut
    row("s", "a", "word " * 2048, 4),
]


def test_the_card_counts_what_a_dry_run_would_of_the_pairs():
    told = statistics(ROWS, word_counts)
    counts = ("pairs", "both replies the same", "prompt of an earlier pair", "prompt that is trained on")
    assert [told[name] for name in counts] == ["5", "1", "1", ""]
    assert [told[f"longer than {limit}, prompt and reply"] for limit in ("1,024", "2,048", "4,096")] == ["1", "1", "0"]
    assert (told["the longer one is chosen"], told["the shorter one is chosen"]) == ("60.0%", "20.0%")


@pytest.mark.parametrize(("trained_on", "shared"), [({"q"}, "2"), ({"other"}, "0")])
def test_the_card_counts_held_out_pairs_whose_prompt_is_trained_on(trained_on, shared):
    assert statistics(ROWS, word_counts, trained_on)["prompt that is trained on"] == shared


def test_both_splits_stand_side_by_side_in_the_card():
    splits = {"train": statistics(ROWS, word_counts), "test": statistics(ROWS[:1], word_counts, {"q"})}
    card = data_card(folder="pairs", made_by=[], counts={}, unit="words", splits=splits)
    assert "| prompt that is trained on |  | 1 |" in card
    assert "| prompt of an earlier pair | 1 | 0 |" in card
