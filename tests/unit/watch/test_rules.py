"""When a run is warned of: on either side of each threshold, and not by chance."""

import math

import numpy as np
import pytest

from alignment.report.review.pairs import Pairs
from alignment.watch.rules import fallen, fallen_in_log, right_ones, spike, stands_still
from tests.review_records import columns

LN2 = math.log(2)


def moved(change: float, n: int = 200, spread: float = 0.3, **options) -> Pairs:
    """Pairs whose chosen log-probability moved by about this much."""
    noise = np.random.default_rng(0).normal(0, spread, n)
    d = np.ones(n)
    return columns(d, d, chosen_change=change + noise - noise.mean(), **options)


def ordered(right: int, n: int, prompts: np.ndarray | None = None) -> Pairs:
    """The first `right` of n pairs are in the right order now; at step 0 none was."""
    return columns(-np.ones(n), np.where(np.arange(n) < right, 1.0, -1.0), prompts=prompts)


# ---- Chosen responses ----


@pytest.mark.parametrize(("change", "warns"), [(-LN2 - 0.06, True), (-LN2 - 0.02, False), (-LN2 + 0.06, False), (1.0, False)])
def test_chosen_responses_half_as_likely_per_token_are_warned_of_when_the_whole_interval_says_so(change, warns):
    found = fallen(moved(change))  # +- 0.042
    assert (found is not None) == warns
    assert not warns or found.value == pytest.approx(change)


def test_a_few_pairs_or_one_prompt_show_no_fall():
    assert fallen(moved(-1.0, n=3, spread=1.0)) is None
    assert fallen(moved(-5.0, prompts=np.zeros(200, dtype=int))) is None


def test_without_step_0_nothing_has_fallen():
    pairs = moved(-5.0)
    later = Pairs(pairs.prompts, pairs.chosen_tokens, pairs.rejected_tokens, pairs.after)
    assert fallen(later) is None


@pytest.mark.parametrize(
    ("chosen", "warns"),
    [([-1.0, -1.8, -1.7], True), ([-1.0, -1.8, -1.6], False), ([-1.0, -1.8], False), ([-1.0, -9.0, -1.0], False), ([], False)],
)
def test_a_log_shows_a_fall_when_two_records_in_a_row_do(chosen, warns):
    assert (fallen_in_log(chosen) is not None) == warns


# ---- Learned by heart ----


def test_a_probe_that_is_learned_beside_held_out_pairs_that_do_not_follow_is_warned_of():
    before, now = ordered(1300, 2000), ordered(1310, 2000)
    known = {0: right_ones(ordered(900, 2000)), 50: right_ones(before)}
    for probe in (ordered(35, 35), ordered(240, 256)):
        found = stands_still(now, probe, known, step=100)
        assert found.since == 50
        assert found.change.value == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("held_out", "probe", "earlier", "step"),
    [
        pytest.param((1310, 2000), (256, 256), {60: 1300}, 100, id="nothing to compare with in the first half"),
        pytest.param((1310, 2000), (256, 256), {50: 1200}, 100, id="it still rises"),
        pytest.param((1310, 2000), (236, 256), {50: 1300}, 100, id="the probe is not learned: 92 %, at least 88 %"),
        pytest.param((1310, 2000), (30, 30), {50: 1300}, 100, id="30 right ones of 30 may be 89 %"),
        pytest.param((1980, 2000), (256, 256), {50: 1975}, 100, id="nothing is left to learn: 99 %"),
        pytest.param((33, 50), (256, 256), {50: 33}, 100, id="50 pairs do not tell 3 points"),
    ],
)
def test_what_may_be_chance_or_still_learns_is_not(held_out, probe, earlier, step):
    n = held_out[1]
    known = {each: right_ones(ordered(right, n)) for each, right in earlier.items()}
    assert stands_still(ordered(*held_out), ordered(*probe), known, step) is None


def test_a_probe_of_few_prompts_is_not_taken_for_many_pairs():
    one_prompt = ordered(256, 256, prompts=np.zeros(256, dtype=int))
    assert stands_still(ordered(1310, 2000), one_prompt, {50: right_ones(ordered(1300, 2000))}, 100) is None


@pytest.mark.parametrize(("gain", "fewest", "most"), [(0.03, 0, 0.05), (0.0, 0.9, 1)])
def test_a_rise_by_delta_is_seldom_called_a_standstill_and_a_standstill_usually_is(gain, fewest, most):
    """200 sets of 2,000 held-out pairs, 5 % of which turn wrong in the second half, and 5 % + gain right."""
    rng, warned = np.random.default_rng(1), 0
    for _ in range(200):
        old = rng.random(2000) < 0.65
        flips = rng.random(2000) < np.where(old, 0.05 / 0.65, (0.05 + gain) / 0.35)
        new = old ^ flips
        pairs = columns(np.where(old, 1.0, -1.0), np.where(new, 1.0, -1.0))
        warned += stands_still(pairs, ordered(256, 256), {50: old}, 100) is not None
    assert fewest * 200 <= warned <= most * 200


# ---- Gradients ----


@pytest.mark.parametrize(
    ("norms", "warns"),
    [
        ([1.0] * 10 + [10.1], True),
        ([1.0] * 10 + [9.9], False),
        ([1.0] * 9 + [100.0], False),  # too new to know what is usual
        ([0.1] * 30 + [1.0] * 20 + [5.0], False),  # of the last 20
        ([0.0] * 20 + [1.0], False),
        ([1.0] * 12 + [math.inf], False),  # another guard's
        ([], False),
    ],
)
def test_a_gradient_ten_times_the_usual_is_a_spike(norms, warns):
    assert (spike(norms) is not None) == warns


def test_noise_of_a_factor_of_two_is_no_spike_in_a_thousand_records():
    norms = np.exp(np.random.default_rng(2).normal(0, math.log(2) / 1.5, 1000)).tolist()
    assert not any(spike(norms[:end]) for end in range(1, 1000))
