"""A row for each held-out pair and each of the training probe: what any objective can be judged by."""

from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from ..data.splits import PAIR_IDENTITY
from ..data.tokenization import SIDES
from .scores import PairLosses, PairScores


def pair_columns(step: int, rows: Dataset, index: Tensor, scores: PairScores, outcome: PairLosses) -> dict[str, np.ndarray]:
    """Column -> (rows,), of pairs that were scored behind a step; what the data set knows of each pair is found by its index.

    Log-probabilities in nats, summed and per token; rewards are the run's own.
    """
    columns = {"step": np.full(len(index), step), "index": index.numpy()}
    known = [name for name in PAIR_IDENTITY if name in rows.column_names]
    if known:
        places = {number: place for place, number in enumerate(rows["index"][:])}
        table = rows.select_columns(known)[[places[number] for number in index.tolist()]]
        columns |= {name: np.array(table[name]) for name in known}
    measured = {
        "{}_tokens": (scores.chosen_tokens, scores.rejected_tokens),
        "{}_logp": scores.logps(per_token=False),
        "{}_mean_logp": scores.logps(per_token=True),
        "{}_reward": (outcome.chosen_rewards, outcome.rejected_rewards),
    }
    if scores.reference_chosen_logp is not None:
        measured["reference_{}_logp"] = scores.reference_logps(per_token=False)
    sides = [(name.format(side), values) for name, pair in measured.items() for side, values in zip(SIDES, pair, strict=True)]
    return columns | {name: values.numpy() for name, values in sides}


def rows_of(columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    lists = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
