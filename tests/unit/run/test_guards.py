"""Numbers that break, data that is too little, and memory that is: what stops a run, what is skipped, what is said."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from alignment.errors import ConfigError, UserError
from alignment.run.guards import NONFINITE_ROWS, NonFiniteStep, OutOfMemory, settings_that_help
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders
from tests.builders import tiny_model, token_rows

ROOT = Path(__file__).parents[3]
LENGTHS = [(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6), (4, 20, 2), (3, 2, 15), (7, 8, 1), (6, 5, 5)]
BROKEN_TOKEN = 3  # token_rows never draws it
SETTINGS = {
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "train_sampling_strategy": "sequential",
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "logging_steps": 1,
}

both_splits = pytest.mark.parametrize(
    "split",
    [{"pair_layout": "padded"}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
     {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 40}],
    ids=["padded", "packed, accumulated", "by tokens"],
)  # fmt: skip


def broken_model() -> PreTrainedModel:
    """Its log-probabilities are NaN as soon as it reads BROKEN_TOKEN."""
    model = tiny_model()
    model.get_input_embeddings().weight.data[BROKEN_TOKEN] = math.nan
    return model


def rows_that_break(*numbers: int) -> list[dict[str, Any]]:
    rows = token_rows(LENGTHS)
    for number in numbers:
        rows[number]["rejected_input_ids"][0] = BROKEN_TOKEN
    return rows


class States(TrainerCallback):
    """Copies of weights, optimizer state and learning rate: before the first step, and after each."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def copy(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})
        state = optimizer.state_dict()["state"]
        self.moments.append({f"{i}.{name}": value.clone() for i, part in state.items() for name, value in part.items()})
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.copy(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.copy(model, optimizer)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        if one[name].dim()
        else torch.equal(one[name], other[name])
        for name in one
    )


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(model=None, rows=None, held_out=None, **settings: Any) -> tuple[SimPOTrainer, States]:
        args = SimPOConfig(output_dir=str(tmp_path / "run"), max_length=200, max_prompt_length=100, **SETTINGS | settings)
        states = States()
        trainer = SimPOTrainer(
            model=broken_model() if model is None else model,
            args=args,
            train_dataset=Dataset.from_list(rows_that_break() if rows is None else rows),
            processing_class=tokenizer,
            callbacks=[states],
        )
        return trainer, states

    return build


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / NONFINITE_ROWS).read_text().splitlines()]


def trained(trainer: SimPOTrainer) -> list[dict[str, float]]:
    return [record for record in trainer.state.log_history if "learning_rate" in record]


# ---- The loss ----


@both_splits
def test_a_loss_that_is_not_finite_stops_before_the_step_and_its_rows_are_written_down(build, tmp_path, split):
    trainer, states = build(rows=rows_that_break(5), **split)
    with pytest.raises(NonFiniteStep, match=r"step 3: the log-probabilities of training rows \[5\] \(rank 0\) are not finite"):
        trainer.train()
    assert len(states.weights) == 3  # none after the third step
    now = dict(trainer.model.state_dict())
    assert equal(now, states.weights[-1])
    (row,) = written(tmp_path)
    assert (row["step"], row["rank"], row["index"], row["cause"], row["skipped"]) == (3, 0, 5, "loss", False)
    assert (row["chosen_tokens"], row["rejected_tokens"]) == (2, 15)
    assert row["rejected_reward"] == "nan"  # JSON has no NaN
    assert isinstance(row["chosen_reward"], float) or split == {}


@both_splits
def test_a_skipped_step_leaves_weights_and_optimizer_bit_for_bit_and_the_schedule_goes_on(build, tmp_path, split):
    trainer, states = build(rows=rows_that_break(2), skip_nonfinite=1, weight_decay=0.1, **split)
    trainer.train()
    assert trainer.state.global_step == 4
    assert equal(states.weights[2], states.weights[1])
    assert equal(states.moments[2], states.moments[1])
    assert states.moments[1]
    for before, after in ((0, 1), (2, 3), (3, 4)):
        assert not equal(states.weights[after], states.weights[before])
    assert states.rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025, 0.0])
    assert [record["skipped_steps"] for record in trainer.state.log_history if "skipped_steps" in record] == [1]
    assert [(row["step"], row["index"], row["skipped"]) for row in written(tmp_path)] == [(2, 2, True)]


def test_the_steps_after_a_skipped_one_are_those_of_a_run_without_its_rows(build):
    """With a constant rate, so that nothing but the rows decides."""
    settings = {"lr_scheduler_type": "constant"}
    rows = rows_that_break(2)
    trainer, states = build(rows=rows, skip_nonfinite=1, **settings)
    trainer.train()
    other, without = build(rows=[*rows[:2], *rows[4:]], **settings)
    other.train()
    assert equal(states.weights[-1], without.weights[-1])


def test_one_step_more_than_may_be_skipped_stops_the_run(build, tmp_path):
    trainer, states = build(rows=rows_that_break(0, 3, 7), skip_nonfinite=2)
    with pytest.raises(NonFiniteStep, match=r"step 4: .* rows \[7\].* skip_nonfinite = 2 steps were skipped before"):
        trainer.train()
    assert [(row["step"], row["skipped"]) for row in written(tmp_path)] == [(1, True), (2, True), (4, False)]
    now = dict(trainer.model.state_dict())
    assert equal(now, states.weights[3])


def test_skipped_steps_are_counted_over_a_resumed_run(build, tmp_path):
    settings = {"skip_nonfinite": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "logging_steps": 4}
    rows = rows_that_break(2)
    whole, unbroken = build(rows=rows, **settings)
    whole.train()

    # From in front of the skipped step: it is skipped again, and counted once.
    again, states = build(rows=rows, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert equal(states.weights[-1], unbroken.weights[-1])
    assert trained(again)[-1]["loss"] == trained(whole)[-1]["loss"]

    # From behind it: no other step may be skipped.
    later, _ = build(rows=rows_that_break(2, 5), **settings)
    with pytest.raises(NonFiniteStep, match=r"step 3: .* 1 steps were skipped before"):
        later.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))


def test_checkpoints_of_a_run_that_broke_are_finite_and_go_on(build, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer, states = build(rows=rows_that_break(5), **settings)
    with pytest.raises(NonFiniteStep):
        trainer.train()
    saved = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    assert all(torch.equal(saved[name].nan_to_num(), states.weights[2][name].nan_to_num()) for name in saved)
    assert not (tmp_path / "run/checkpoint-3").exists()
    mended, _ = build(**settings)
    mended.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert mended.state.global_step == 4


# ---- What is logged ----


def test_the_logged_loss_and_metrics_are_means_of_the_steps_that_were_taken(build):
    alone, _ = build(rows=rows_that_break()[:2])
    alone.train()
    trainer, _ = build(rows=rows_that_break(2)[:4], skip_nonfinite=1, logging_steps=2)
    trainer.train()
    (expected,), (record,) = trained(alone), trained(trainer)
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert record[name] == pytest.approx(expected[name], rel=1e-6), name
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_a_record_of_nothing_but_skipped_steps_has_no_loss_instead_of_0(build):
    trainer, _ = build(rows=rows_that_break(0, 2, 3), skip_nonfinite=2)
    trainer.train()
    first, second, *others = trained(trainer)
    assert "loss" not in first
    assert "loss" not in second
    assert "rewards/margins" not in second
    assert all(math.isfinite(value) for record in trainer.state.log_history for value in record.values())
    assert all(record["loss"] > 0 for record in others)


# ---- The gradient ----


def break_gradient(trainer: SimPOTrainer, step: int) -> None:
    """An infinite gradient under a finite loss."""
    weight = next(trainer.model.parameters())
    weight.register_hook(lambda grad: grad * math.inf if trainer.state.global_step == step - 1 else grad)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_step_with_the_steps_rows(build, tmp_path, max_grad_norm):
    trainer, states = build(tiny_model(), max_grad_norm=max_grad_norm)
    break_gradient(trainer, step=2)
    message = r"step 2: the gradient of training rows \[2, 3\] \(rank 0\) is not finite although their losses are"
    with pytest.raises(NonFiniteStep, match=message):
        trainer.train()
    assert equal(dict(trainer.model.state_dict()), states.weights[1])
    assert [(row["index"], row["cause"]) for row in written(tmp_path)] == [(2, "gradient"), (3, "gradient")]
    assert all(math.isfinite(row["chosen_reward"]) for row in written(tmp_path))


@both_splits
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_whole(build, split):
    trainer, states = build(tiny_model(), skip_nonfinite=1, **split)
    break_gradient(trainer, step=2)
    trainer.train()
    assert equal(states.weights[2], states.weights[1])
    assert equal(states.moments[2], states.moments[1])
    assert all(torch.isfinite(weight).all() for weight in states.weights[-1].values())


def test_an_overflow_under_fp16_is_left_to_the_loss_scaler(build):
    trainer, _ = build()
    trainer.args.fp16 = True
    assert trainer._get_grad_norm(trainer.model, torch.tensor(math.inf)) == math.inf


# ---- Supervised tuning ----


def tuner(tmp_path: Path, tokenizer, rows: list[dict[str, Any]], **settings: Any) -> SFTTrainer:
    args = SFTConfig(output_dir=str(tmp_path / "run"), **SETTINGS | settings)
    data = Dataset.from_list([{"input_ids": row["rejected_input_ids"]} for row in rows])
    return SFTTrainer(model=broken_model(), args=args, train_dataset=data, processing_class=tokenizer)


def test_supervised_tuning_stops_before_a_step_that_is_not_finite(tmp_path, tokenizer):
    trainer = tuner(tmp_path, tokenizer, rows_that_break(2))
    with pytest.raises(NonFiniteStep, match=r"step 2: the loss of micro-batches of \d+ tokens \(rank 0\) is not finite"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert torch.isfinite(trainer.model.lm_head.weight).all()
    assert [(row["step"], row["loss"]) for row in written(tmp_path)] == [(2, "nan")]


def test_supervised_tuning_may_skip_steps_too(tmp_path, tokenizer):
    trainer = tuner(tmp_path, tokenizer, rows_that_break(2), skip_nonfinite=1)
    trainer.train()
    assert trainer.state.global_step == 4
    assert torch.isfinite(trainer.model.lm_head.weight).all()
    assert [math.isfinite(record.get("loss", math.nan)) for record in trained(trainer)] == [True, False, True, True]


# ---- What a recipe may say ----


@pytest.mark.parametrize("config", [SimPOConfig, SFTConfig])
def test_the_filter_that_prints_0_for_nan_is_off_and_stays_off(config, tmp_path):
    assert config(output_dir=str(tmp_path), use_cpu=True).logging_nan_inf_filter is False
    with pytest.raises(ConfigError, match="logging_nan_inf_filter = True: must be false"):
        config(output_dir=str(tmp_path), use_cpu=True, logging_nan_inf_filter=True)


def test_a_negative_number_of_steps_cannot_be_skipped(tmp_path):
    with pytest.raises(ConfigError, match="skip_nonfinite = -1: must not be negative"):
        SimPOConfig(output_dir=str(tmp_path), use_cpu=True, skip_nonfinite=-1)


def test_deepspeed_cannot_skip_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="skip_nonfinite = 2: not with DeepSpeed, whose optimizer steps inside the backward"):
        SimPOConfig(output_dir=str(tmp_path), use_cpu=True, skip_nonfinite=2)


# ---- Nothing to train on ----


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (0, {}, "train has no row left"),
        (7, {"num_train_epochs": 0}, "num_train_epochs = 0"),
        (7, {"dataloader_drop_last": True, "per_device_train_batch_size": 8}, "7 training rows are less than one batch of 8 "),
    ],
    ids=["no row", "no epoch", "less than a batch"],
)
def test_a_run_that_would_train_no_step_is_refused_before_the_model_is_loaded(rows, settings, message, tmp_path, tokenizer):
    args = SimPOConfig(output_dir=str(tmp_path), max_length=200, **SETTINGS | settings)
    data = Dataset.from_list(token_rows(LENGTHS)).select(range(rows))
    with pytest.raises(UserError, match=message):
        SimPOTrainer(model="no/such-model", args=args, train_dataset=data, processing_class=tokenizer)


def test_the_rows_of_a_batch_are_counted_over_all_processes(tmp_path, monkeypatch):
    args = SimPOConfig(output_dir=str(tmp_path), dataloader_drop_last=True, **SETTINGS)
    args.refuse_zero_steps(4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 training rows are less than one batch of 8 "):
        args.refuse_zero_steps(4)


@pytest.mark.parametrize(
    "split", [{}, {"gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 300}], ids=["fixed", "by tokens"]
)
def test_the_smallest_data_that_is_accepted_trains_one_step(build, split):
    trainer, _ = build(rows=token_rows(LENGTHS)[:2], dataloader_drop_last=True, **split)
    trainer.train()
    assert trainer.state.global_step == 1


# ---- Memory ----


def test_out_of_memory_is_one_message_with_the_batch_the_peak_and_three_settings(build, monkeypatch):
    trainer, _ = build(per_device_train_batch_size=4)
    forward = trainer.concatenated_forward

    def full(model, batch):
        if trainer.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    monkeypatch.setattr(trainer, "concatenated_forward", full)
    with pytest.raises(OutOfMemory) as stopped:
        trainer.train()
    first, *settings = str(stopped.value).splitlines()
    # Rows 4 to 7, packed: 4 + 20 + 2, 3 + 2 + 15, 7 + 8 + 1, 6 + 5 + 5, less the last token of each side, which is a label
    # only, plus the last token of the prompt, which opens both branches.
    assert (
        "step 2, rank 0: out of memory in a micro-batch of 4 pairs, 74 distinct tokens (192 if padded), the longest pair 26"
        in first
    )
    assert "peak" in first
    assert len(settings) == 3
    assert settings[0].strip().startswith("gradient_checkpointing: true")
    assert settings[2].strip().startswith("max_tokens_per_micro_batch: 37")


def test_out_of_memory_in_the_optimizers_step_advises_smaller_states_first(build, monkeypatch):
    trainer, _ = build()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(OutOfMemory, match=r"in the optimizer's step or an evaluation[^\n]*\n  use_peft: true"):
        trainer.train()


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        ({"states_first": True, "processes": 4}, ["accelerate_configs/deepspeed_zero3.yaml", "use_peft", "adamw_8bit"]),
        ({"states_first": True, "adapter": True}, ["load_in_4bit", "gradient_checkpointing", "bf16"]),
        ({"gradient_checkpointing": True, "half_precision": True}, ["smaller", "use_peft", "adamw_8bit"]),
        (
            {"gradient_checkpointing": True, "half_precision": True, "adapter": True, "quantised": True, "divided": True},
            ["smaller", "max_length"],
        ),
    ],
)
def test_what_is_on_already_is_not_advised(setup, expected):
    off = {
        "states_first": False, "gradient_checkpointing": False, "half_precision": False, "divided": False, "processes": 1,
        "adapter": False, "quantised": False, "optimizer": "adamw_torch_fused",
    }  # fmt: skip
    settings = settings_that_help(["smaller"], **off | setup)
    assert len(settings) == len(expected)
    for setting, name in zip(settings, expected, strict=True):
        assert name in setting


# ---- Two processes ----

POISONED = """
import math, sys, time
import torch
from alignment.data.splits import PAIRS
from alignment.pipeline import Method, main
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer

class Poisoned(SimPOTrainer):
    def concatenated_forward(self, model, batch):
        scores = super().concatenated_forward(model, batch)
        if self.accelerator.process_index == 1 and self.model.training:
            if sys.argv[2] == "crash" and self.state.global_step == 1:
                raise ZeroDivisionError("rank 1 divides by zero")
            if sys.argv[2] == "nan" and self.state.global_step in (1, 2):
                bad = scores.chosen_logp.clone()
                bad[0] = bad[0] * math.nan
                return scores._replace(chosen_logp=bad)
        return scores

if __name__ == "__main__":
    main(Method(config=SimPOConfig, trainer=Poisoned, data=PAIRS), [sys.argv[1], *sys.argv[3:]])
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    tiny_model(initializer_range=0.1).save_pretrained(folder / "model")
    builders.bpe_tokenizer().save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in builders.pairs(16)), encoding="utf-8")
    (folder / "poisoned.py").write_text(POISONED, encoding="utf-8")
    keys = {
        **SETTINGS,
        "model_name_or_path": str(folder / "model"),
        "dataset_mixer": {str(folder / "train.jsonl"): 1.0},
        "preprocessing": "exact",
        "do_eval": False,
        "max_length": 160,
        "max_prompt_length": 80,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return folder / "recipe.yaml"


def launch_two(recipe: Path, tmp_path: Path, poison: str, *options: str) -> tuple[subprocess.CompletedProcess, float]:
    """The finished launch, and its seconds."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += [
        "--main_process_port=0",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        str(recipe.parent / "poisoned.py"),
        str(recipe),
        poison,
    ]
    cache = recipe.parent / "cache"
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(
        [*launch, f"--output_dir={tmp_path / 'run'}", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    return done, time.monotonic() - started


def test_one_bad_pair_on_one_of_two_processes_stops_both_with_its_rank_and_row(recipe, tmp_path):
    done, _ = launch_two(recipe, tmp_path, "nan", "--skip_nonfinite=1")
    assert done.returncode != 0
    assert "step 2: the log-probabilities of training rows" in done.stdout  # skipped, with a warning
    rows = written(tmp_path)
    assert [(row["step"], row["rank"], row["skipped"], row["chosen_reward"]) for row in rows] == [
        (2, 1, True, "nan"), (3, 1, False, "nan"),
    ]  # fmt: skip
    message = f"error: step 3: the log-probabilities of training rows [{rows[1]['index']}] (rank 1) are not finite"
    assert done.stderr.count(f"\n{message}") == 1  # by one process; the launcher's summary repeats it
    assert message in "\n".join(done.stderr.splitlines()[-30:])
    one, two = (load_file(tmp_path / f"run/checkpoint-{step}/model.safetensors") for step in (1, 2))
    assert all(torch.isfinite(weight).all() for weight in one.values())
    assert equal(one, two)  # step 2 was skipped
    assert not (tmp_path / "run/checkpoint-3").exists()
    assert not (tmp_path / "run/model.safetensors").exists()


def test_an_error_on_one_of_two_processes_ends_the_job_soon_and_is_shown_last(recipe, tmp_path):
    done, seconds = launch_two(recipe, tmp_path, "crash")
    assert done.returncode != 0
    assert seconds < 60
    assert "ZeroDivisionError: rank 1 divides by zero" in "\n".join(done.stderr.splitlines()[-30:])
    assert "rank      : 1" in "\n".join(done.stderr.splitlines()[-60:])


def test_a_users_mistake_on_two_processes_is_said_once_and_in_the_launchers_summary(recipe, tmp_path):
    done, _ = launch_two(recipe, tmp_path, "none", "--dataloader_drop_last=true", "--per_device_train_batch_size=9")
    assert done.returncode != 0
    message = (
        "error: --dataloader_drop_last=true: dataloader_drop_last = True: 16 training rows are less than one batch of 18 (of "
        "all processes)"
    )
    assert done.stderr.count(f"\n{message}") == 1
    assert message in "\n".join(done.stderr.splitlines()[-30:])
    assert 'Traceback (most recent call last):\n  File "' + str(recipe.parent) not in done.stderr
