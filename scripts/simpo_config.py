"""SimPOConfig: everything that a SimPO recipe says about training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from alignment.data.tokenization import LengthRules
from alignment.errors import Problem
from alignment.recipe.configs import RunArguments, choice_problem, positive_problem
from alignment.recipe.ranges import PAIR_RULES, rule_problems

CHOICES = {
    "loss_type": ("sigmoid", "hinge"),
    "truncation_mode": ("keep_end", "keep_start"),
    "pair_layout": ("auto", "packed", "padded"),
}
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing": (lambda value: 0 <= value < 0.5, "must be at least 0 and below 0.5"),
    "beta": (lambda value: value != math.inf, "must be finite"),
    "sft_weight": (lambda value: 0 <= value < math.inf, "must be finite and not negative"),
    "gamma_beta_ratio": (lambda value: 0 <= value < math.inf, "must be finite and not negative"),
    "label_pad_token_id": (lambda value: value == -100, "must be -100, the label that torch ignores"),
    **dict.fromkeys(
        ("max_completion_length", "max_target_length", "is_encoder_decoder", "generate_during_eval"),
        (lambda value: not value, "is not supported; remove it"),
    ),
    "remove_unused_columns": (lambda value: not value, "must be false"),
}


@dataclass
class SimPOConfig(RunArguments, TrainingArguments):
    """Hyperparameters of SimPO (Meng et al. 2024, https://arxiv.org/abs/2405.14734) on top of TrainingArguments.

    Lengths are in tokens. Raises ConfigError, naming every field that is wrong at once.
    """

    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt + response; null means 512, with a warning."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt of a row that is too long; null means 128, with a warning."}
    )
    max_completion_length: int | None = field(default=None, metadata={"help": "Encoder-decoder models only: not supported."})
    max_target_length: int | None = field(default=None, metadata={"help": "Encoder-decoder models only: not supported."})
    beta: float = field(default=2.0, metadata={"help": "Scale of the reward, beta x mean log-probability."})
    gamma_beta_ratio: float = field(
        default=0.25, metadata={"help": "Target margin over beta: gamma = gamma_beta_ratio x beta."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy of the chosen responses, added to the loss."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of pairs assumed to be labelled the wrong way round (sigmoid only)."}
    )
    loss_type: Literal["sigmoid", "hinge"] = field(default="sigmoid", metadata={"help": "sigmoid (the paper's) or hinge."})
    disable_dropout: bool = field(default=True, metadata={"help": "Turn all dropout off, LoRA's included."})
    label_pad_token_id: int = field(default=-100, metadata={"help": "Label of positions that are not scored."})
    padding_value: int | None = field(default=None, metadata={"help": "Token id used as padding; null: the tokenizer's."})
    truncation_mode: Literal["keep_end", "keep_start"] = field(
        default="keep_end", metadata={"help": "Which end of a prompt that is too long is kept."}
    )
    pair_layout: Literal["auto", "packed", "padded"] = field(
        default="auto",
        metadata={
            "help": "packed: a pair is one row without padding, its prompt computed once; padded: two rows; auto: packed "
            "where the model's attention allows."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Divide the pairs of a step (per_device_train_batch_size x gradient_accumulation_steps a process) into "
            "packed micro-batches of at most so many tokens, instead of a fixed count; data order and steps stay."
        },
    )
    generate_during_eval: bool = field(default=False, metadata={"help": "Not supported; sample from the saved model."})
    is_encoder_decoder: bool | None = field(default=None, metadata={"help": "Decoder-only models only: null or false."})
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Extra arguments of from_pretrained, when the trainer loads the model."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize; null: preprocessing_num_workers."}
    )

    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the collator needs the columns."})

    def problems(self) -> list[Problem]:
        counts = ("max_length", "max_prompt_length", "dataset_num_proc", "max_tokens_per_micro_batch")
        problems = super().problems() + positive_problem(self, "beta", *counts) + rule_problems(self, PAIR_RULES)
        for key, choices in CHOICES.items():
            problems += choice_problem(self, key, choices)
        for key, (allowed, advice) in RANGES.items():
            if not allowed(getattr(self, key)):
                problems.append(Problem(key, getattr(self, key), advice))
        if self.prompt_limit >= self.length_limit > 0:
            advice = f"leaves no room for a response in max_length = {self.length_limit}"
            problems.append(Problem("max_prompt_length", self.prompt_limit, advice))
        return problems

    @classmethod
    def metrics(cls, values: Any) -> list[str]:
        sides = ("rewards", "logps", "logits", "lengths")
        pairs = [f"{kind}/{side}" for kind in sides for side in ("chosen", "rejected")]
        return ["loss", "rewards/accuracies", "rewards/margins", *pairs, *(["sft_loss"] if values.sft_weight > 0 else [])]

    @property
    def length_limit(self) -> int:
        """max_length, or the published default for a recipe that names none."""
        return 512 if self.max_length is None else self.max_length

    @property
    def prompt_limit(self) -> int:
        return 128 if self.max_prompt_length is None else self.max_prompt_length

    @property
    def length_rules(self) -> LengthRules:
        return LengthRules(self.length_limit, self.prompt_limit, self.truncation_mode, self.preprocessing)
