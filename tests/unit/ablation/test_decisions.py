"""The rules, one on each side of each boundary."""

import numpy as np
import pytest

from alignment.ablation.decisions import (
    FALLBACK_RULE,
    MOST_RULE,
    OBJECTIVE_RULE,
    RANK_RULE,
    Figures,
    Paired,
    decide_fallback,
    decide_most,
    decide_objective,
    decide_rank,
)
from alignment.ablation.results import has_diverged, power_of
from alignment.report.review.statistics import change_of_share


def figures(value: str, right: float, gap: float | None = 0.2, margin: float | None = 1.0, seeds: int = 1) -> Figures:
    return Figures(value, seeds, 100, right, gap, margin)


def change(low: float, high: float, seeds: int = 1) -> Paired:
    return Paired((low + high) / 2, low, high, 100, 0.3, seeds)


@pytest.mark.parametrize(
    ("right", "gap", "taken"),
    [
        (61.0, 0.19, "dpo"),
        (60.9, 0.19, "simpo"),  # less than a pair more, seeds averaged
        (61.0, 0.20, "simpo"),  # margins as clean
        (70.0, 0.21, "simpo"),
        (60.0, 0.10, "simpo"),
        (61.0, None, "simpo"),  # no probe: not known to be cleaner
    ],
)
def test_an_objective_replaces_the_incumbent_only_with_a_pair_more_and_cleaner_margins(right, gap, taken):
    decision = decide_objective("objective", [figures("simpo", 60.0), figures("dpo", right, gap)], {})
    assert decision.taken == taken
    assert decision.rule == OBJECTIVE_RULE


def test_of_two_challengers_that_would_do_the_one_with_more_pairs_right_is_taken():
    three = [figures("simpo", 60), figures("dpo", 62, 0.1), figures("normalized", 64, 0.15)]
    assert decide_objective("objective", three, {}).taken == "normalized"


def test_an_objective_decision_says_what_a_challenger_lacks_and_what_chance_does():
    paired = {"dpo": change(-0.05, 0.03)}
    decision = decide_objective("objective at r8", [figures("simpo", 60), figures("dpo", 59, 0.3)], paired)
    assert decision.because.endswith("dpo: not one more pair right than simpo and its margins are not cleaner")
    assert decision.chance.startswith(
        "dpo against simpo: -1.0 points of accuracy by own reward (95 % interval -5.0 to +3.0, 100"
    )
    assert "single seeds, whose spread is not known): chance may do as much" in decision.chance
    assert "a true change of 3 points is found in 30% of such experiments" in decision.chance


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.01, 0.05, "more than chance does"), (-0.05, -0.01, "more than chance does"), (0.0, 0.05, "chance may do as much")],
)
def test_a_change_is_called_chances_where_its_interval_holds_none(low, high, word):
    assert word in str(change(low, high, seeds=3))
    assert "means of 3 seeds" in str(change(low, high, seeds=3))


@pytest.mark.parametrize(
    ("high", "margin", "taken"),
    [
        (0.0, 0.9, "r8"),  # the interval reaches 0
        (0.02, 0.9, "r8"),
        (-0.001, 0.9, "r16"),  # worse, and not by chance
        (0.02, 1.0, "r16"),  # the margin is not lower
        (0.02, None, "r16"),
    ],
)
def test_the_lower_rank_is_taken_where_it_is_as_good_with_a_lower_margin(high, margin, taken):
    ranks = [figures("r8", 60, margin=margin), figures("r16", 61)]
    decision = decide_rank("rank at simpo", ranks, {("r16", "r8"): change(-0.1, high)})
    assert decision.taken == taken
    assert decision.rule == RANK_RULE


def test_ranks_are_gone_down_as_long_as_each_is_as_good_as_the_one_taken_before():
    ranks = [figures("r4", 50, margin=0.7), figures("r8", 60, margin=0.8), figures("r16", 61, margin=1.0)]
    paired = {("r16", "r8"): change(-0.1, 0.1), ("r8", "r4"): change(-0.2, -0.1), ("r16", "r4"): change(-0.2, -0.1)}
    assert decide_rank("rank", ranks, paired).taken == "r8"


def test_ranks_without_a_pair_in_common_are_left_as_they_are():
    decision = decide_rank("rank", [figures("r8", 60, margin=0.1), figures("r16", 61)], {})
    assert (decision.taken, decision.because) == ("r16", "r8 shares no held-out pair with r16")


def test_of_other_axes_the_value_with_most_pairs_right_is_taken_and_the_first_of_equal_ones():
    assert decide_most("lr", [figures("a", 60), figures("b", 60.3)], {}).taken == "b"
    decision = decide_most("lr", [figures("a", 60), figures("b", 60)], {})
    assert (decision.taken, decision.rule) == ("a", MOST_RULE)


def test_the_fallback_is_named_where_others_are_unstable_and_it_is_not():
    unstable = {"simpo-r8": "collapses", "dpo-r8": "not finite"}
    decision = decide_fallback("objective at r8", "orpo", unstable, fallback_is_stable=True)
    assert (decision.taken, decision.rule) == ("orpo", FALLBACK_RULE)
    assert decision.because == "simpo-r8: collapses; dpo-r8: not finite. orpo is stable"
    assert decide_fallback("objective at r8", "orpo", unstable, fallback_is_stable=False).taken is None
    assert decide_fallback("objective at r8", "orpo", unstable, fallback_is_stable=None).taken is None


@pytest.mark.parametrize(
    ("loss", "diverged"),
    [
        ([1.0, 0.9, 0.8, 0.7], False),
        ([1.0, 1.2, 1.4, 1.49], False),
        ([1.0, 1.2, 1.4, 1.51], True),
        ([1.0, 9.0, 9.0, 0.9], False),  # a spike that is over
        ([1.0], False),
        ([], False),
    ],
)
def test_a_run_diverges_where_its_training_loss_ends_far_above_its_beginning(loss, diverged):
    assert has_diverged(loss) is diverged


@pytest.mark.parametrize("flipping", [0.1, 0.3])
def test_the_power_that_is_told_is_how_often_such_pairs_show_a_true_change_of_3_points(flipping):
    """Simulated: 400 pairs, of which so many flip; 3 points more of them to the better."""
    rng = np.random.default_rng(0)
    n, told, found = 400, [], []
    for _ in range(600):
        kind = rng.choice(3, size=n, p=[(flipping + 0.03) / 2, (flipping - 0.03) / 2, 1 - flipping])
        before, after = kind == 1, kind == 0
        estimate = change_of_share(before, after, np.arange(n)).change
        told.append(power_of(estimate))
        found.append(estimate.low > 0 or estimate.high < 0)
    assert np.mean(told) == pytest.approx(np.mean(found), abs=0.05)
