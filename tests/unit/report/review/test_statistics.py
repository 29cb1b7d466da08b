"""Estimates and their intervals: scipy's where it has them, and hand-computed where it has not."""

import math

import numpy as np
import pytest
from scipy import stats

from alignment.report.review.statistics import (
    bonett_price,
    change_of_order,
    change_of_share,
    difference,
    holm,
    length_matched,
    mean_of,
    order_of,
    share_of,
    variance_of_mean,
    wilson,
)

RNG = np.random.default_rng(7)


def alone(n: int) -> np.ndarray:
    return np.arange(n)


# ---- Where scipy has it ----


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (1, 20), (15, 50), (250, 500), (500, 500)])
def test_a_share_has_scipys_wilson_interval(hits, n):
    estimate = share_of(np.arange(n) < hits, alone(n))
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_mean_has_the_interval_and_p_of_a_t_test():
    values = RNG.normal(0.3, 1, 40)
    estimate, expected = mean_of(values, alone(40)), stats.ttest_1samp(values, 0)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert estimate.p == pytest.approx(expected.pvalue)


def test_a_difference_of_samples_has_welchs_interval():
    first, second = RNG.normal(0.5, 1, 30), RNG.normal(0, 3, 200)
    estimate = difference(mean_of(first, alone(30)), mean_of(second, alone(200)), weight=0.5)
    expected = stats.ttest_ind(first, second / 2, equal_var=False)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert estimate.p == pytest.approx(expected.pvalue)


# ---- Where it has not ----


def test_the_change_of_a_share_is_bonett_and_prices_by_hand():
    """10 turned right and 4 wrong, of 50: p = 11/52, q = 5/52, half = 1.96 sqrt((16/52 - (6/52)^2) / 52)."""
    before = np.arange(50) < 20
    after = before.copy()
    after[:4], after[20:30] = False, True
    found = change_of_share(before, after, alone(50))
    half = 1.959964 * math.sqrt((16 / 52 - (6 / 52) ** 2) / 52)
    assert (found.gained, found.lost, found.inflation, found.change.value) == (10, 4, 1.0, 6 / 50)
    assert (found.change.low, found.change.high) == pytest.approx((6 / 52 - half, 6 / 52 + half), abs=1e-6)


@pytest.mark.parametrize("df", [math.inf, 8, 40])
def test_a_p_value_never_contradicts_its_interval(df):
    for b in np.arange(0, 60, 1.7):
        low, high, p = bonett_price(b, 12.0, 100.0, df)
        assert (p < 0.05) == (low > 0 or high < 0)
    for share in np.arange(0.3, 0.7, 0.007):
        low, high, p = wilson(share, 80.0, df)
        assert (p < 0.05) == (low > 0.5 or high < 0.5)


def test_a_pair_written_four_times_is_evidence_once():
    values, right, now = RNG.normal(0.2, 1, 60), RNG.random(60) < 0.5, RNG.random(60) < 0.6
    prompts = np.repeat(np.arange(60), 4)
    once, repeated = mean_of(values, alone(60)), mean_of(np.repeat(values, 4), prompts)
    assert (repeated.low, repeated.high, repeated.p) == pytest.approx((once.low, once.high, once.p))
    change = change_of_share(np.repeat(right, 4), np.repeat(now, 4), prompts)
    assert change.inflation == pytest.approx(4, rel=0.03)
    single = change_of_share(right, now, alone(60)).change
    assert change.change.high - change.change.low == pytest.approx(single.high - single.low, rel=0.04)


def test_pairs_of_a_prompt_that_have_nothing_in_common_lose_little():
    prompts = np.repeat(np.arange(500), 4)
    _, count, inflation = variance_of_mean(RNG.normal(0, 1, 2000), prompts)
    assert count == 500
    assert 1 <= inflation < 1.15


def test_one_prompt_alone_has_no_interval():
    prompts = np.zeros(30, dtype=int)
    assert math.isinf(mean_of(RNG.normal(1, 1, 30), prompts).high)
    assert share_of(np.ones(30, dtype=bool), prompts)[1:4] == (0.0, 1.0, 1.0)


def test_pairs_of_few_prompts_that_are_all_right_are_the_evidence_of_those_prompts():
    """Where nothing varies, nothing shows that pairs of a prompt tell more than one of them."""
    hits, prompts = np.ones(40, dtype=bool), np.repeat(np.arange(10), 4)
    assert variance_of_mean(hits.astype(float), prompts) == (0.0, 10, 4.0)
    assert share_of(hits, prompts)[1:4] == pytest.approx(wilson(1.0, 10, 9))
    assert share_of(hits, prompts).low < share_of(hits, np.arange(40)).low


def test_values_that_do_not_vary_have_an_interval_of_one_point():
    estimate = mean_of(np.zeros(30), alone(30))
    assert (estimate.low, estimate.high, estimate.p) == (0, 0, 1)


# ---- Order ----


def test_the_order_measure_counts_couples():
    d = np.array([3.0, -1.0, 0.5, -2.0, 0.25, -0.25])
    couples = [d[i] + d[j] > 0 for i in range(6) for j in range(6) if i != j]
    measure, _ = order_of(d)
    assert measure == pytest.approx(stats.norm.ppf(np.mean(couples)) / math.sqrt(2))


def test_the_order_measure_of_a_normal_d_is_its_mean_over_its_deviation():
    assert order_of(np.random.default_rng(0).normal(0.6, 2.0, 200_000))[0] == pytest.approx(0.3, abs=0.01)


def test_influence_values_predict_what_leaving_a_pair_out_does():
    d = RNG.normal(0.3, 1, 400)
    measure, influence = order_of(d)
    for place in (0, 17, 300):
        without, _ = order_of(np.delete(d, place))
        assert measure - without == pytest.approx(influence[place] / 399, rel=0.02, abs=1e-5)


def test_pairs_that_are_all_right_have_a_finite_order_measure():
    estimate = change_of_order(RNG.normal(0, 1, 30), np.full(30, 2.0), alone(30))
    assert math.isfinite(estimate.value)


# ---- Length ----


def test_a_model_that_only_learned_to_be_brief_has_no_length_matched_change():
    log_ratio = RNG.choice([-0.5, -0.2, 0.2, 0.5], 400, p=[0.4, 0.3, 0.2, 0.1])
    rejected = np.full(400, 100.0)
    change = np.where(log_ratio < 0, 0.3, -0.3)
    matched = length_matched(change, rejected * np.exp(log_ratio), rejected, alone(400))
    assert change.mean() > 0.1
    assert matched.change.value == pytest.approx(0, abs=1e-12)


def test_the_length_matched_change_is_the_weighed_half_sum_of_the_bins():
    """Bin 0.1 to 0.3: 3 longer of mean 0.4, 2 shorter of mean 0.1; bin 0.3 to 0.7: 2 longer of mean 1, 4 shorter of mean 0."""
    log_ratio = np.array([0.2] * 3 + [-0.2] * 2 + [0.5] * 2 + [-0.5] * 4)
    change = np.array([0.3, 0.4, 0.5, 0.0, 0.2, 0.9, 1.1, -0.1, 0.1, 0.1, -0.1])
    matched = length_matched(change, 100 * np.exp(log_ratio), np.full(11, 100.0), alone(11))
    weights = 3 * 2 / 5, 2 * 4 / 6
    assert matched.change.value == pytest.approx((weights[0] * 0.25 + weights[1] * 0.5) / sum(weights))
    assert matched.pairs == 4


def test_equally_long_pairs_belong_half_to_each_side():
    change = RNG.normal(0.2, 1, 50)
    matched = length_matched(change, np.full(50, 30.0), np.full(50, 30.0), alone(50))
    assert matched.pairs == 25
    assert matched.change.value == pytest.approx(change.mean())
    plain = mean_of(change, alone(50))
    assert matched.change.high - matched.change.low == pytest.approx(plain.high - plain.low, rel=0.03)


def test_pairs_that_are_all_shorter_tell_nothing():
    matched = length_matched(RNG.normal(0, 1, 50), np.full(50, 10.0), np.full(50, 30.0), alone(50))
    assert matched == (None, 0)


# ---- Many comparisons ----


def test_holm_adjusts_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9]) == [0.9]
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1.0, 1.0]
