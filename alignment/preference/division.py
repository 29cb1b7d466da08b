"""How a step is divided so that it fits into memory and fills the GPU: tokens of a micro-batch, layers computed again.

Recomputing less and dividing into smaller micro-batches trade off: both ask for memory. What is chosen is the faster of all
that fit, by two figures measured on an H200 in bf16: a layer's backward again costs its forward (a third of a step's
operations in all), and a micro-batch costs the host about 5 ms a layer, which a GPU waits for where it has too few tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DIVISION = "division.json"  # in checkpoints, and in _run where a step was too large

HOST_SECONDS = 5e-3  # of a layer's launches, forward and backward, in one micro-batch
GPU_FLOPS = 5e14  # a second, as layers reach it in bf16
WAIT_SHARE = 0.25  # of that time, for each micro-batch, that tokens enough to hide it still do not save
ENOUGH = 8  # times the tokens that take as long as their launches: more save less than three hundredths


class Division(NamedTuple):
    """max_tokens: of a micro-batch; None: a fixed count of pairs. recompute_layers: how many, from the first; None: all."""

    max_tokens: int | None
    recompute_layers: int | None


class Wish(NamedTuple):
    """What a recipe says of a division: a number, or None where it is to be found."""

    max_tokens: int | None
    recompute_layers: int | None


def hiding_tokens(layers: int, parameters: int) -> float:
    """Tokens of a micro-batch whose computation takes as long as its launches: 1,600 for Llama-3-8B, 4,400 for a 1B model."""
    return layers * HOST_SECONDS * GPU_FLOPS / (6 * parameters)


def relative_cost(division: Division, layers: int, hiding: float) -> float:
    """Time of a token: forward 1, backward 2, a recomputed forward its share; and what the launches of so few cost."""
    return (3 + division.recompute_layers / layers) * (1 + WAIT_SHARE * hiding / division.max_tokens)


def fastest(
    largest: Callable[[int], int], wish: Wish, *, layers: int, parameters: int, longest: int, step_tokens: int
) -> Division | None:
    """The fastest division that fits; None: not even the longest pair does, with every layer recomputed.

    largest: recomputed layers -> the most tokens of a micro-batch that fit beside the rest. longest: tokens of the longest
    pair, below which no micro-batch can be. step_tokens: of all pairs of a step, more than which none needs.
    """
    hiding = hiding_tokens(layers, parameters)
    counts = range(layers + 1) if wish.recompute_layers is None else [min(wish.recompute_layers, layers)]
    most = max(longest, min(step_tokens, round(ENOUGH * hiding))) if wish.max_tokens is None else wish.max_tokens
    fitting = []
    for count in counts:
        tokens = min(largest(count), most)
        if tokens >= (longest if wish.max_tokens is None else wish.max_tokens):
            fitting.append(Division(tokens, count))
    return min(fitting, key=lambda division: relative_cost(division, layers, hiding), default=None)


def read_division(folder: Path | None) -> Division | None:
    path = folder and folder / DIVISION
    return Division(**json.loads(path.read_text(encoding="utf-8"))) if path and path.is_file() else None


def write_division(folder: Path, division: Division) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DIVISION).write_text(json.dumps(division._asdict()), encoding="utf-8")
