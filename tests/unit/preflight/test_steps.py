"""Steps, their tokens and their time, against the Trainer's own count and by hand."""

import json

import numpy as np
import pytest
from datasets import Dataset

from alignment.errors import UserError
from alignment.preflight.steps import Schedule, Speed, duration_of, schedule_of, speed_of_run, step_tokens, times
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests.builders import tiny_model, token_rows


def config(folder, **settings) -> SimPOConfig:
    return SimPOConfig(
        **{"output_dir": str(folder / "run"), "use_cpu": True, "report_to": "none", "max_length": 200, "max_prompt_length": 100}
        | settings
    )


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (13, {"per_device_train_batch_size": 4}),
        (13, {"per_device_train_batch_size": 4, "dataloader_drop_last": True}),
        (13, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2.5}),
        (3, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}),
        (13, {"per_device_train_batch_size": 4, "max_steps": 11}),
    ],
)
def test_steps_are_those_that_the_trainer_counts(rows, settings, tmp_path, tokenizer):
    args = config(tmp_path, **settings)
    data = Dataset.from_list(token_rows([(3, 4, 5)] * rows))
    trainer = SimPOTrainer(tiny_model(), args, data, processing_class=tokenizer)
    _, per_epoch, *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    schedule = schedule_of(args, rows)
    assert (schedule.steps_per_epoch, schedule.steps) == (per_epoch, steps)
    assert schedule.rows_per_step == trainer.get_total_train_batch_size(args)


@pytest.mark.parametrize(("processes", "per_epoch"), [(1, 7), (2, 4), (4, 2), (8, 1)])
def test_processes_share_the_rows_of_an_epoch(processes, per_epoch, tmp_path):
    """100 rows, 2 x 8 of a process a step: 50 batches, dealt out."""
    args = config(tmp_path, dry_run=True, num_processes=processes, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    schedule = schedule_of(args, 100)
    assert (schedule.steps_per_epoch, schedule.rows_per_step) == (per_epoch, 16 * processes)


def test_a_total_is_divided_among_the_planned_processes(tmp_path):
    args = config(tmp_path, dry_run=True, num_processes=4, per_device_train_batch_size=2, total_train_batch_size=128)
    assert args.gradient_accumulation_steps == 16
    assert schedule_of(args, 1280).rows_per_step == 128


def test_checkpoints_and_evaluations_are_counted(tmp_path):
    args = config(
        tmp_path, per_device_train_batch_size=1, num_train_epochs=1, do_eval=True, eval_strategy="steps", eval_steps=30,
        save_steps=0.25, score_step_0=True,
    )  # fmt: skip
    schedule = schedule_of(args, 100)
    assert schedule.checkpoints == 4
    assert schedule.evaluations == 4 + 2  # the last step's is one of the four; before the first step, and of the end
    assert schedule_of(config(tmp_path, save_strategy="no", per_device_train_batch_size=1), 100).checkpoints == 0
    assert times("epoch", None, 100, 3) == 3
    assert times("steps", 1000, 100, 3) == 1
    assert times("steps", 0.3, 10, 3) == 4


def test_tokens_of_a_step_are_sums_over_the_rows_of_full_steps(tmp_path):
    args = config(tmp_path, train_sampling_strategy="sequential")
    tokens = step_tokens(args, np.array([1, 2, 3, 4, 5, 6, 100]), 2)
    assert (tokens.least, tokens.mean, tokens.most, tokens.epoch) == (3, 7.0, 11, 121)
    assert tokens.deviation == pytest.approx(np.std([3, 7, 11]))
    one = step_tokens(args, np.array([1, 2, 3]), 8)
    assert (one.least, one.most) == (6, 6)


def test_grouping_by_length_widens_the_spread_of_steps(tmp_path):
    lengths = np.arange(1, 2001)
    random, grouped = (
        step_tokens(config(tmp_path, train_sampling_strategy=kind), lengths, 8) for kind in ("random", "group_by_length")
    )
    assert random.epoch == grouped.epoch
    assert grouped.deviation > 1.5 * random.deviation


# ---- Time ----


def save_metrics(folder, speeds, processes=2):
    folder.mkdir(exist_ok=True)
    records = [{"step": step, "tokens_per_second": speed} for step, speed in enumerate(speeds)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [{"eval_loss": 1.0}, *records]))
    (folder / "environment.json").write_text(json.dumps({"processes": processes}))


def test_the_speed_of_a_run_is_its_median_for_each_process(tmp_path):
    save_metrics(tmp_path, [100.0, 900.0, 1000.0], processes=2)
    assert speed_of_run(tmp_path, processes=8).tokens_per_second == 3600.0


def test_a_run_without_a_speed_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"speed_of = '.*': is not the folder of a run"):
        speed_of_run(tmp_path / "none", processes=1)
    save_metrics(tmp_path, [])
    with pytest.raises(UserError, match="has no tokens_per_second; give --tokens_per_second"):
        speed_of_run(tmp_path, processes=1)


def test_time_and_cost_by_hand():
    """7.2 million tokens twice at 1,000 a second are 4 hours; scoring 10.8 million takes a third of the time of training."""
    schedule = Schedule(4, 1, 1, 4, 10, 20, 1, 0)
    duration = duration_of(Speed(1000, "given"), schedule, 7_200_000, 10_800_000, price=2.0)
    assert (duration.training, duration.scoring) == (4.0, pytest.approx(1.0))
    assert duration.cost == pytest.approx(5 * 4 * 2.0)
    assert duration_of(Speed(1000, "given"), schedule, 7_200_000, 0, price=None).cost is None
