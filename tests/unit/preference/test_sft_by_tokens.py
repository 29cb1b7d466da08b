"""Supervised steps whose conversations are divided into micro-batches by tokens: the same steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from alignment.errors import ConfigError, UserError
from alignment.run.guards import OutOfMemory
from scripts import sft_trainer
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from tests.builders import tiny_model

LENGTHS = (30, 4, 11, 7, 24, 5, 9, 3, 18, 6, 2, 12)
FIGURES = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")


def rows() -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 60, (length,), generator=draw).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": [-100] * (len(row) // 3) + row[len(row) // 3 :]} for row in ids]


@pytest.fixture
def build(tmp_path: Path, tokenizer):
    def build(model=None, **settings: Any) -> SFTTrainer:
        args = SFTConfig(
            **{
                "output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True, "report_to": "none",
                "save_strategy": "no", "num_train_epochs": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
                "gradient_accumulation_steps": 2, "learning_rate": 0.01, "warmup_steps": 0, "max_length": 30,
                "include_num_input_tokens_seen": "non_padding", **settings,
            }
        )  # fmt: skip
        return SFTTrainer(
            model=model or tiny_model(), args=args, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer
        )

    return build


def trained(trainer: SFTTrainer) -> list[dict[str, float]]:
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Tokens of every micro-batch that is computed, padding included."""
    seen: list[int] = []
    compute = SFTTrainer.compute_loss

    def noted(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].numel())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", noted)
    return seen


@pytest.mark.parametrize("budget", [30, 40, 10_000])
def test_a_step_divided_by_tokens_is_that_of_a_fixed_count(build, sizes, budget):
    one_by_one = trained(build(per_device_train_batch_size=4, gradient_accumulation_steps=1))
    sizes.clear()
    by_tokens = trained(build(max_tokens_per_micro_batch=budget))
    assert max(sizes) <= budget
    assert len(by_tokens) == len(one_by_one) == 6
    assert (len(sizes) == 6) == (budget == 10_000)  # with room enough a step is one micro-batch
    for record, wanted in zip(by_tokens, one_by_one, strict=True):
        assert {name: record[name] for name in FIGURES} == pytest.approx({name: wanted[name] for name in FIGURES}, rel=1e-5)
        assert record["num_input_tokens_seen"] == wanted["num_input_tokens_seen"]


def test_nothing_is_divided_where_the_recipe_leaves_it_open_on_a_cpu(build, sizes):
    trained(build())
    assert len(sizes) == 12


def test_on_a_gpu_micro_batches_have_the_tokens_of_so_many_whole_conversations(build, monkeypatch):
    monkeypatch.setattr(sft_trainer, "is_gpu", lambda device: True)
    assert build(per_device_train_batch_size=2, max_length=30).max_tokens == 60
    assert build(max_tokens_per_micro_batch=None).max_tokens is None
    assert build(packing=True).max_tokens is None


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_step_begins_again(build, monkeypatch, caplog):
    monkeypatch.setattr(sft_trainer, "is_gpu", lambda device: True)
    wanted = trained(build(max_tokens_per_micro_batch=30))
    compute, failed = SFTTrainer.compute_loss, []

    def short_of_memory(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        if inputs["input_ids"].numel() > 30:
            failed.append(inputs["input_ids"].numel())
            raise torch.OutOfMemoryError
        return loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", short_of_memory)
    trainer = build()
    records = trained(trainer)
    assert trainer.max_tokens == 30
    assert len(failed) == 1
    assert caplog.text.count("did not fit; from here on 30") == 1
    for record, other in zip(records, wanted, strict=True):
        assert {name: record[name] for name in FIGURES} == pytest.approx({name: other[name] for name in FIGURES}, rel=1e-5)


def test_a_resumed_run_goes_on_with_what_a_halving_left(build, monkeypatch, tmp_path):
    monkeypatch.setattr(sft_trainer, "is_gpu", lambda device: True)
    first = build(save_strategy="steps", save_steps=1, max_steps=1)
    first.max_tokens = 45
    first.train()
    again = build(max_steps=2)
    assert again.max_tokens == 60
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert again.max_tokens == 45


def test_of_several_processes_the_next_start_takes_half_and_the_message_says_so(build, monkeypatch):
    monkeypatch.setattr(sft_trainer, "is_gpu", lambda device: True)
    trainer = build(gradient_checkpointing=True)
    plain = trainer.halve

    def halve() -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.args), "world_size", 2)
            return plain()

    def short_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    trainer.halve, trainer.compute_loss = halve, short_of_memory
    with pytest.raises(OutOfMemory, match="The next start takes micro-batches of at most 30 tokens, and goes on") as stopped:
        trainer.train()
    assert "max_tokens_per_micro_batch" not in str(stopped.value)
    assert build().max_tokens == 30


def test_a_budget_that_the_recipe_names_is_not_halved_but_told(build, monkeypatch):
    def short_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SFTTrainer, "compute_loss", short_of_memory)
    monkeypatch.setattr(SFTTrainer, "state_gb", lambda self: 0.0)
    trainer = build(max_tokens_per_micro_batch=80, gradient_checkpointing=True)
    with pytest.raises(OutOfMemory, match="max_tokens_per_micro_batch: 40: the same steps"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_tokens_per_micro_batch": 29}, "max_tokens_per_micro_batch = 29: a conversation may have max_length = 30 tokens"),
        ({"max_tokens_per_micro_batch": 60, "packing": True}, "with packing every row has max_length tokens already"),
        ({"max_tokens_per_micro_batch": 0}, "must be positive, auto or null"),
        ({"max_tokens_per_micro_batch": "many"}, "must be positive, auto or null"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(build, settings, told):
    with pytest.raises(ConfigError, match=told):
        build(**settings)


def test_a_router_loss_is_not_divided(build):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with pytest.raises(UserError, match="router loss is a mean over a micro-batch"):
        build(model, max_tokens_per_micro_batch=60)
