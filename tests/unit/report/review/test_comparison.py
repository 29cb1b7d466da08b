"""Several runs on the pairs that they share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.report.review.comparison import cells_of, compare, compare_all, compare_cells, match
from alignment.report.review.pairs import Pairs
from alignment.report.review.reading import Reading
from alignment.report.review.statistics import holm
from tests.review_records import columns

RNG = np.random.default_rng(11)
N = 200
EASY = RNG.normal(0.3, 1, N)
KEYS = tuple(f"pair {place}" for place in range(N))
NAMES = iter(range(1000))


def reading(after: np.ndarray, seed: int = 42, recipe: str = "a", keys: tuple[str, ...] | None = KEYS, **more) -> Reading:
    name = f"{recipe}-s{seed}-{next(NAMES)}"
    pairs = columns(EASY[: len(after)], after, keys=keys, **more)
    return Reading(name, Path(name), held_out=pairs, recipe={"seed": seed, "name": recipe})


def shifted(shift: float, seed: int = 0) -> np.ndarray:
    return EASY + shift + np.random.default_rng(seed).normal(0, 0.4, N)


def test_a_comparison_is_of_the_same_pairs_whatever_their_order():
    first, second = reading(shifted(0.8)), reading(shifted(0, 1), recipe="b")
    order = RNG.permutation(N)
    shuffled = replace(second, held_out=second.held_out.take(order))
    found, again = compare(first, second), compare(first, shuffled)
    assert found.by_d == again.by_d
    right = first.held_out.after.d > 0, second.held_out.after.d > 0
    assert (found.by_d.gained, found.by_d.lost) == ((right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum())
    assert found.by_d.change.low > 0


def test_pairs_that_one_of_two_lacks_are_counted():
    first = reading(shifted(0))
    second = reading(shifted(0)[:150], keys=(*KEYS[:140], *(f"other {place}" for place in range(10))))
    found = compare(first, second)
    assert (found.n, found.first_alone, found.second_alone) == (140, 60, 10)


def test_a_pair_that_stands_twice_is_matched_twice_and_no_oftener():
    doubled = columns(EASY[:3], EASY[:3], keys=("x", "x", "y"))
    single = columns(EASY[:2], EASY[:2], keys=("x", "y"))
    shared = match(doubled, single)
    assert (len(shared.first), shared.first_alone, shared.second_alone) == (2, 1, 0)


def test_runs_that_share_no_pair_are_not_compared():
    other = reading(shifted(0), recipe="b", keys=tuple(f"other {place}" for place in range(N)))
    assert compare(reading(shifted(0)), other) is None
    assert compare_all([reading(shifted(0)), other]) == []
    assert compare(reading(shifted(0)), reading(shifted(0), keys=None)) is None


def test_own_rewards_are_compared_beside_d():
    """DPO's rewards order pairs by what changed, d by what is."""
    dpo, simpo = reading(shifted(0.2), has_reference=True), reading(shifted(0.2, 1), recipe="b")
    found = compare(dpo, simpo)
    right = dpo.held_out.after.margin > 0, simpo.held_out.after.margin > 0
    assert found.by_reward.change.value == pytest.approx(right[0].mean() - right[1].mean())
    assert found.by_reward != found.by_d


def test_mean_log_probabilities_are_compared_where_tokens_agree():
    lengths = np.full(N, 20.0), np.where(np.arange(N) < 50, 20.0, 21.0)
    first, second = reading(shifted(0.5)), reading(shifted(0.0, 1), recipe="b", lengths=lengths)
    found = compare(first, second)
    assert (found.agreeing, found.d.n, found.n, found.by_d.change.n) == (50, 50, N, N)
    expected = (first.held_out.after.d - second.held_out.after.d)[:50].mean()
    assert found.d.value == pytest.approx(expected)
    none = compare(first, reading(shifted(0.0), lengths=(np.full(N, 20.0), np.full(N, 22.0))))
    assert (none.agreeing, none.d, none.chosen) == (0, None, None)


def test_holm_is_over_all_comparisons_that_are_made():
    runs = [reading(shifted(shift, number), recipe=str(number)) for number, shift in enumerate((0.0, 0.15, 0.3))]
    found = compare_all(runs)
    assert len(found) == 3
    assert [each.adjusted_d for each in found] == holm([each.by_d.change.p for each in found])
    smallest = min(found, key=lambda each: each.by_d.change.p)
    assert smallest.adjusted_d == pytest.approx(3 * smallest.by_d.change.p)


def test_seeds_of_one_recipe_are_its_spread_and_not_a_comparison():
    runs = [reading(shifted(0.3, seed), seed=seed) for seed in (1, 2, 3)] + [reading(shifted(0, 9), recipe="b")]
    (cell, alone), found = cells_of(runs), compare_all(runs)
    assert cell.seeds == (1, 2, 3)
    assert cell.deviation == pytest.approx(np.std([(run.held_out.after.d > 0).mean() for run in runs[:3]], ddof=1))
    assert (len(alone.runs), alone.deviation) == (1, None)
    assert len(found) == 3
    assert all(each.single_seeds for each in found)  # recipe b has one seed


def test_a_comparison_of_recipes_with_several_seeds_is_not_labelled_single():
    runs = [reading(shifted(0.1, number), seed=number, recipe=recipe) for recipe in "ab" for number in (1, 2)]
    assert not any(each.single_seeds for each in compare_all(runs))


def test_of_single_seeds_the_difference_of_cells_is_the_paired_one():
    first, second = reading(shifted(0.5)), reading(shifted(0.0, 1), recipe="b")
    assert compare_cells([first], [second], by_reward=False) == compare(first, second).by_d.change


def test_seeds_that_scatter_widen_the_difference_of_their_cells():
    def cell(shifts: list[float], recipe: str) -> list[Reading]:
        return [reading(shifted(shift, number), seed=number, recipe=recipe) for number, shift in enumerate(shifts)]

    calm = compare_cells(cell([0.3] * 3, "a"), cell([0.0] * 3, "b"), by_reward=False)
    wild = compare_cells(cell([-0.3, 0.3, 0.9], "a"), cell([-0.6, 0.0, 0.6], "b"), by_reward=False)
    assert wild.high - wild.low > 2 * (calm.high - calm.low)


def test_cells_without_a_shared_pair_are_refused():
    other = reading(shifted(0), keys=tuple(f"other {place}" for place in range(N)))
    with pytest.raises(UserError, match="share no held-out pair"):
        compare_cells([reading(shifted(0))], [other], by_reward=False)
    with pytest.raises(UserError, match="no held-out pairs with hashes"):
        compare_cells([reading(shifted(0))], [reading(shifted(0), keys=None)], by_reward=False)


def test_take_keeps_pairs_together():
    pairs: Pairs = reading(shifted(0.1)).held_out
    part = pairs.take(np.array([7, 3]))
    assert part.keys == ("pair 7", "pair 3")
    assert part.after.d.tolist() == pairs.after.d[[7, 3]].tolist()
