"""On a GPU supervised steps take Liger's kernels and the fused AdamW, as those of pairs do."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

from alignment.model import layers
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from tests.builders import tiny_model

ROWS = [{"input_ids": list(range(5, 5 + length)), "labels": list(range(5, 5 + length))} for length in (9, 4, 12, 7)]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As `use_fused_kernels` sees it. AdamW's fused kernel has a CPU's twin."""
    for name in ("uses_liger", "optimizer_used"):
        decide = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda asked, on_gpu, decide=decide: decide(asked, on_gpu=True))


def test_cudnns_attention_is_switched_off_and_the_kernel_named(tmp_path, tokenizer, caplog):
    torch.backends.cuda.enable_cudnn_sdp(True)
    caplog.set_level("INFO", logger="scripts.sft_trainer")
    args = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    SFTTrainer(model=tiny_model(), args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert "Attention: sdpa, as transformers has it." in caplog.text


@pytest.fixture
def applied(monkeypatch) -> list[tuple[Any, dict[str, bool]]]:
    """What Liger's kernels are applied to, and which of them: the package is there and changes nothing."""
    package = ModuleType("liger_kernel")
    package.__spec__ = ModuleSpec("liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    calls = []
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda *call: calls.append(call))
    return calls


@pytest.fixture
def trained(tmp_path: Path, tokenizer):
    def trained(**settings: Any) -> SFTTrainer:
        args = SFTConfig(
            output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
            max_steps=2, per_device_train_batch_size=2, logging_steps=1, learning_rate=0.01, max_length=30,
            **{"optim": "adamw_torch", **settings},
        )  # fmt: skip
        trainer = SFTTrainer(model=tiny_model(), args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
        trainer.train()
        return trainer

    return trained


def is_fused(trainer: SFTTrainer) -> bool | None:
    return trainer.optimizer.param_groups[0]["fused"]


def figures(trainer: SFTTrainer) -> list[list[float]]:
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
    return [[record[name] for name in names] for record in trainer.state.log_history if "loss" in record]


def test_on_a_gpu_layers_are_ligers_without_its_losses_and_adamw_is_fused(trained, on_a_gpu, applied, recwarn):
    trainer = trained()
    ((model, kernels),) = applied
    assert model is trainer.model
    assert kernels == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert is_fused(trainer)
    assert not [str(warning.message) for warning in recwarn if "use_liger_kernel" in str(warning.message)]


def test_what_is_logged_is_the_same_with_them(trained, applied, request):
    plain = trained()
    assert not applied
    assert not is_fused(plain)
    request.getfixturevalue("on_a_gpu")
    fused = trained()
    assert len(applied) == 1
    for record, wanted in zip(figures(fused), figures(plain), strict=True):
        assert record == pytest.approx(wanted, rel=1e-5)


def test_a_recipe_that_declines_them_is_heard_on_a_gpu(trained, on_a_gpu, applied):
    trainer = trained(use_liger_kernel=False, optim="sgd")
    assert not applied
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


def test_on_a_gpu_without_the_package_nothing_is_applied(trained, on_a_gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda *call: calls.append(call))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert is_fused(trained())
    assert not calls
