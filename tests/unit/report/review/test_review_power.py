"""A seeded part of benchmarks/review_power.py and review_coverage.py: false verdicts are rare, true ones are found."""

import pytest

from benchmarks.review_coverage import FORMULAS, covered, seeds_covered
from benchmarks.review_power import SCENARIOS, VERDICTS, false_shares, simulate

SETS = 200


@pytest.mark.parametrize("n", [50, 500])
@pytest.mark.parametrize("name", ["null", "null, 4 pairs a prompt", "null, heavy tails", "null, saturated", "memorizing"])
def test_a_false_verdict_is_rarer_than_one_in_twenty(name, n):
    cell = simulate(name, n, SETS)
    for verdict, share in false_shares(SCENARIOS[name], cell.verdicts, SETS).items():
        assert share <= 0.05, verdict
    # Leans may be false in one of twenty; of 200 sets 5 % can be 8.5 % by chance (one in 100).
    for lean, share in false_shares(SCENARIOS[name], cell.leans, SETS).items():
        assert share <= 0.085, lean


@pytest.mark.parametrize(("name", "n", "verdict", "found"), [
    ("nothing moved", 200, "under-trained", 0.9),
    ("+10 points", 500, "generalizing", 0.95),
    ("memorizing", 2000, "over-optimizing", 0.9),
    ("inflating", 1000, "inflating", 0.9),
    ("collapsing", 50, "collapsing", 0.95),
    ("swapped labels, -10 points", 500, "worsening", 0.95),
])  # fmt: skip
def test_what_is_there_is_found_where_there_are_pairs_enough(name, n, verdict, found):
    assert simulate(name, n, 60).verdicts[verdict] / 60 >= found


def test_a_purely_brief_run_is_not_said_to_have_learned_more():
    cell = simulate("only brief", 500, SETS)
    assert cell.verdicts["generalizing"] > 0.3 * SETS
    assert cell.length_excluded <= 0.05 * SETS


def test_every_scenario_is_of_known_verdicts():
    assert all(set(scenario.true) <= set(VERDICTS) for scenario in SCENARIOS.values())


@pytest.mark.parametrize("name", ["a prompt a pair", "4 pairs a prompt"])
def test_intervals_cover_what_they_claim(name):
    """Of 400 sets, 95 % are 91.5 % or fewer in one of a thousand cases. (Bonett and Price's is wider than it must be.)"""
    for formula, share in covered(name, 100, 400).items():
        assert float(share) >= 91.5, formula
    assert len(FORMULAS) == 6


def test_the_difference_of_recipes_allows_for_seeds():
    assert float(seeds_covered(500, 100, seeds=3, spread=0.03)) >= 88
