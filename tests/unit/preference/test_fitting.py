"""Finding a division before the first step, on a CPU that is told it is a GPU with so much memory."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from bitsandbytes.nn import Params4bit
from datasets import Dataset

from alignment.preference import fitting, steps
from alignment.preference.division import Division, write_division
from alignment.preference.fitting import filling
from alignment.run.guards import OutOfMemory
from scripts.dpo_config import DPOConfig
from scripts.dpo_trainer import DPOTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests.builders import tiny_model, token_rows

ROWS = token_rows([(5, 30, 9), (2, 12, 40), (1, 10, 10), (9, 60, 6), (4, 20, 2), (3, 2, 15), (7, 8, 1), (6, 5, 5)] * 2)
LONGEST = 9 + 60 + 6
KEPT, RECOMPUTED = 1000, 100  # bytes of a token in the model of memory below


class TwoLayers:
    """A token takes KEPT bytes for each of two layers that is kept, and RECOMPUTED for one that is not."""

    def __init__(self, plan: fitting.Plan):
        self.plan = plan

    def largest(self, available: float, recomputed: int) -> int:
        return int(available / (recomputed * RECOMPUTED + (2 - recomputed) * KEPT))

    def peak(self, tokens: int, recompute_layers: int) -> SimpleNamespace:
        return SimpleNamespace(optimizer=0)


@pytest.fixture
def gpu(monkeypatch):
    """Sets the bytes that are there, and what a micro-batch that is tried takes of them."""

    def set_up(room: float, taken: float = 0.0) -> list[fitting.Plan]:
        plans: list[fitting.Plan] = []
        monkeypatch.setattr(fitting, "is_gpu", lambda device: True)
        monkeypatch.setattr(fitting, "estimate", lambda plan: plans.append(plan) or TwoLayers(plan))
        monkeypatch.setattr(fitting, "room_bytes", lambda device: room)
        monkeypatch.setattr(fitting, "start_measuring", lambda: None)
        monkeypatch.setattr(fitting, "most_bytes", lambda: taken)
        return plans

    return set_up


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(config=SimPOConfig, trainer=SimPOTrainer, **settings):
        args = config(
            **{
                "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "report_to": "none",
                "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logging_steps": 1,
                "max_length": 200, "max_prompt_length": 100, "gradient_checkpointing": True, "save_strategy": "no",
                **settings,
            }
        )  # fmt: skip
        return trainer(tiny_model(), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)

    return build


def losses(trainer: SimPOTrainer) -> list[float]:
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_with_all_the_memory_there_is_nothing_is_recomputed_and_a_step_is_one_micro_batch(gpu, build):
    plans = gpu(room=1e9)
    trainer = build()
    trainer.train()
    assert trainer.division.recompute_layers == 0
    assert trainer.max_tokens >= LONGEST
    assert [layer.gradient_checkpointing for layer in trainer.model.model.layers] == [False, False]
    assert (plans[0].strategy, plans[0].layout, plans[0].attention) == ("single", "packed", "sdpa")


def test_a_division_changes_no_number(gpu, build, monkeypatch):
    fixed = losses(build())
    gpu(room=LONGEST * 2 * RECOMPUTED + 1)
    trainer = build()
    assert losses(trainer) == pytest.approx(fixed, rel=1e-5)
    assert trainer.division == Division(LONGEST, 2)


def test_what_does_not_fit_when_it_is_tried_is_chosen_smaller(gpu, build):
    gpu(room=300 * 2 * RECOMPUTED)
    trainer = build(recompute_layers=2)
    plain, tried = trainer.try_out, []

    def try_out(division):
        tried.append(division.max_tokens)
        plain(division)
        if division.max_tokens > 200:  # the estimate is off by half
            raise torch.OutOfMemoryError("no room")

    trainer.try_out = try_out
    trainer.train()
    assert tried[0] == 300
    assert LONGEST < trainer.max_tokens <= 200
    assert sorted(set(tried), reverse=True) == list(dict.fromkeys(tried))


def test_what_is_tried_is_a_second_micro_batch_beside_the_gradients_of_a_first(gpu, build):
    gpu(room=1e9)
    found = {}
    for step in (4, 1):
        trainer = build(gradient_accumulation_steps=step, max_tokens_per_micro_batch=None, max_steps=1)
        plain, seen = trainer.try_out, []

        def try_out(division, plain=plain, seen=seen, trainer=trainer):
            seen.append(all(parameter.grad is not None for parameter in trainer.model.parameters()))
            plain(division)

        trainer.try_out = try_out
        trainer.train()
        found[step] = seen
    assert found == {4: [False, True], 1: [False]}


def test_padded_rows_that_are_tried_have_no_more_tokens_than_the_budget_padding_included():
    tokens = 2 * np.array([250, 1024, *[250] * 20])
    assert filling(tokens, 6500, is_padded=True) == [1, 0, 2]
    assert filling(tokens, 6500, is_padded=False) == [1, 0, *range(2, 9)]
    assert filling(tokens, 100, is_padded=True) == [1]


def test_what_is_tried_leaves_nothing_behind(gpu, build):
    state = torch.random.get_rng_state()
    gpu(room=1e9)
    trainer = build(seed=3)
    seen: list[bool] = []
    tried = trainer.fit

    def fit() -> None:
        torch.manual_seed(7)
        before = torch.random.get_rng_state()
        tried()
        seen.append(torch.equal(before, torch.random.get_rng_state()))
        seen.append(all(parameter.grad is None for parameter in trainer.model.parameters()))
        seen.append(not trainer.step_sums and not trainer.step_rows)

    trainer.fit = fit
    trainer.train()
    assert seen == [True, True, True]
    torch.random.set_rng_state(state)


def test_dpo_is_fitted_before_its_reference_is_scored(gpu, build):
    gpu(room=1e9)
    trainer = build(DPOConfig, DPOTrainer)
    trainer.train()
    assert trainer.division.recompute_layers == 0


def test_a_resumed_run_divides_as_the_one_before(gpu, build, tmp_path):
    gpu(room=LONGEST * 2 * RECOMPUTED + 1)
    build(save_strategy="steps", save_steps=1, max_steps=1).train()
    saved = tmp_path / "run" / "checkpoint-1"
    assert json.loads((saved / "division.json").read_text())["max_tokens"] == LONGEST
    gpu(room=1e9)  # a larger GPU
    trainer = build(max_steps=2)
    trainer.train(resume_from_checkpoint=str(saved))
    assert trainer.max_tokens == LONGEST


def test_a_resumed_run_counts_the_states_that_it_has_loaded_once(gpu, build, tmp_path, monkeypatch):
    monkeypatch.setattr(TwoLayers, "peak", lambda *args, **kwargs: SimpleNamespace(optimizer=400 * KEPT))
    gpu(room=1000 * KEPT, taken=500 * KEPT)
    first = build(save_strategy="steps", save_steps=1, max_steps=1)
    first.train()
    gpu(room=1000 * KEPT, taken=900 * KEPT)  # what was loaded is there
    trainer = build(max_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert trainer.division == first.division
    assert trainer.division.recompute_layers == 0


@pytest.mark.parametrize("settings", [{"recompute_layers": 1}, {"gradient_checkpointing": False}])
def test_a_resumed_run_recomputes_what_its_recipe_says(gpu, build, tmp_path, settings):
    gpu(room=1e9)
    first = build(save_strategy="steps", save_steps=1, max_steps=1, **settings)
    first.train()
    gpu(room=first.max_tokens * 2 * RECOMPUTED + 1)
    trainer = build(max_steps=2, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert trainer.division == first.division


def test_memory_that_a_halving_freed_is_not_filled_with_layers_when_the_run_is_resumed(gpu, build, tmp_path):
    gpu(room=LONGEST * 2 * RECOMPUTED + 1)
    build(save_strategy="steps", save_steps=1, max_steps=1).train()
    gpu(room=1e9)
    trainer = build(max_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert trainer.division == Division(LONGEST, 2)


@pytest.mark.parametrize("stored", [torch.uint8, torch.bfloat16])
def test_weights_of_four_bits_are_counted_as_they_were(stored):
    packed = Params4bit(torch.randn(64, 32), requires_grad=False, quant_storage=stored).to("cpu")
    assert packed.dtype == stored
    assert fitting.elements_of(packed) == 64 * 32


def test_a_number_in_the_recipe_is_taken_as_it_is(gpu, build):
    plans = gpu(room=1e9)
    trainer = build(max_tokens_per_micro_batch=100, recompute_layers=1)
    trainer.train()
    assert trainer.division == Division(100, 1)
    assert plans == []


def test_a_fixed_count_of_pairs_may_still_leave_the_layers_open(gpu, build):
    gpu(room=1e9)
    trainer = build(max_tokens_per_micro_batch=None)
    trainer.train()
    assert trainer.max_tokens is None
    assert trainer.division.recompute_layers == 0


@pytest.mark.parametrize(
    "error", [ValueError("it cannot be estimated: no such layer"), subprocess.TimeoutExpired("it cannot be estimated", 600)]
)
def test_a_run_that_cannot_be_estimated_takes_the_smallest_division_and_says_so(gpu, build, monkeypatch, caplog, error):
    gpu(room=1e9)

    def fails(plan):
        raise error

    monkeypatch.setattr(fitting, "estimate", fails)
    trainer = build()
    trainer.train()
    assert trainer.division == Division(LONGEST, 2)
    assert "cannot be estimated" in caplog.text


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_micro_batch_that_does_not_fit_after_all_is_halved_once_and_the_step_begins_again(gpu, build, fails_at, caplog):
    expected = losses(build())
    gpu(room=200 * 2 * RECOMPUTED)
    trainer = build()
    plain, calls = trainer.concatenated_forward, []

    def forward(model, batch):
        if trainer.division is not None and trainer.is_in_train and trainer.micro_batch is not None:
            calls.append(batch["input_ids"].shape[1])
            if len(calls) == fails_at + 1:
                raise torch.OutOfMemoryError("no room")
        return plain(model, batch)

    trainer.concatenated_forward = forward
    before = 200
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)
    assert trainer.max_tokens == max(before // 2, LONGEST)
    assert caplog.text.count("did not fit") == 1


def test_the_longest_pair_alone_that_does_not_fit_is_out_of_memory(gpu, build):
    gpu(room=LONGEST * 2 * RECOMPUTED + 1)
    trainer = build()

    def forward(model, batch):
        raise torch.OutOfMemoryError("no room")

    trainer.fits = lambda *_: True
    trainer.concatenated_forward = forward
    with pytest.raises(Exception, match="out of memory"):
        trainer.train()


def test_a_step_of_several_processes_is_never_begun_again_and_the_next_start_is_smaller(gpu, build, tmp_path, monkeypatch):
    gpu(room=1e9)
    trainer = build()
    trainer.division = Division(400, 0)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    assert not trainer.halve()
    assert json.loads((tmp_path / "run" / "_run" / "division.json").read_text())["max_tokens"] == 200
    assert steps.DividedSteps.halve is fitting.FittedSteps.halve


def test_a_trial_without_room_where_layers_are_gathered_ends_the_run_and_the_next_start_takes_half(gpu, build, monkeypatch):
    gpu(room=1e9)
    trainer = build()

    def no_room(division: Division) -> None:
        raise torch.OutOfMemoryError("no room")

    trainer.try_out = no_room
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.args), "world_size", 2)
        patch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.FSDP)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.fits(Division(4 * LONGEST, 0), TwoLayers(None), 1e9)
    assert build().wish_of_this_start(LONGEST)[0].max_tokens == 2 * LONGEST


def out_of_memory_of(trainer: SimPOTrainer) -> str:
    """What a run says that the first micro-batch of its first step does not fit."""
    plain = trainer.concatenated_forward

    def forward(model, batch):
        if trainer.step_rows or trainer.optimizer is not None:
            raise torch.OutOfMemoryError("no room")
        return plain(model, batch)

    trainer.fits = lambda *_: True
    trainer.concatenated_forward = forward
    with pytest.raises(OutOfMemory) as stopped:
        trainer.train()
    return str(stopped.value)


def test_out_of_memory_of_several_processes_says_that_the_next_start_takes_half_and_advises_no_other_number(
    gpu, build, monkeypatch
):
    gpu(room=1e9)
    trainer = build(pair_layout="padded")
    trainer.division = Division(4 * LONGEST, 0)
    plain = trainer.halve

    def halve() -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.args), "world_size", 2)
            return plain()

    trainer.halve = halve
    told = out_of_memory_of(trainer)
    assert f"The next start takes micro-batches of at most {2 * LONGEST} tokens, and goes on. What helps" in told
    assert "max_tokens_per_micro_batch" not in told
    assert "per_device_train_batch_size" not in told


def test_padded_rows_divided_by_tokens_are_advised_half_of_them_padding_included(build):
    trainer = build(pair_layout="padded", max_tokens_per_micro_batch=1000, gradient_checkpointing=False, bf16=True)
    write_division(Path(trainer.args.output_dir, "_run"), Division(200, 0))  # an earlier start's: a number beats it
    told = out_of_memory_of(trainer)
    tokens = int(re.search(r"\((\d+) if padded\)", told)[1])
    assert f"max_tokens_per_micro_batch: {max(tokens // 2, 2 * (9 + 60))}" in told
    assert "per_device_train_batch_size" not in told
    assert "next start" not in told
