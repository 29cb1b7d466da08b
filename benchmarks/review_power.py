"""How often a review's verdicts are false, and how often they find what is there: record sets whose truth is known.

    python benchmarks/review_power.py [--sets 1000] [--sizes 25 50 ...] [--scenarios null ...] [--full]

Each set is what a run would record: held-out pairs and a probe, before and after, drawn from a scenario. It is judged by the
code that judges runs. Prints Markdown. For each scenario and number of held-out pairs, in % of the sets: how many are given a
verdict that is true, + how many lean to one, and in brackets the false verdict or lean that is given oftenest. With --full, a
row each: the share of every verdict and lean, false ones in brackets.
"""

import argparse
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import norm
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from alignment.report.review.pairs import Pairs, Scores
from alignment.report.review.signals import signals_of
from alignment.report.review.verdict import (
    COLLAPSING,
    GENERALIZING,
    INFLATING,
    LENGTH,
    NO_VERDICT,
    NOT_DECIDABLE,
    OVER_OPTIMIZING,
    UNDER_TRAINED,
    WORSENING,
    Verdict,
    verdict_of,
)

SIZES = (25, 50, 100, 200, 500, 1000, 2000)
PROBE = 256  # pairs, at most as many as are held out
START = 0.25  # mean of d before training, in its standard deviations: an accuracy of 60 %
NOISE = 0.4  # standard deviation of what training does to the d of a pair
VERDICTS = (COLLAPSING, UNDER_TRAINED, GENERALIZING, OVER_OPTIMIZING, INFLATING, WORSENING)
LEANS = VERDICTS[2:]


class Scenario(NamedTuple):
    """What is true of a run, in standard deviations of d before training.

    true: the verdicts whose claims hold for the population; any other is false. held_out, probe: shifts of d. start: mean of
    d before. noise: of the change, around the shift. chosen: change of the chosen log-probability in nats. stretch: d after is
    so many times d before. tails: degrees of freedom of t, in place of normal. per_prompt: pairs of a prompt, correlated by
    one half. brevity: change of d for each unit of log(rejected / chosen length), or for each 100 tokens; the chosen one is
    shorter in 70 % of pairs then.
    """

    true: tuple[str, ...] = ()
    held_out: float = 0.0
    probe: float = 0.0
    start: float = START
    noise: float = NOISE
    chosen: float = -0.2
    stretch: float = 1.0
    tails: float | None = None
    per_prompt: int = 1
    brevity: float = 0.0
    in_tokens: bool = False


def shift_for(points: float, start: float = START, noise: float = NOISE) -> float:
    """The shift of d after which accuracy is so many points higher, where d is normal and its variance becomes 1 + noise^2."""
    return float(norm.ppf(norm.cdf(start) + points / 100) * np.sqrt(1 + noise**2) - start)


NEUTRAL = shift_for(0)  # keeps the accuracy, though d spreads further
LEARNED = 1.0  # shift of a probe whose pairs were learned by heart
MEMORIZED = {"true": (OVER_OPTIMIZING,), "probe": LEARNED}
SCENARIOS = {
    "null": Scenario((), NEUTRAL, NEUTRAL),
    "nothing moved": Scenario((UNDER_TRAINED,), noise=0.05, chosen=0.0),
    "+2 points": Scenario((GENERALIZING,), shift_for(2), shift_for(2)),
    "+5 points": Scenario((GENERALIZING,), shift_for(5), shift_for(5)),
    "+10 points": Scenario((GENERALIZING,), shift_for(10), shift_for(10)),
    "memorizing": Scenario(**MEMORIZED, held_out=NEUTRAL),
    "collapsing": Scenario((COLLAPSING, OVER_OPTIMIZING), NEUTRAL, LEARNED, chosen=-0.9),
    "inflating": Scenario((INFLATING,), noise=0.1, stretch=1.8),
    "swapped labels, -10 points": Scenario((WORSENING,), shift_for(-10), shift_for(-10)),
    "null, 4 pairs a prompt": Scenario((), NEUTRAL, NEUTRAL, per_prompt=4),
    "+5 points, 4 pairs a prompt": Scenario((GENERALIZING,), shift_for(5), shift_for(5), per_prompt=4),
    "memorizing, 4 pairs a prompt": Scenario(**MEMORIZED, held_out=NEUTRAL, per_prompt=4),
    "inflating, 4 pairs a prompt": Scenario((INFLATING,), noise=0.1, stretch=1.8, per_prompt=4),
    # Where 98 % are right at the start, a shift that keeps the accuracy is larger than h: true, and not called.
    "null, saturated": Scenario((INFLATING,), shift_for(0, 2.0), shift_for(0, 2.0), start=2.0),
    "memorizing, saturated": Scenario((INFLATING, OVER_OPTIMIZING), shift_for(0, 2.0), LEARNED, start=2.0),
    "null, heavy tails": Scenario((), tails=3, start=0.0),
    "memorizing, heavy tails": Scenario(**MEMORIZED, tails=3, start=0.0),
    "+6 points, heavy tails": Scenario((GENERALIZING,), 0.2, 0.2, tails=3, start=0.0),
    # The claim of a preference for anything but length is false: see the last column.
    "only brief": Scenario((GENERALIZING,), brevity=0.4),
    "only brief, by tokens": Scenario((GENERALIZING,), brevity=0.2, in_tokens=True),
}  # fmt: skip


def draw(rng: np.random.Generator, n: int, scenario: Scenario, shift: float) -> Pairs:
    """n pairs of a run, before and after."""
    prompts = np.arange(n) // scenario.per_prompt

    def noise() -> np.ndarray:
        own = rng.standard_normal(n) if scenario.tails is None else rng.standard_t(scenario.tails, n)
        if scenario.per_prompt == 1:
            return own
        return np.sqrt(0.5) * own + np.sqrt(0.5) * rng.standard_normal(n)[prompts]

    between, log_ratio = rng.uniform(40, 400, n), rng.normal(0.3 if scenario.brevity else 0.0, 0.57, n)
    chosen_tokens, rejected_tokens = (np.round(between * np.exp(sign * log_ratio / 2)) for sign in (-1, 1))
    before = scenario.start + noise()
    after = scenario.stretch * before + shift + scenario.noise * noise()
    longer = (rejected_tokens - chosen_tokens) / 100 if scenario.in_tokens else np.log(rejected_tokens / chosen_tokens)
    after += scenario.brevity * longer
    chosen = -1.2 + 0.3 * noise()
    later = chosen + scenario.chosen + 0.2 * noise()
    rewards = [(2 * logp, 2 * (logp - d)) for logp, d in ((chosen, before), (later, after))]
    first, last = (Scores(logp, logp - d, *own) for logp, d, own in zip((chosen, later), (before, after), rewards, strict=True))
    return Pairs(prompts, chosen_tokens, rejected_tokens, last, first)


def judged(rng: np.random.Generator, n: int, scenario: Scenario) -> Verdict:
    held_out = draw(rng, n, scenario, scenario.held_out)
    probe = draw(rng, min(n, PROBE), scenario, scenario.probe)
    return verdict_of(signals_of(held_out, probe, gamma=1.0))


class Cell(NamedTuple):
    """Counts of one scenario and size."""

    sets: int
    verdicts: Counter
    leans: Counter
    length_excluded: int  # generalizing, and said to be no matter of length


def simulate(name: str, n: int, sets: int) -> Cell:
    """Seeded by name and size, so that a cell alone gives what it gives among others."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), n])
    found = [judged(rng, n, SCENARIOS[name]) for _ in range(sets)]
    excluded = sum(each.name == GENERALIZING and LENGTH not in each.qualifiers for each in found)
    return Cell(sets, Counter(each.name for each in found), Counter(each.lean for each in found if each.lean), excluded)


def false_shares(scenario: Scenario, counts: Counter, sets: int) -> dict[str, float]:
    return {name: counts[name] / sets for name in VERDICTS if name not in scenario.true}


def row(name: str, n: int, cell: Cell) -> str:
    def share(count: int, verdict: str) -> str:
        text = f"{100 * count / cell.sets:.1f}"
        return text if verdict in SCENARIOS[name].true else f"({text})"

    undecided = cell.verdicts[NOT_DECIDABLE] + cell.verdicts[NO_VERDICT]
    shares = [share(cell.verdicts[verdict], verdict) for verdict in VERDICTS]
    leans = [share(cell.leans[verdict], verdict) for verdict in LEANS]
    excluded = f"{100 * cell.length_excluded / cell.sets:.1f}"
    return " | ".join([f"| {name}", f"{n:,}", *shares, f"{100 * undecided / cell.sets:.1f}", *leans, f"{excluded} |"])


def short(name: str, cell: Cell) -> str:
    """True verdicts, + true leans, and the false verdict or lean that is given oftenest, in %."""
    true = SCENARIOS[name].true
    found, leaning = (sum(counts[verdict] for verdict in true) for counts in (cell.verdicts, cell.leans))
    false = max(
        share for counts in (cell.verdicts, cell.leans) for share in false_shares(SCENARIOS[name], counts, cell.sets).values()
    )
    return f"{100 * found / cell.sets:.0f} + {100 * leaning / cell.sets:.0f} ({100 * false:.1f})"


def header(*heads: str) -> None:
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    if args.full:
        leans = [f"leans {name}" for name in LEANS]
        header("scenario", "held-out pairs", *VERDICTS, "undecided", *leans, "generalizing, length excluded")
    else:
        header("scenario", "true", *(f"{n:,}" for n in args.sizes))
    worst_verdict = worst_lean = (0.0, "", "", 0)
    with tqdm(total=len(args.scenarios) * len(args.sizes), unit="cell", file=sys.stderr, disable=None) as bar:
        for name in args.scenarios:
            cells = {}
            for n in args.sizes:
                cell = cells[n] = simulate(name, n, args.sets)
                if args.full:
                    print(row(name, n, cell), flush=True)
                for verdict, share in false_shares(SCENARIOS[name], cell.verdicts, args.sets).items():
                    worst_verdict = max(worst_verdict, (share, verdict, name, n))
                for verdict, share in false_shares(SCENARIOS[name], cell.leans, args.sets).items():
                    worst_lean = max(worst_lean, (share, verdict, name, n))
                bar.update()
            if not args.full:
                true = ", ".join(SCENARIOS[name].true) or "-"
                print(f"| {name} | {true} | " + " | ".join(short(name, cell) for cell in cells.values()) + " |", flush=True)
    print(f"\nLargest share of a false verdict: {worst_verdict}; of a false lean: {worst_lean}; sets a cell: {args.sets:,}.")


if __name__ == "__main__":
    main()
