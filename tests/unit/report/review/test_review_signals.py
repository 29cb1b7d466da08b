"""What records say, against figures worked out by other means."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from alignment.report.review.pairs import pairs_of
from alignment.report.review.signals import lengths_of, matched_of, pair_signals, replies_of, signals_of
from tests.review_records import columns, rows_of

RNG = np.random.default_rng(3)
BEFORE = RNG.normal(0.2, 1, 120)
AFTER = BEFORE + RNG.normal(0.3, 0.4, 120)


def test_columns_survive_the_file():
    pairs = columns(BEFORE, AFTER, chosen_change=-0.3)
    read = pairs_of(rows_of(pairs))
    for side in ("before", "after"):
        assert getattr(read, side).d == pytest.approx(getattr(pairs, side).d)
        assert getattr(read, side).margin == pytest.approx(getattr(pairs, side).margin)
    assert (len(read), read.last_step, read.has_reference) == (120, 100, False)


def test_the_figures_of_a_run_are_those_of_its_columns():
    found = pair_signals(columns(BEFORE, AFTER, chosen_change=-0.3))
    assert found.accuracy_before.value == (BEFORE > 0).mean()
    assert found.accuracy_change.change.value == pytest.approx((AFTER > 0).mean() - (BEFORE > 0).mean())
    assert found.d_change.value == pytest.approx((AFTER - BEFORE).mean())
    assert found.chosen_change.value == pytest.approx(-0.3)
    assert found.rejected_change.value == pytest.approx(-0.3 - (AFTER - BEFORE).mean())
    assert found.chosen_fell.value == 1.0
    assert found.spread == pytest.approx(BEFORE.std(ddof=1))


def test_the_gap_weighs_the_probe_by_half():
    held_out, probe = columns(BEFORE, AFTER), columns(BEFORE, BEFORE + 1.0)
    assert signals_of(held_out, probe).gap.value == pytest.approx((AFTER - BEFORE).mean() - 0.5)
    assert signals_of(held_out).gap is None


def test_rewards_that_are_log_ratios_have_no_change_and_are_held_against_one_half():
    own = pair_signals(columns(BEFORE, AFTER, has_reference=True)).own
    right = int((AFTER > BEFORE).sum())
    expected = stats.binomtest(right, 120).proportion_ci(method="wilson")
    assert own.change is None
    assert (own.accuracy.low, own.accuracy.high) == pytest.approx((expected.low, expected.high))
    assert pair_signals(columns(BEFORE, AFTER)).own.change.change.value == pytest.approx(
        (AFTER > 0).mean() - (BEFORE > 0).mean()
    )


def test_a_reward_with_a_reference_orders_pairs_in_its_own_way_and_d_as_always():
    found = pair_signals(columns(BEFORE, AFTER, has_reference=True))
    assert found.accuracy_after.value == (AFTER > 0).mean()
    assert found.own.accuracy.value == (AFTER > BEFORE).mean()


def test_saturation_is_what_the_loss_has_left_to_pull_at():
    """beta = 2 and gamma = 1: beyond the margin where d > gamma / beta."""
    found = pair_signals(columns(BEFORE, AFTER), gamma=1.0).saturation
    assert found.beyond.value == (AFTER > 0.5).mean()
    assert found.gradient_after == pytest.approx(np.mean([1 / (1 + math.exp(2 * (d - 0.5))) for d in AFTER]))
    assert found.gradient_before == pytest.approx(np.mean([1 / (1 + math.exp(2 * (d - 0.5))) for d in BEFORE]))


def test_without_step_0_there_is_accuracy_and_no_change():
    rows = [row for row in rows_of(columns(BEFORE, AFTER)) if row["step"] > 0]
    found = pair_signals(pairs_of(rows))
    assert found.accuracy_after.value == (AFTER > 0).mean()
    assert (found.accuracy_change, found.d_change, found.chosen_change, found.matched.change) == (None, None, None, None)


def test_pairs_of_one_prompt_are_known_by_its_hash():
    prompts = np.repeat(np.arange(30), 4)
    found = pair_signals(pairs_of(rows_of(columns(BEFORE, AFTER, prompts=prompts))))
    assert (found.n, found.prompts, found.d_change.df) == (120, 30, 29)


def test_a_pair_that_one_of_the_looks_lacks_is_left_out():
    rows = rows_of(columns(BEFORE, AFTER))
    read = pairs_of([row for row in rows if not (row["step"] == 0 and row["index"] == 5)])
    assert (len(read), read.after.d) == (119, pytest.approx(np.delete(AFTER, 5)))


# ---- Length ----


def test_length_groups_are_by_ten_percent_and_cover_all_pairs():
    rejected = np.full(120, 100.0)
    chosen = np.repeat([120.0, 80.0, 104.0], 40)
    lengths = lengths_of(columns(BEFORE, AFTER, lengths=(chosen, rejected)))
    assert [(group.name, group.after.n) for group in lengths.groups] == [
        ("chosen longer", 40), ("chosen shorter", 40), ("within 10 %", 40),
    ]  # fmt: skip
    assert lengths.groups[1].after.value == (AFTER[40:80] > 0).mean()
    assert (lengths.longer_wins, lengths.shorter_wins) == (pytest.approx(80 / 120), pytest.approx(40 / 120))
    assert lengths.rank_after == pytest.approx(stats.spearmanr(chosen - rejected, AFTER).statistic)


def test_a_rule_that_sees_length_alone_gets_half_of_equally_long_pairs():
    lengths = lengths_of(columns(BEFORE, AFTER))
    assert (lengths.longer_wins, lengths.shorter_wins, lengths.rank_after) == (0.5, 0.5, None)


@pytest.mark.parametrize(("longer", "told"), [(19, False), (20, True)])
def test_twenty_pairs_on_the_thinner_sides_tell_brevity_from_preference(longer, told):
    chosen = np.where(np.arange(120) < longer, 120.0, 80.0)
    matched = matched_of(columns(BEFORE, AFTER, lengths=(chosen, np.full(120, 98.0))))
    assert matched.pairs == longer
    assert (matched.change is not None) == told


# ---- Replies ----


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(count))


def test_replies_that_repeat_themselves_compress_further_whatever_their_length():
    before = [words(seed, 80) for seed in range(25)]
    after = [words(seed, 4) * 60 for seed in range(25)]
    change = replies_of(before, after, None).ratio_change
    assert change.n == 25
    assert change.high < -0.1


def test_a_reply_of_another_length_is_not_a_reply_that_repeats_itself():
    before, after = ([words(100 * number + seed, count) for seed in range(40)] for number, count in enumerate((40, 400)))
    found = replies_of(before, after, None)
    assert abs(found.ratio_change.value) < 0.02
    assert found.length_after > 9 * found.length_before


def test_short_replies_have_a_length_and_no_ratio():
    found = replies_of(["yes"] * 30, ["no"] * 30, ([4] * 30, [6] * 30))
    assert (found.length_before, found.length_after, found.unit, found.ratio_change) == (4, 6, "tokens", None)
