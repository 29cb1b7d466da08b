"""What the review's 95 % intervals cover: every formula of its own, on record sets whose truth is known.

    python benchmarks/review_coverage.py [--sets 2000]

The truth of each is its own value on half a million pairs. Prints Markdown: the share of sets whose interval holds the truth.
Seeds: differences between two recipes of three seeds each, which have the same accuracy; a seed moves it by one point.
"""

import argparse
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from alignment.report.review.comparison import compare_cells
from alignment.report.review.pairs import Pairs, Scores
from alignment.report.review.reading import Reading
from alignment.report.review.statistics import (
    Estimate,
    change_of_order,
    change_of_share,
    difference,
    length_matched,
    mean_of,
    share_of,
)
from benchmarks.review_power import Scenario, draw, shift_for

SIZES = (25, 50, 100, 200, 500)
TRUTH = 500_000
SETS = {
    "a prompt a pair": Scenario(held_out=shift_for(5)),
    "4 pairs a prompt": Scenario(held_out=shift_for(5), per_prompt=4),
    "heavy tails": Scenario(held_out=0.2, start=0.0, tails=3),
    "95 % right at step 0": Scenario(held_out=0.3, start=1.64),
    "chosen shorter in 70 %": Scenario(held_out=0.1, brevity=0.4),
}


def d(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    return pairs.before.d, pairs.after.d


FORMULAS: dict[str, Callable[[Pairs], Estimate | None]] = {
    "accuracy (Wilson)": lambda pairs: share_of(pairs.after.d > 0, pairs.prompts),
    "D (Bonett-Price)": lambda pairs: change_of_share(*(each > 0 for each in d(pairs)), pairs.prompts).change,
    "H (t)": lambda pairs: mean_of(pairs.after.d - pairs.before.d, pairs.prompts),
    "K (Welch), halves of a set": lambda pairs: gap(pairs),
    "change of M": lambda pairs: change_of_order(*d(pairs), pairs.prompts),
    "length-matched change": lambda pairs: (
        length_matched(pairs.after.d - pairs.before.d, pairs.chosen_tokens, pairs.rejected_tokens, pairs.prompts).change
    ),
}


def gap(pairs: Pairs) -> Estimate:
    """Of the first third of a set and of the rest: samples of different size."""
    split = len(pairs) // 12 * 4
    change = pairs.after.d - pairs.before.d
    parts = (slice(None, split), slice(split, None))
    return difference(*(mean_of(change[part], pairs.prompts[part]) for part in parts), weight=0.5)


def covered(name: str, n: int, sets: int) -> dict[str, str]:
    """Formula -> share of sets, in %, whose interval holds the truth, of those that have one."""
    scenario = SETS[name]
    rng = np.random.default_rng([zlib.crc32(name.encode()), n])
    whole = draw(np.random.default_rng(1), TRUTH, scenario, scenario.held_out)
    truth = {formula: of(whole).value for formula, of in FORMULAS.items()}
    hits: dict[str, list[bool]] = {formula: [] for formula in FORMULAS}
    for _ in range(sets):
        pairs = draw(rng, n, scenario, scenario.held_out)
        for formula, of in FORMULAS.items():
            if (estimate := of(pairs)) is not None:
                hits[formula].append(estimate.low <= truth[formula] <= estimate.high)
    return {formula: f"{100 * np.mean(found):.1f}" if found else "-" for formula, found in hits.items()}


def seeds_covered(n: int, sets: int, seeds: int, spread: float) -> str:
    """Two recipes of equal accuracy, on the same pairs: share of sets whose interval of their difference holds 0."""
    rng = np.random.default_rng([n, seeds])
    hits = []
    for _ in range(sets):
        easy = rng.normal(0.4, 1.0, n)  # what all runs share
        # A shift of d by s moves an accuracy near 61 % by about s x 0.27 (its density there).
        runs = [run_of(easy + rng.normal(0, spread / 0.27) + rng.normal(0, 0.5, n), number) for number in range(2 * seeds)]
        estimate = compare_cells(runs[:seeds], runs[seeds:], by_reward=False)
        hits.append(estimate.low <= 0 <= estimate.high)
    return f"{100 * np.mean(hits):.1f}"


def run_of(d: np.ndarray, number: int) -> Reading:
    zeros = np.zeros(len(d))
    keys = tuple(str(place) for place in range(len(d)))
    pairs = Pairs(np.arange(len(d)), zeros + 9, zeros + 9, Scores(d, zeros, d, zeros), keys=keys)
    return Reading(str(number), Path(str(number)), held_out=pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=2000)
    sets = parser.parse_args().sets
    print("| pairs | n |", " | ".join(FORMULAS), "|")
    print("|---" * (len(FORMULAS) + 2) + "|")
    cells = [(name, n) for name in SETS for n in SIZES]
    for name, n in tqdm(cells, unit="cell", file=sys.stderr, disable=None):
        print(f"| {name} | {n} |", " | ".join(covered(name, n, sets).values()), "|", flush=True)
    print("\n| seeds of each recipe | n | a seed moves accuracy by 0 points | 1 point | 3 points |\n|---|---|---|---|---|")
    for seeds in (1, 2, 3):
        for n in (200, 500):
            shares = [seeds_covered(n, sets, seeds, spread) for spread in (0.0, 0.01, 0.03)]
            print(f"| {seeds} | {n} |", " | ".join(shares), "|", flush=True)


if __name__ == "__main__":
    main()
