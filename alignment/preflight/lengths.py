"""What a split's pairs are like: lengths, cuts, doubles, and which of the two responses is the longer."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from ..data.prepare import same_responses, sequence_lengths
from ..data.sources import TEST, TRAIN
from ..data.splits import Prepared


class Spread(NamedTuple):
    """Of a length, in tokens."""

    least: int
    median: int
    mean: float
    p95: int
    most: int


class PairFacts(NamedTuple):
    """Counts of one split's pairs; shares are of the pairs that are left."""

    pairs: int
    lengths: dict[str, Spread]  # prompt, chosen, rejected
    truncated: int
    dropped: int  # no token of a response left to score
    identical: int  # both responses are the same tokens
    repeated_prompts: int  # pairs whose prompt an earlier pair has
    chosen_longer: float
    rejected_longer: float


def spread_of(lengths: np.ndarray) -> Spread:
    middle, high = np.percentile(lengths, [50, 95])
    return Spread(int(lengths.min()), round(middle), float(lengths.mean()), round(high), int(lengths.max()))


def pair_facts(split: Prepared) -> PairFacts:
    columns = {"prompt": "chosen_prompt_length", "chosen": "chosen_length", "rejected": "rejected_length"}
    table = split.tokens.select_columns([*columns.values(), "truncated"]).with_format("numpy")[:]
    chosen, rejected = table["chosen_length"], table["rejected_length"]
    prompts = split.texts.with_format("arrow")["prompt"]
    return PairFacts(
        pairs=len(split.tokens),
        lengths={name: spread_of(table[column]) for name, column in columns.items()},
        truncated=int(table["truncated"].sum()),
        dropped=len(split.texts) - len(split.tokens),
        identical=same_responses(split.tokens),
        repeated_prompts=len(split.texts) - len(set(prompts.to_pylist())),
        chosen_longer=float(np.mean(chosen > rejected)),
        rejected_longer=float(np.mean(rejected > chosen)),
    )


def shared_prompts(splits: Mapping[str, Prepared]) -> int | None:
    """Held-out pairs whose prompt, as the template writes it, is trained on; None where nothing is held out."""
    if TEST not in splits:
        return None
    trained = set(splits[TRAIN].texts["prompt"])
    return sum(prompt in trained for prompt in splits[TEST].texts["prompt"])


def conversation_lengths(tokens: Dataset, max_length: int | None) -> tuple[np.ndarray, int]:
    """Tokens of each conversation as it is trained on, and how many are cut."""
    lengths = sequence_lengths(tokens)
    return (lengths, 0) if max_length is None else (np.minimum(lengths, max_length), int((lengths > max_length).sum()))
