"""PairConfig: what a recipe says about training on preference pairs, whatever the objective."""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple

from transformers import TrainingArguments

from ..data.tokenization import LengthRules
from ..errors import Problem
from ..recipe.configs import RunArguments, choice_problem, positive_problem
from ..recipe.ranges import PAIR_RULES, rule_problems
from ..report.objective import Objective

CHOICES = {
    "truncation_mode": ("keep_end", "keep_start"),
    "pair_layout": ("auto", "packed", "padded"),
}
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing": (lambda value: 0 <= value < 0.5, "must be at least 0 and below 0.5"),
    "beta": (lambda value: value is None or value != math.inf, "must be finite"),
    "alpha": (math.isfinite, "must be finite"),
    "sft_weight": (lambda value: 0 <= value < math.inf, "must be finite and not negative"),
    "gamma_beta_ratio": (lambda value: 0 <= value < math.inf, "must be finite and not negative"),
    "label_pad_token_id": (lambda value: value == -100, "must be -100, the label that torch ignores"),
    **dict.fromkeys(
        ("max_completion_length", "max_target_length", "is_encoder_decoder"),
        (lambda value: not value, "is not supported; remove it"),
    ),
    "generate_during_eval": (lambda value: not value, "is not supported; give sample_prompts instead"),
    "remove_unused_columns": (lambda value: not value, "must be false"),
    "max_tokens_per_micro_batch": (
        lambda value: value in ("auto", None) or (not isinstance(value, str) and value > 0),
        "must be positive, auto or null",
    ),
    "recompute_layers": (
        lambda value: value in ("auto", "all") or (not isinstance(value, str) and value >= 0),
        "must be auto, all or a number that is not negative",
    ),
    "neftune_noise_alpha": (
        lambda value: not value or value < 0,  # which is nothing for anybody
        "is not supported for pairs: its noise goes by a row's length, which padding and packing change; remove it",
    ),
    "train_probe": (lambda value: value >= 0, "must not be negative"),
}


class Reads(NamedTuple):
    """What an objective reads of the recipe, and what its authors do with beta."""

    keys: tuple[str, ...]
    beta: float | None = None  # the default, where the class has none
    authors: tuple[float, float] | None = None  # the range of their betas


@dataclass
class PairConfig(RunArguments, TrainingArguments):
    """What all objectives share, on top of TrainingArguments. Lengths are in tokens.

    A subclass adds its own fields, says which of them each of its objectives reads (`reads`), and what it optimizes
    (`objective`). Raises ConfigError, naming every field that is wrong at once.
    """

    own_keys: ClassVar[tuple[str, ...]] = ()  # fields that some of the class's objectives read, and others do not
    loss_types: ClassVar[tuple[str, ...]] = ()

    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt + response; null means 512, with a warning."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt of a row that is too long; null means 128, with a warning."}
    )
    max_completion_length: int | None = field(default=None, metadata={"help": "Encoder-decoder models only: not supported."})
    max_target_length: int | None = field(default=None, metadata={"help": "Encoder-decoder models only: not supported."})
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy of the chosen responses, added to the loss."}
    )
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
    max_tokens_per_micro_batch: int | str | None = field(
        default="auto",
        metadata={
            "help": "Divide the pairs of a step (per_device_train_batch_size x gradient_accumulation_steps a process) into "
            "micro-batches of at most so many tokens, packed or padded, instead of a fixed count; data order and steps stay. "
            "auto: on a GPU as many as bring something and fit, on a CPU null, the fixed count."
        },
    )
    recompute_layers: int | str = field(
        default="auto",
        metadata={
            "help": "With gradient_checkpointing, how many of the model's layers are computed again in the backward pass "
            "instead of being kept in memory. auto: on a GPU as few as memory allows, on a CPU all."
        },
    )
    score_step_0: bool = field(
        default=True,
        metadata={"help": "Score the held-out pairs and the probe's before the first step too: what training changed."},
    )
    train_probe: int = field(
        default=256,
        metadata={
            "help": "Training pairs, drawn with the seed, that are evaluated beside the held-out ones and logged as probe_*; "
            "at most as many as those."
        },
    )
    generate_during_eval: bool = field(default=False, metadata={"help": "Not supported; sample_prompts is."})
    is_encoder_decoder: bool | None = field(default=None, metadata={"help": "Decoder-only models only: null or false."})
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Extra arguments of from_pretrained, when the trainer loads the model."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize; null: preprocessing_num_workers."}
    )

    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the collator needs the columns."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "beta", 0.0) is None:
            self.beta = self.reads.beta

    @property
    def reads(self) -> Reads:
        """Of the objective that the recipe chooses."""
        raise NotImplementedError

    @property
    def objective(self) -> Objective:
        raise NotImplementedError

    @property
    def followed_defaults(self) -> dict[str, Any]:
        """Fields whose default depends on the objective, as they stand, for the record."""
        return {"beta": self.beta} if getattr(type(self), "beta", 0.0) is None else {}

    def problems(self) -> list[Problem]:
        counts = ("max_length", "max_prompt_length", "dataset_num_proc")
        problems = super().problems() + positive_problem(self, *(key for key in ("beta",) if hasattr(self, key)), *counts)
        problems += rule_problems(self, PAIR_RULES)
        for key, choices in CHOICES.items():
            problems += choice_problem(self, key, choices)
        if self.loss_types:
            problems += choice_problem(self, "loss_type", self.loss_types)
        for key, (allowed, advice) in RANGES.items():
            if hasattr(self, key) and not allowed(getattr(self, key)):
                problems.append(Problem(key, getattr(self, key), advice))
        if self.prompt_limit >= self.length_limit > 0:
            advice = f"leaves no room for a response in max_length = {self.length_limit}"
            problems.append(Problem("max_prompt_length", self.prompt_limit, advice))
        if not self.loss_types or self.loss_type in self.loss_types:
            problems += [
                Problem(key, getattr(self, key), f"is not read by {self.objective.name}; remove it") for key in self.unread()
            ]
        return problems

    @classmethod
    def metrics(cls, values: Any) -> list[str]:
        """What is logged of an evaluation, for a recipe of these values."""
        sides = ("rewards", "logps", "logits", "lengths")
        pairs = [f"{kind}/{side}" for kind in sides for side in ("chosen", "rejected")]
        return ["loss", "rewards/accuracies", "rewards/margins", *pairs, *(["sft_loss"] if values.sft_weight > 0 else [])]

    def unread(self) -> list[str]:
        """Keys that another objective of the class would read, and that are not at their default."""
        return [
            each.name
            for each in fields(self)
            if each.name in self.own_keys
            and each.name not in self.reads.keys
            and each.default is not MISSING
            and getattr(self, each.name) != each.default
        ]

    def remarks(self) -> list[Problem]:
        if self.reads.authors is None:
            return []
        low, high = self.reads.authors
        advice = f"the authors of {self.objective.name} use {low:g} to {high:g}; is this another objective's beta?"
        return [] if low <= self.beta <= high else [Problem("beta", self.beta, advice)]

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
