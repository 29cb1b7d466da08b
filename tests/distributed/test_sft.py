"""Supervised tuning on two processes: held-out rows count as on one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.data.splits import CONVERSATIONS
from alignment.pipeline import Method, run
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from tests import builders
from tests.distributed.conftest import HELD_OUT, ROOT, environment, launcher_config, records
from tests.workspaces import recipe_keys, save_chats, save_model, write_recipe

SFT = Method(config=SFTConfig, trainer=SFTTrainer, data=CONVERSATIONS)
RECIPE = {
    "preprocessing": "exact",
    "use_cpu": True,
    "max_length": 160,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "total_train_batch_size": 8,
    "eval_strategy": "no",
    "do_eval": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
FIGURES = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
STEPS = ("loss", "grad_norm", "num_tokens")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("supervised")
    save_model(folder / "model", initializer_range=0.1)
    save_chats(folder / "pairs", builders.pairs(16 + HELD_OUT), 16)
    return write_recipe(folder, {**RECIPE, **recipe_keys(folder)})


def evaluated(folder: Path) -> list[float]:
    (record,) = records(folder, "eval_loss")
    return [record[name] for name in FIGURES]


def test_every_token_counts_once_on_any_number_of_processes(recipe, tmp_path):
    """Held-out ones, and those of steps that the second run divides by tokens, into unequally many parts a process."""
    one = run(SFT, [str(recipe), f"--output_dir={tmp_path / 'one'}"])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
    done = subprocess.run(
        [*launch, "--config_file", launcher_config("cpu.yaml", tmp_path), "scripts/run_sft.py", str(recipe),
         f"--output_dir={tmp_path / 'two'}", "--max_tokens_per_micro_batch=160"],
        cwd=ROOT, env={**environment(tmp_path), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = one.eval_dataset
    assert len(rows) == HELD_OUT
    assert evaluated(tmp_path / "one") == pytest.approx(token_means(tmp_path / "one", rows), rel=1e-5)
    assert evaluated(tmp_path / "two") == pytest.approx(evaluated(tmp_path / "one"), rel=1e-5)
    steps = [records(tmp_path / name, "loss") for name in ("one", "two")]
    assert len(steps[0]) == len(steps[1]) == 2
    for record, wanted in zip(*steps, strict=True):
        assert [record[name] for name in STEPS] == pytest.approx([wanted[name] for name in STEPS], rel=1e-5)


@torch.no_grad()
def token_means(folder: Path, rows: list[dict]) -> list[float]:
    """Cross-entropy, entropy and accuracy over all labels, from whole rows of logits."""
    model, sums, tokens = AutoModelForCausalLM.from_pretrained(folder), torch.zeros(3), 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        logps = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)[labels != -100]
        labels = labels[labels != -100]
        nats = -logps.gather(-1, labels[:, None]).sum()
        sums += torch.stack([nats, -(logps.exp() * logps).sum(), (logps.argmax(-1) == labels).sum()])
        tokens += len(labels)
    return (sums / tokens).tolist()
