"""SFTConfig: everything that a supervised fine-tuning recipe says about training."""

from dataclasses import dataclass, field
from typing import Any

import trl

from alignment.errors import Problem
from alignment.recipe.configs import RunArguments
from alignment.recipe.ranges import Rule, rule_problems
from alignment.report.objective import Objective

# A run gives TRL conversations that are tokenized already, by the model's template or the one that chat_template names.
TOKENIZED_BEFORE: dict[str, Rule] = {
    "chat_template_path": (lambda value: not value, "is not read; chat_template names a template"),
    "dataset_text_field": (lambda value: value == "text", "is not read; conversations come in the column messages"),
    "dataset_kwargs": (lambda value: not value, "is not read; remove it"),
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss"),
        (lambda value: not value, "is not supported: all tokens of a conversation are trained; remove it"),
    ),
}


@dataclass
class SFTConfig(RunArguments, trl.SFTConfig):
    """TRL's SFTConfig, with the Trainer's own defaults where TRL's surprise: no bf16, which a CPU may lack."""

    bf16: bool = field(default=False, metadata={"help": "Compute in bf16."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass, to save memory."}
    )

    @property
    def objective(self) -> Objective:
        return Objective("SFT", "Supervised fine-tuning", "-log p(token), mean over tokens", {})

    def problems(self) -> list[Problem]:
        return super().problems() + rule_problems(self, TOKENIZED_BEFORE)

    @classmethod
    def metrics(cls, values: Any) -> list[str]:
        return ["loss", "entropy", "mean_token_accuracy"]
