"""How the tests of this wing build a trainer: plain gradient descent, so that a gradient of the wrong size shows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedModel

from alignment.preference.trainer import PairTrainer
from scripts.dpo_config import DPOConfig
from scripts.dpo_trainer import DPOTrainer
from scripts.orpo_config import ORPOConfig
from scripts.orpo_trainer import ORPOTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests.builders import tiny_model, token_rows

LENGTHS = [(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6), (4, 20, 2), (3, 2, 15), (7, 8, 1), (6, 5, 5)]
ROWS = token_rows(LENGTHS)
LEARNING_RATE = 0.05
TRAINERS = {"simpo": (SimPOTrainer, SimPOConfig), "dpo": (DPOTrainer, DPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}


OF_THE_TRAINER = (
    "peft_config", "processing_class", "ref_model", "model_init", "compute_metrics", "compute_loss_func",
    "preprocess_logits_for_metrics",
)  # fmt: skip


@pytest.fixture
def build_of(tmp_path: Path, tokenizer) -> Callable[..., PairTrainer]:
    """Builds a method's trainer. Plain SGD without clipping, so that a gradient of the wrong size shows in the weights."""

    def build(
        method: str,
        model: PreTrainedModel | str | None = None,
        rows: list[dict[str, Any]] | Dataset = ROWS,
        held_out: list[dict[str, Any]] | Dataset | dict[str, Dataset] | None = None,
        **settings: Any,
    ) -> PairTrainer:
        trainer, config = TRAINERS[method]
        arguments = {key: settings.pop(key) for key in OF_THE_TRAINER if key in settings}
        args = config(
            **{
                "output_dir": str(tmp_path / "run"),
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
                "save_strategy": "no",
                "num_train_epochs": 1,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 3,
                "train_sampling_strategy": "sequential",
                "optim": "sgd",
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "logging_steps": 1,
                "max_length": 200,
                "max_prompt_length": 100,
                **settings,
            }
        )
        return trainer(
            model=tiny_model() if model is None else model,
            args=args,
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            eval_dataset=Dataset.from_list(held_out) if isinstance(held_out, list) else held_out,
            **{"processing_class": tokenizer, **arguments},
        )

    return build
