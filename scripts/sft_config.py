"""SFTConfig: everything that a supervised fine-tuning recipe says about training."""

from dataclasses import dataclass, field
from typing import Any

import trl

from alignment.errors import Problem
from alignment.preference.configs import RANGES
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


BUDGET = "max_tokens_per_micro_batch"
WHOLE_ROWS = "auto or null: with packing every row has max_length tokens already; per_device_train_batch_size counts them"


@dataclass
class SFTConfig(RunArguments, trl.SFTConfig):
    """TRL's SFTConfig, with the Trainer's own defaults where TRL's surprise: no bf16, which a CPU may lack."""

    bf16: bool = field(default=False, metadata={"help": "Compute in bf16."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass, to save memory."}
    )
    max_tokens_per_micro_batch: int | str | None = field(
        default="auto",
        metadata={
            "help": "Divide the conversations of a step into micro-batches of at most so many tokens, padding included, "
            "instead of a fixed count; data order and steps stay. auto: on a GPU as many as per_device_train_batch_size "
            "conversations of max_length tokens have; on a CPU or with packing null, the fixed count."
        },
    )

    @property
    def objective(self) -> Objective:
        return Objective(
            "SFT",
            "Supervised fine-tuning",
            "-log p(token), mean over tokens",
            {},
            "every token of a conversation is to be predicted from those before it.",
        )

    def problems(self) -> list[Problem]:
        problems = super().problems() + rule_problems(self, {**TOKENIZED_BEFORE, BUDGET: RANGES[BUDGET]})
        if isinstance(tokens := self.max_tokens_per_micro_batch, int):
            if self.packing:
                problems.append(Problem(BUDGET, tokens, WHOLE_ROWS))
            elif self.max_length is not None and tokens < self.max_length:
                advice = (
                    f"a conversation may have max_length = {self.max_length} tokens; give at least that, or lower max_length"
                )
                problems.append(Problem(BUDGET, tokens, advice))
        return problems

    @classmethod
    def metrics(cls, values: Any) -> list[str]:
        return ["loss", "entropy", "mean_token_accuracy"]
