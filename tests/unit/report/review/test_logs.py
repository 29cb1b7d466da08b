"""Logs as trainers leave them: the same run in each shape gives the same figures."""

import json
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.report.review.logs import log_signals, place_of, read_log, read_preferences
from alignment.report.review.reading import read_run
from alignment.report.review.verdict import log_flags, verdict_of

SAMPLES = Path(__file__).parent / "samples"
FULL = ("trl-trainer_state.json", "axolotl", "published-terminal.log", "tracker-export.json", "prefixed.jsonl")


@pytest.mark.parametrize("name", FULL)
def test_every_shape_of_log_gives_the_same_figures(name):
    """Margins 0.2, 0.4 | 0.6, 0.8; held out 0.08 at step 4 and 0.16 at step 8."""
    found = read_run(SAMPLES / name).log_signals()
    assert (found.early_margin.mean, found.late_margin.mean) == pytest.approx((0.3, 0.7))
    assert (found.early_margin.n, found.late_margin.n) == (2, 2)
    assert (found.late_chosen.mean, found.late_rejected.mean) == pytest.approx((-0.35, -1.05))
    assert found.late_accuracy.mean == pytest.approx(0.85)
    assert (found.held_out_margin.first, found.held_out_margin.last) == pytest.approx((0.08, 0.16))
    assert (found.held_out_accuracy.first, found.held_out_accuracy.last) == pytest.approx((0.54, 0.58))


def test_llama_factorys_own_log_has_accuracies_and_steps_by_other_names():
    found = read_run(SAMPLES / "llama-factory").log_signals()
    assert found.late_accuracy.mean == pytest.approx(0.85)
    assert found.early_margin is None
    assert read_log(SAMPLES / "llama-factory/trainer_log.jsonl").series("train", "rewards/accuracies")[0][0] == 2


def test_the_newest_checkpoint_of_a_folder_is_read():
    assert read_run(SAMPLES / "axolotl").log_signals().held_out_margin.last_step == 8


def test_lines_that_are_no_record_are_counted_and_harm_nothing():
    log = read_log(SAMPLES / "published-terminal.log")
    assert log.malformed == 3  # two lines of text and half a record
    assert not log.has_steps
    assert [place for place, _ in log.series("train", "rewards/margins")] == [1, 2, 3, 4]


def test_a_separate_held_out_log_needs_no_prefix():
    found = read_run(SAMPLES / "prefixed.jsonl", eval_log=SAMPLES / "held-out-alone.jsonl").log_signals()
    assert (found.held_out_margin.last, found.held_out_accuracy.last) == pytest.approx((0.16, 0.58))
    assert found.late_margin.mean == pytest.approx(0.7)


@pytest.mark.parametrize(("key", "split", "metric"), [
    ("rewards/margins", "train", "rewards/margins"),
    ("train_rewards/margins", "train", "rewards/margins"),
    ("eval_rewards/margins", "eval", "rewards/margins"),
    ("eval/rewards/margins", "eval", "rewards/margins"),
    ("test_rewards/margins", "eval", "rewards/margins"),
    ("probe_rewards/margins", "probe", "rewards/margins"),
    ("eval_accuracy", "eval", "rewards/accuracies"),
    ("accuracy", "train", "rewards/accuracies"),
    ("rewards/accuracies", "train", "rewards/accuracies"),
    ("eval_ultra_rewards/accuracies", "eval ultra", "rewards/accuracies"),
    ("mean_token_accuracy", "train", None),
    ("eval_mean_token_accuracy", "eval", None),
    ("learning_rate", "train", None),
])  # fmt: skip
def test_keys_are_known_by_many_spellings_and_no_others(key, split, metric):
    assert place_of(key, "train") == (split, metric)


def write(folder: Path, *lines: str) -> Path:
    path = folder / "log.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_numbers_written_as_text_are_numbers_and_nan_is_counted(tmp_path):
    log = read_log(write(tmp_path, '{"rewards/margins": "0.5"}', '{"rewards/margins": NaN}', '{"rewards/margins": true}'))
    assert [value for _, value in log.series("train", "rewards/margins")] == [0.5]
    assert log.not_finite == 1


@pytest.mark.parametrize("text", ["", "nothing here", '{"loss": 0.5}', "[1, 2]", "\x00\xff{", "{" * 5000])
def test_a_file_without_a_preference_metric_is_refused_in_one_sentence(text, tmp_path):
    with pytest.raises(UserError, match="no preference metric"):
        read_preferences(write(tmp_path, text))


MARGINS = '{"step": 1, "rewards/margins": 1.0}'


@pytest.mark.parametrize("line", ["{{}}", "{[]: 1}", f'{{"rewards/margins": {"9" * 5000}}}', "[" * 5000, '{"step": {}}'])
def test_a_line_that_is_no_record_harms_no_other(line, tmp_path):
    assert read_log(write(tmp_path, MARGINS, line)).series("train", "rewards/margins") == [(1.0, 1.0)]


def test_numbers_that_no_float_holds_are_not_finite_and_sums_of_large_ones_no_error(tmp_path):
    huge = [f'{{"step": {step}, "rewards/margins": {value}}}' for step, value in enumerate((10**400, 1.5e308, 1.5e308))]
    log = read_log(write(tmp_path, *huge))
    assert log.not_finite == 1
    assert log_signals(log).late_margin.n == 1
    assert log_signals(read_log(write(tmp_path, *huge[1:], *huge[1:]))).late_margin.mean > 0


def test_of_steps_that_a_resumed_run_logged_again_the_last_record_counts(tmp_path):
    steps = [(1, 0.1), (2, 0.2), (3, 9.9), (4, 9.9), (3, 0.3), (4, 0.4), (5, 0.5)]
    log = read_log(write(tmp_path, *(json.dumps({"step": step, "rewards/margins": value}) for step, value in steps)))
    assert log.series("train", "rewards/margins") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)]


def test_the_mean_loss_at_a_run_s_end_is_no_loss_of_its_last_step(tmp_path):
    end = {"step": 2, "train_loss": 5.0, "train_runtime": 3.0}
    log = read_log(write(tmp_path, '{"step": 1, "loss": 0.7}', '{"step": 2, "loss": 0.6}', json.dumps(end)))
    assert log.series("train", "loss") == [(1, 0.7), (2, 0.6)]


def test_the_first_of_several_held_out_sets_is_the_held_out_set(tmp_path):
    record = {"step": 1, "rewards/margins": 1.0, "eval_a_rewards/margins": 0.5, "eval_b_rewards/margins": 0.7}
    assert log_signals(read_log(write(tmp_path, json.dumps(record)))).held_out_margin.last == 0.5


def test_a_held_out_set_with_a_loss_alone_is_not_taken_for_that_of_the_pairs(tmp_path):
    records = [{"step": 1, "eval_loss": 0.5}, {"step": 1, "eval_pairs_rewards/margins": 0.7}]
    assert log_signals(read_log(write(tmp_path, *map(json.dumps, records)))).held_out_margin.last == 0.7


# ---- What a bare log is good for ----


def log_of(folder: Path, train: list[tuple[float, float]], held_out: list[tuple[float, float]], chosen: float = 0.0) -> Path:
    """(margin, accuracy) of each training record and each held-out one; `chosen`: the chosen reward's change a record."""
    records = [
        {"step": step, "rewards/margins": margin, "rewards/accuracies": accuracy, "rewards/chosen": chosen * step}
        for step, (margin, accuracy) in enumerate(train)
    ] + [
        {"step": step, "eval_rewards/margins": margin, "eval_rewards/accuracies": accuracy}
        for step, (margin, accuracy) in enumerate(held_out)
    ]
    return write(folder, *map(json.dumps, records))


RISING = [(0.1, 0.6), (0.2, 0.7), (0.5, 0.8), (0.9, 0.9)]


@pytest.mark.parametrize(("train", "held_out", "chosen", "flags"), [
    (RISING, [(0.1, 0.6), (0.3, 0.7)], 0.0, set()),
    (RISING, [(0.1, 0.6), (0.1, 0.6)], 0.0, {"training margin grew, held-out margin did not",
                                             "training margin grew, held-out accuracy did not"}),
    (RISING, [(0.1, 0.6), (0.2, 0.59)], 0.0, {"training margin grew, held-out accuracy did not"}),
    (RISING, [(0.1, 0.6), (0.2, 0.7)], -0.1, {"chosen rewards fell while the margin grew (some of that is normal for SimPO)"}),
    ([(1.0, 0.99), (2.0, 0.99)], [(0.1, 0.6), (0.2, 0.7)], 0.0, {"training accuracy is saturated, held-out accuracy is not"}),
    ([(1.0, 0.99), (2.0, 0.98)], [(0.1, 0.6), (0.2, 0.7)], 0.0, set()),
    ([(0.9, 0.6), (0.2, 0.6)], [(0.2, 0.6), (0.1, 0.5)], 0.0, set()),
])  # fmt: skip
def test_a_bare_log_gives_figures_and_flags_and_never_a_verdict(train, held_out, chosen, flags, tmp_path):
    run = read_run(log_of(tmp_path, train, held_out, chosen))
    assert set(log_flags(run.log_signals(), 0.03)) == flags
    verdict = verdict_of(run.signals())
    assert (verdict.name, set(verdict.flags)) == ("not decidable", flags)
    assert "held-out pairs" in verdict.missing[0]
