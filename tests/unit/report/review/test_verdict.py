"""The rules, each on both sides of each of its boundaries; then record sets whose truth is known."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.report.review.conventions import accuracy_shift
from alignment.report.review.pairs import Pairs
from alignment.report.review.reading import read_run
from alignment.report.review.signals import OwnReward, PairSignals, Replies, Signals
from alignment.report.review.statistics import Estimate, Matched, ShareChange
from alignment.report.review.verdict import Verdict, verdict_of
from tests.review_records import columns, save_run

DELTA = 0.03
H = accuracy_shift(DELTA, 1.0)  # 0.0752
EPSILON = 1e-6
WIDE = (-0.5, 0.5)


def estimate(low: float, high: float, value: float | None = None, n: int = 400, prompts: int = 400) -> Estimate:
    return Estimate((low + high) / 2 if value is None else value, low, high, 0.5, n, prompts, (high - low) / 4, prompts - 1)


def signals(
    *,
    D: tuple[float, float] = (-0.02, 0.04),
    H: tuple[float, float] = WIDE,
    P: tuple[float, float] | None = WIDE,
    K: tuple[float, float] = WIDE,
    C: tuple[float, float] = (-0.4, -0.2),
    M: tuple[float, float] = (-0.2, 0.2),
    matched: tuple[float, float] | None = None,
    start: float = 0.6,
    prompts: int = 400,
    flips: tuple[int, int] = (30, 20),
    inflation: float = 1.0,
    **others: Any,
) -> Signals:
    """Intervals of everything that a verdict looks at; as they stand, no rule holds. s is 1."""
    own = OwnReward(estimate(0.5, 0.7), None, estimate(0, 1))
    held_out = PairSignals(
        n=400,
        prompts=prompts,
        truncated=0,
        accuracy_after=estimate(0.5, 0.7),
        own=own,
        saturation=None,
        matched=Matched(matched and estimate(*matched), 100),
        accuracy_before=estimate(start - 0.05, min(1.0, start + 0.05), start),
        accuracy_change=ShareChange(estimate(*D), *flips, inflation),
        d_change=estimate(*H),
        chosen_change=estimate(*C),
        rejected_change=estimate(*C),
        chosen_fell=estimate(0.4, 0.6),
        spread=1.0,
        order_change=estimate(*M),
    )
    probe = P and replace(held_out, d_change=estimate(*P))
    return Signals(held_out, probe or None, estimate(*K) if P else None, **others)


def judged(**given: Any) -> Verdict:
    return verdict_of(signals(**given), DELTA)


def test_without_a_rule_that_holds_nothing_is_decided():
    verdict = judged()
    assert (verdict.name, verdict.flags, verdict.lean) == ("not decidable", (), None)
    assert verdict.missing == (
        "held-out pairs: accuracy changed by -2.0 to +4.0 points, which may be nothing and may be 3 points",
    )


COLLAPSE = -math.log(2)
STILL = {"H": (-0.05, 0.05), "P": (-0.05, 0.05), "C": (-0.05, 0.05)}
GROWN = {"D": (0.01, 0.05), "H": (0.01, 0.3)}
LEARNED_BY_HEART = {"P": (0.5, 0.9), "K": (-0.4, -0.1), "D": (-0.02, 0.02)}
SWOLLEN = {"H": (0.2, 0.4), "D": (-0.02, 0.02)}
BOUNDARIES = [
    ("collapsing", {}, "C", (-2.0, COLLAPSE - EPSILON), (-2.0, COLLAPSE + EPSILON)),
    ("under-trained", STILL, "H", (-0.05, H - EPSILON), (-0.05, H + EPSILON)),
    ("under-trained", STILL, "H", (-H + EPSILON, 0.05), (-H - EPSILON, 0.05)),
    ("under-trained", STILL, "P", (-0.05, H - EPSILON), (-0.05, H + EPSILON)),
    ("under-trained", STILL, "P", (-H + EPSILON, 0.05), (-H - EPSILON, 0.05)),
    ("under-trained", STILL, "C", (-0.1 + EPSILON, 0.05), (-0.1 - EPSILON, 0.05)),
    ("under-trained", STILL, "C", (-0.05, 0.1 - EPSILON), (-0.05, 0.1 + EPSILON)),
    ("generalizing", GROWN, "D", (EPSILON, 0.05), (-EPSILON, 0.05)),
    ("generalizing", GROWN, "H", (EPSILON, 0.3), (-EPSILON, 0.3)),
    ("over-optimizing", LEARNED_BY_HEART, "P", (H + EPSILON, 0.9), (H - EPSILON, 0.9)),
    ("over-optimizing", LEARNED_BY_HEART, "K", (-0.4, -EPSILON), (-0.4, EPSILON)),
    ("over-optimizing", LEARNED_BY_HEART, "D", (-0.02, DELTA - EPSILON), (-0.02, DELTA + EPSILON)),
    ("over-optimizing", LEARNED_BY_HEART, "start", 1 - 2 * DELTA - EPSILON, 1 - 2 * DELTA + EPSILON),
    ("inflating", SWOLLEN, "H", (H + EPSILON, 0.4), (H - EPSILON, 0.4)),
    ("inflating", SWOLLEN, "D", (-0.02, DELTA - EPSILON), (-0.02, DELTA + EPSILON)),
    ("inflating", SWOLLEN, "start", 1 - 2 * DELTA - EPSILON, 1 - 2 * DELTA + EPSILON),
    ("worsening", {}, "D", (-0.05, -EPSILON), (-0.05, EPSILON)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "others", "key", "inside", "outside"), BOUNDARIES)
def test_a_verdict_ends_where_its_rule_says(name, others, key, inside, outside):
    assert judged(**others | {key: inside}).name == name
    assert judged(**others | {key: outside}).name != name


@pytest.mark.parametrize(("low", "n", "collapses"), [
    (-0.1 - EPSILON, 20, True), (-0.1 + EPSILON, 20, False), (-0.1 - EPSILON, 19, False),
])  # fmt: skip
def test_replies_that_repeat_themselves_are_a_collapse_where_there_are_twenty(low, n, collapses):
    replies = Replies(100, 90, "tokens", 40, estimate(-0.3, low, n=n, prompts=n))
    assert (judged(replies=replies).name == "collapsing") == collapses


def test_below_twenty_held_out_prompts_there_is_no_verdict():
    assert judged(**GROWN, prompts=20).name == "generalizing"
    verdict = judged(**GROWN, prompts=19)
    assert (verdict.name, verdict.missing) == ("no verdict", ("20 held-out prompts at least; there are 19",))


@pytest.mark.parametrize(("given", "text"), [
    ({"D": (0.01, DELTA + EPSILON), "matched": (EPSILON, 1.0)}, "generalizing"),
    ({"D": (0.01, DELTA - EPSILON), "matched": (EPSILON, 1.0)}, "generalizing, by less than delta"),
    ({"matched": (-EPSILON, 1.0)}, "generalizing, length not excluded"),
    ({"matched": None}, "generalizing, length not excluded"),
    ({"D": (0.01, DELTA - EPSILON)}, "generalizing, by less than delta, length not excluded"),
])  # fmt: skip
def test_generalizing_says_how_much_and_whether_it_may_be_length(given, text):
    assert str(judged(**GROWN | given)) == text


def test_the_first_rule_that_holds_is_the_verdict_and_the_others_are_flags():
    everything = {"C": (-2, -1), "D": (-0.2, -0.1), "H": (0.2, 0.4), "P": (0.9, 1.2), "K": (-0.4, -0.1)}
    verdict = judged(**everything)
    assert verdict.name == "collapsing"
    assert verdict.flags == ("over-optimizing", "inflating", "worsening", "memorizing")
    assert judged(**everything | {"C": (-0.4, -0.2)}).name == "over-optimizing"


def test_learning_by_heart_is_a_flag_where_accuracy_is_open_and_where_it_rose():
    assert "memorizing" in judged(**LEARNED_BY_HEART | {"D": (-0.02, 0.05)}).flags
    assert judged(**LEARNED_BY_HEART | {"D": (0.02, 0.06), "H": (0.1, 0.2)}).flags == ("memorizing",)


def test_near_perfect_accuracy_at_step_0_is_flagged_and_leaves_the_other_rules_alone():
    verdict = judged(**LEARNED_BY_HEART, start=0.97)
    assert (verdict.name, verdict.flags) == ("not decidable", ("memorizing", "saturated"))
    assert judged(D=(-0.05, -0.01), start=0.97).name == "worsening"


def test_fresh_pairs_are_counted_for_eighty_percent_power():
    """7.85 x 52 / (402 x 0.0009) = 1,128.2; with e = 2 twice that; where that is no more than there are, four times."""
    assert judged().fresh_pairs == 1129
    assert judged(inflation=2.0).fresh_pairs == 2257
    assert judged(flips=(3, 4)).fresh_pairs == math.ceil(4 * 7.85 * 9 / (402 * 0.0009))


@pytest.mark.parametrize(("given", "lean"), [
    ({"M": (EPSILON, 0.2), "H": (0.01, 0.3)}, "generalizing"),
    ({"M": (-EPSILON, 0.2), "H": (0.01, 0.3)}, None),
    ({"M": (-0.05, 0.075 - EPSILON), "P": (0.5, 0.9), "K": (-0.4, -0.1)}, "over-optimizing"),
    ({"M": (-0.05, 0.075 + EPSILON), "P": (0.5, 0.9), "K": (-0.4, -0.1)}, None),
    ({"M": (-0.05, 0.075 - EPSILON), "H": (0.2, 0.4)}, "inflating"),
    ({"M": (-0.05, 0.075 + EPSILON), "H": (0.2, 0.4)}, None),
    ({"M": (-0.2, -EPSILON)}, "worsening"),
    ({"M": (-0.2, EPSILON)}, None),
    ({"M": (-0.2, -0.1), "start": 0.8}, "worsening"),
    ({"M": (-0.2, -0.1), "start": 0.8 + EPSILON}, None),
    ({"M": (-0.2, -0.1), "start": 0.2}, "worsening"),
    ({"M": (-0.2, -0.1), "start": 0.2 - EPSILON}, None),
])  # fmt: skip
def test_what_is_open_may_lean_by_the_finer_measure(given, lean):
    verdict = judged(**given)
    assert (verdict.name, verdict.lean) == ("not decidable", lean)


def test_a_verdict_never_leans():
    assert judged(**GROWN, M=(-0.2, -0.1)).lean is None


def test_delta_moves_its_thresholds_together():
    given = signals(D=(-0.02, 0.04), P=(0.5, 0.9), K=(-0.4, -0.1))
    assert [verdict_of(given, delta).name for delta in (0.03, 0.05)] == ["not decidable", "over-optimizing"]
    leaning = signals(D=(-0.02, 0.06), M=(-0.05, 0.1), P=(0.5, 0.9), K=(-0.4, -0.1))
    assert [verdict_of(leaning, delta).lean for delta in (0.03, 0.05)] == [None, "over-optimizing"]


def test_records_of_a_step_chosen_on_these_pairs_decide_nothing_about_accuracy():
    for rules in (GROWN, LEARNED_BY_HEART, SWOLLEN, {"D": (-0.05, -0.01)}):
        verdict = judged(**rules, is_chosen_step=True)
        assert verdict.name == "not decidable"
        assert verdict.lean is None
        assert "chosen on these pairs" in verdict.missing[0]


def test_without_a_probe_no_run_is_under_trained_or_over_optimizing():
    for rules in (STILL, LEARNED_BY_HEART):
        verdict = judged(**rules | {"P": None})
        assert verdict.name == "not decidable"
        assert "train_probe" in verdict.missing[0]


def test_without_pairs_there_is_no_verdict_to_have():
    assert verdict_of(Signals()).name == "not decidable"


# ---- Record sets of known truth, through files ----


def normal(seed: int, n: int, mean: float, deviation: float = 1.0) -> np.ndarray:
    """n values of exactly this mean and deviation."""
    values = np.random.default_rng(seed).normal(size=n)
    return mean + deviation * (values - values.mean()) / values.std()


def run_of_truth(
    n: int, start: float, held_out: float, probe: float, *, noise: float = 0.3, stretch: float = 1.0, chosen: float = -0.2
) -> tuple[Pairs, Pairs]:
    """Held-out pairs and a probe of 256: d of deviation 1 around `start`, times `stretch`, shifted, with noise."""

    def pairs(seed: int, count: int, shift: float) -> Pairs:
        before = normal(seed, count, start)
        lengths = tuple(np.random.default_rng(seed + 2).integers(20, 90, (2, count)).astype(float))
        return columns(
            before, stretch * before + shift + normal(seed + 1, count, 0, noise), chosen_change=chosen, lengths=lengths
        )

    return pairs(n, n, held_out), pairs(n + 50, 256, probe)


def swapped(n: int, start: float) -> tuple[Pairs, Pairs]:
    """Training on swapped labels, met by right ones."""
    return run_of_truth(n, start, -0.5, -0.5)


TRUTHS = [
    ("collapsing", run_of_truth(60, 0.2, 0.1, 0.8, chosen=-0.9)),
    ("collapsing", run_of_truth(300, 0.0, 0.5, 0.8, chosen=-3.0)),
    ("collapsing", run_of_truth(1000, -0.5, -0.5, 0.1, chosen=-0.75)),
    ("under-trained", run_of_truth(60, 0.2, 0.0, 0.0, noise=0.02, chosen=0.0)),
    ("under-trained", run_of_truth(300, 2.0, 0.02, 0.03, noise=0.05, chosen=-0.02)),
    ("under-trained", run_of_truth(1000, -0.5, -0.02, 0.02, noise=0.2, chosen=0.05)),
    ("generalizing", run_of_truth(60, 0.2, 1.0, 1.0)),
    ("generalizing", run_of_truth(300, 0.0, 0.5, 0.8)),
    ("generalizing", run_of_truth(1000, -0.5, 0.25, 0.3)),
    ("over-optimizing", run_of_truth(2000, 0.2, 0.0, 0.8)),
    ("over-optimizing", run_of_truth(3000, -0.4, -0.018, 0.5)),
    ("over-optimizing", run_of_truth(1200, 1.0, 0.0, 1.5)),
    ("inflating", run_of_truth(2000, 0.3, 0.0, 0.0, noise=0.05, stretch=2.0)),
    ("inflating", run_of_truth(800, 1.0, 0.0, 0.1, noise=0.05, stretch=1.5)),
    ("inflating", run_of_truth(500, 0.5, 0.0, 0.1, noise=0.02, stretch=3.0)),
    ("worsening", swapped(200, 0.3)),
    ("worsening", swapped(500, 0.0)),
    ("worsening", swapped(1000, 1.2)),
    ("not decidable", run_of_truth(40, 0.2, 0.05, 0.1)),
    ("not decidable", run_of_truth(100, 0.0, 0.1, 0.15)),
    ("not decidable", run_of_truth(400, 0.3, 0.05, 0.1)),
    ("no verdict", run_of_truth(5, 0.2, 1.0, 1.0)),
    ("no verdict", run_of_truth(12, 0.2, 1.0, 1.0)),
    ("no verdict", run_of_truth(19, 0.2, 1.0, 1.0, chosen=-3.0)),
]  # fmt: skip


@pytest.mark.parametrize(("truth", "pairs"), TRUTHS)
def test_a_run_of_known_truth_is_called_what_it_is(truth, pairs, tmp_path: Path):
    run = read_run(save_run(tmp_path / "run", *pairs))
    assert verdict_of(run.signals()).name == truth
