"""What a recipe can say about the model, the data and the run, whatever the training method."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import ConfigError, Problem, UserError
from ..launch.launch import STRATEGIES, start_process_group
from ..report.objective import Objective
from .dry_run import DryRunArguments
from .ranges import DTYPES, trainer_problems

PREPROCESSING_MODES = ("published", "exact")
SAVE_DTYPES = DTYPES[1:]
QUANT_STORAGE = ("uint8", "float16", "bfloat16", "float32")


def choice_problem(config: Any, key: str, choices: tuple[str, ...]) -> list[Problem]:
    value = getattr(config, key)
    return [] if value in choices else [Problem(key, value, f"must be one of {', '.join(choices)}")]


def positive_problem(config: Any, *keys: str) -> list[Problem]:
    """Fields that may be None, and otherwise count something."""
    values = ((key, getattr(config, key)) for key in keys)
    return [Problem(key, value, "must be positive") for key, value in values if value is not None and not value > 0]


@dataclass
class ModelArguments:
    """The policy: where its weights are, in which precision and with which adapter it is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of the model to train."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    base_model_revision: str | None = field(
        default=None,
        metadata={
            "help": "Revision of the base model, when model_name_or_path is a LoRA adapter; null: the one that it names."
        },
    )
    model_code_revision: str | None = field(
        default=None, metadata={"help": "Revision of the model's own code, with trust_remote_code."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, where it is not the model's own."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Off unless you have read that code."}
    )
    torch_dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = field(
        default=None,
        metadata={
            "help": "Precision of the parameters: auto, float32, float16 or bfloat16. null: float32 master parameters, "
            "computed in bf16 under `bf16: true`, because AdamW steps at 1e-6 vanish in bf16 parameters."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel: flash_attention_2, sdpa, eager, ...; null lets transformers choose."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the whole model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale; the update is multiplied by lora_alpha / lora_r."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Rank-stabilised LoRA: multiply by lora_alpha / sqrt(lora_r) instead, for high ranks."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: train each weight's magnitude apart from its direction; slower than LoRA."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of LoRA; 0 when disable_dropout is true."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the layers that get an adapter, or all-linear: every linear layer but the head. null: the "
            "architecture's usual ones, by peft's table."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers trained whole and saved beside the adapter."}
    )
    sft_adapter: Literal["merge", "continue"] | None = field(
        default=None,
        metadata={
            "help": "When model_name_or_path is a LoRA adapter: merge it into its base and train that, whole or with a new "
            "adapter; or continue, and train the adapter itself. null: continue on a quantised base, else merge."
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the frozen base to 8 bits (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the frozen base to 4 bits (QLoRA)."})
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "4-bit number format: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the 4-bit scales as well."})
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = field(
        default="uint8",
        metadata={
            "help": "Type that packed 4-bit weights are stored as, for FSDP, which shards floating types only: uint8, float16, "
            "bfloat16 or float32."
        },
    )

    def __post_init__(self) -> None:
        problems = [*self.value_problems(), *self.combination_problems()]
        if problems:
            raise ConfigError("ModelArguments", problems)

    def value_problems(self) -> list[Problem]:
        problems = positive_problem(self, "lora_r", "lora_alpha")
        problems += choice_problem(self, "bnb_4bit_quant_type", ("nf4", "fp4"))
        problems += choice_problem(self, "bnb_4bit_quant_storage", QUANT_STORAGE)
        for key, choices in {"torch_dtype": DTYPES, "sft_adapter": ("merge", "continue")}.items():
            problems += choice_problem(self, key, choices) if getattr(self, key) is not None else []
        if not 0 <= self.lora_dropout < 1:
            problems.append(Problem("lora_dropout", self.lora_dropout, "must be at least 0 and below 1"))
        return problems

    def combination_problems(self) -> list[Problem]:
        """Settings that say nothing, or nothing possible, without others."""
        problems = []
        if self.load_in_4bit and self.load_in_8bit:
            problems.append(Problem("load_in_4bit", True, "cannot be combined with load_in_8bit; choose one"))
        if self.use_bnb_nested_quant and not self.load_in_4bit:
            problems.append(Problem("use_bnb_nested_quant", True, "is about 4-bit weights; add load_in_4bit: true"))
        needs_adapter = {
            "load_in_4bit": "quantised weights cannot be trained; add use_peft: true",
            "load_in_8bit": "quantised weights cannot be trained; add use_peft: true",
            "use_rslora": "is a kind of LoRA; add use_peft: true",
            "use_dora": "is a kind of LoRA; add use_peft: true",
        }
        for key, advice in () if self.use_peft else needs_adapter.items():
            problems += [Problem(key, True, advice)] if getattr(self, key) else []
        if self.sft_adapter == "continue" and not self.use_peft:
            problems.append(Problem("sft_adapter", "continue", "trains an adapter; add use_peft: true, or choose merge"))
        targets = self.lora_target_modules or []
        if "all-linear" in targets and len(targets) > 1:
            advice = "all-linear stands alone; remove it, or the names beside it"
            problems.append(Problem("lora_target_modules", targets, advice))
        return problems


@dataclass
class DataArguments:
    """Which conversations to train and evaluate on, and how they become text."""

    dataset_mixer: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Source -> how much of its training rows: a fraction in (0, 1] or a row count. A source is a Hub "
            "name (name or name:config), a folder of JSONL/JSON/Parquet files named by split, a folder written by "
            "save_to_disk, a file, or a glob."
        },
    )
    dataset_splits: list[str] = field(
        default_factory=lambda: ["train", "test"],
        metadata={"help": "Splits to read: train* for training; test*, validation*, eval*, dev* for evaluation."},
    )
    dataset_configs: list[str] | None = field(
        default=None, metadata={"help": "Config name of each source, in the order of dataset_mixer."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of plain text, for continued pre-training."})
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A shipped template (llama-3, mistral, gemma, zephyr), one of the tokenizer's named ones, a .jinja file, "
            "or Jinja text."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Values for variables that the chat template reads, e.g. {enable_thinking: false}; the saved tokenizer's "
            "template has them as defaults."
        },
    )
    auto_insert_empty_system_msg: bool = field(
        default=True,
        metadata={"help": "published preprocessing: put an empty system turn first where the template knows that role."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    truncation_side: Literal["left", "right"] | None = field(
        default=None, metadata={"help": "Side that the tokenizer truncates: left or right."}
    )

    def __post_init__(self) -> None:
        problems = positive_problem(self, "preprocessing_num_workers")
        if self.truncation_side is not None:
            problems += choice_problem(self, "truncation_side", ("left", "right"))
        for key in self.chat_template_kwargs or {}:
            if not finite_within(self.chat_template_kwargs[key]):
                problems.append(
                    Problem(
                        f"chat_template_kwargs.{key}", self.chat_template_kwargs[key], "no template can be given inf or nan"
                    )
                )
            if not key.isidentifier():
                problems.append(Problem(f"chat_template_kwargs.{key}", self.chat_template_kwargs[key], "is no variable's name"))
        for source, share in (self.dataset_mixer or {}).items():
            if not is_share(share):
                problems.append(
                    Problem(f"dataset_mixer.{source}", share, "must be a fraction in (0, 1] or a whole number of rows")
                )
        if self.dataset_configs and len(self.dataset_configs) != len(self.dataset_mixer or {}):
            problems.append(Problem("dataset_configs", self.dataset_configs, "needs one entry for each dataset_mixer source"))
        if problems:
            raise ConfigError("DataArguments", problems)


def finite_within(value: Any) -> bool:
    """Whether every number in a value of YAML's is finite."""
    if isinstance(value, dict | list):
        return all(map(finite_within, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def is_share(share: Any) -> bool:
    """A fraction in (0, 1], or a row count: 1.0 is everything, 1 is everything too (the published meaning)."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        return False
    return share >= 1 if isinstance(share, int) else 0 < share <= 1


@dataclass
class RunArguments(DryRunArguments):
    """Fields that every training method shares; a mix-in for subclasses of TrainingArguments."""

    preprocessing: Literal["published", "exact"] = field(
        default="published",
        metadata={
            "help": "published: the rows and tokens of the published code, oddities included; exact: what those rules "
            "meant (see README.md)."
        },
    )
    bad_rows: Literal["refuse", "drop"] = field(
        default="refuse", metadata={"help": "exact preprocessing: refuse malformed rows, or drop and count them."}
    )
    total_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per optimizer step over all processes; sets gradient_accumulation_steps."},
    )
    strategy: Literal["single", "ddp", "zero2", "zero3", "fsdp1", "fsdp2"] | None = field(
        default=None,
        metadata={
            "help": "Stop unless the launcher divides the run so; null: as the launcher was told, which is checked too. With "
            "dry_run: reckon with it."
        },
    )
    num_processes: int | None = field(
        default=None,
        metadata={"help": "Stop unless so many processes were launched; null: any number. With dry_run: reckon with them."},
    )

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "auto, or null: go on from the newest whole checkpoint in output_dir, if there is one; never: start "
            "afresh, and set aside what is there; or a checkpoint's path."
        },
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume what was written elsewhere, though loading it may run the code that it holds."},
    )
    do_train: bool | None = field(default=None, metadata={"help": "Nothing but true: every run trains."})
    do_eval: bool | None = field(
        default=None,
        metadata={
            "help": "true: evaluate, at the end at least; false: never, whatever eval_strategy says; null: as that says."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a better metric_for_best_model (loss, if none is named)."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better an evaluation must be to count for early_stopping_patience."}
    )

    use_liger_kernel: bool | None = field(
        default=None,
        metadata={
            "help": "Norms, rotations and gated products by Liger's kernels; the loss stays what it is. null: on a GPU, "
            "where liger_kernel is installed."
        },
    )

    save_steps: float = field(
        default=0.25, metadata={"help": "Optimizer steps between checkpoints; below 1, a share of the whole run."}
    )
    save_minutes: float | None = field(
        default=None, metadata={"help": "Save also when so many minutes have passed since the last checkpoint."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Keep so many of the newest checkpoints, beside the best; null keeps all."}
    )
    save_dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None,
        metadata={
            "help": "Type of a whole model's saved weights; null: the checkpoint's that training began with. Adapters, and the "
            "master weights in checkpoints, keep the type they are trained in."
        },
    )
    on_save_failure: Literal["continue", "stop"] = field(
        default="continue",
        metadata={"help": "What a checkpoint that cannot be written, on a full disk say, means for the run."},
    )
    hub_minutes: float = field(
        default=120.0,
        metadata={"help": "How long the push at the end may take; past it, the run ends with the command for it."},
    )

    sample_prompts: list[str | list[dict[str, Any]]] | str | None = field(
        default=None,
        metadata={
            "help": "Prompts that are replied to before the first step, at each evaluation and at the end, into samples.jsonl "
            "and the trackers: a list, each entry a text or turns of {role, content}; or a JSON or JSONL file, rows that have "
            "such a prompt."
        },
    )
    sample_max_new_tokens: int = field(default=256, metadata={"help": "Longest reply to sample_prompts, in tokens."})
    sample_temperature: float = field(
        default=0.7,
        metadata={
            "help": "Temperature of the replies to sample_prompts, drawn with the run's seed, the same draws at every step; 0: "
            "the likeliest token."
        },
    )

    skip_nonfinite: int = field(
        default=0,
        metadata={
            "help": "How many steps of the run may be skipped because their loss or gradient is not finite; the next one stops "
            "it. Not with DeepSpeed, whose optimizer steps inside the backward pass."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay false: it would log a loss of 0 for NaN; a run stops instead."}
    )
    prepare_only: bool = field(
        default=False,
        metadata={
            "help": "Read, check and tokenize the data, and end there: no launcher, GPU or weights needed. A later run finds "
            "what was made."
        },
    )

    def __post_init__(self) -> None:
        problems = [*self.problems(), *self.batch_problems()]
        if problems:
            raise ConfigError(type(self).__name__, problems)
        if self.prepare_only or self.dry_run:  # a machine for it need not be able to train
            self.use_cpu = True
            self.tf32 = self.deepspeed = self.fsdp = None
        if self.prepare_only:
            self.bf16 = self.fp16 = self.bf16_full_eval = self.fp16_full_eval = False
        if os.environ.get("WORLD_SIZE", "1") == "1":
            self.ddp_backend = None  # of processes that talk to each other
        if self.total_train_batch_size is not None:
            self.gradient_accumulation_steps = self.total_train_batch_size // self.rows_per_forward
        start_process_group(self.ddp_timeout, os.environ, use_cpu=self.use_cpu)
        loader_is_default = self.accelerator_config is None
        self.settle_evaluation()
        self.settle_model_kwargs()
        super().__post_init__()
        if loader_is_default:  # batches are copied while the GPU computes
            self.accelerator_config.non_blocking = self.dataloader_pin_memory

    @classmethod
    def metrics(cls, values: Any) -> list[str]:
        """What an evaluation of a run with these values reports, without `eval_`: what metric_for_best_model may name."""
        return ["loss"]

    def settle_model_kwargs(self) -> None:
        """torch_dtype, as everybody writes it: transformers takes dtype, and would not see the other beside it."""
        kwargs = getattr(self, "model_init_kwargs", None)
        if isinstance(kwargs, dict) and "torch_dtype" in kwargs:
            self.model_init_kwargs = {"dtype" if key == "torch_dtype" else key: value for key, value in kwargs.items()}

    def settle_evaluation(self) -> None:
        """In front of transformers, which takes any eval_strategy for do_eval = true and knows no null."""
        self.do_train = True
        if self.do_eval is False:
            self.eval_strategy = "no"
        self.do_eval = bool(self.do_eval)
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer pickles its arguments into checkpoints, and pushes them.
        return {**self.__dict__, "hub_token": None}

    def problems(self) -> list[Problem]:
        """What is wrong with the method's own fields; each method adds its own."""
        problems = [*choice_problem(self, "preprocessing", PREPROCESSING_MODES), *trainer_problems(self)]
        problems += self.dry_run_problems()
        problems += choice_problem(self, "bad_rows", ("refuse", "drop"))
        problems += choice_problem(self, "on_save_failure", ("continue", "stop"))
        if self.save_dtype is not None:
            problems += choice_problem(self, "save_dtype", SAVE_DTYPES)
        if self.strategy is not None:
            problems += choice_problem(self, "strategy", STRATEGIES)
        problems += positive_problem(
            self,
            "total_train_batch_size",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "num_processes",
            "save_minutes",
            "hub_minutes",
            "sample_max_new_tokens",
        )
        if self.sample_prompts is not None and not self.sample_prompts:
            problems.append(Problem("sample_prompts", self.sample_prompts, "has no prompt; name some, or null"))
        if not 0 <= self.sample_temperature < math.inf:
            problems.append(Problem("sample_temperature", self.sample_temperature, "must be finite and not negative"))
        if self.skip_nonfinite < 0:
            problems.append(Problem("skip_nonfinite", self.skip_nonfinite, "must not be negative"))
        # The launcher's variable, because the recipe may not know of DeepSpeed.
        if self.skip_nonfinite > 0 and (self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"):
            advice = (
                "not with DeepSpeed, whose optimizer steps inside the backward pass, where no step can be called off; set 0, "
                "or launch with accelerate_configs/fsdp.yaml"
            )
            problems.append(Problem("skip_nonfinite", self.skip_nonfinite, advice))
        return problems

    @property
    def objective(self) -> Objective:
        """What the run optimizes."""
        raise NotImplementedError

    @property
    def followed_defaults(self) -> dict[str, Any]:
        """Fields whose default depends on others, as they stand, for the record."""
        return {}

    def remarks(self) -> list[Problem]:
        """What is allowed, and worth a line."""
        return []

    def batch_problems(self) -> list[Problem]:
        total = self.total_train_batch_size
        if total is None or total <= 0 or self.per_device_train_batch_size <= 0 or total % self.rows_per_forward == 0:
            return []
        advice = (
            f"is no multiple of {self.rows_per_forward} (per_device_train_batch_size {self.per_device_train_batch_size} "
            f"x {self.rows_per_forward // self.per_device_train_batch_size} processes)"
        )
        return [Problem("total_train_batch_size", total, advice)]

    def refuse_zero_steps(self, rows: int) -> None:
        """Raises UserError if a run on so many rows would not take one optimizer step."""
        if rows == 0:
            raise UserError("train has no row left: a run on it would train nothing")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise UserError(f"num_train_epochs = {self.num_train_epochs}: a run of no epoch would train nothing")
        needed = self.rows_per_forward
        if self.dataloader_drop_last and rows < needed:
            raise UserError(
                f"dataloader_drop_last = True: {rows} training rows are less than one batch of {needed} (of all processes), so "
                "that nothing would be trained; set it to false, or per_device_train_batch_size lower"
            )

    @property
    def rows_per_forward(self) -> int:
        return self.per_device_train_batch_size * self.planned_processes

    @property
    def planned_processes(self) -> int:
        if self.dry_run and self.num_processes is not None:
            return self.num_processes
        # The launcher's variable, because TrainingArguments.world_size starts the process group.
        return int(os.environ.get("WORLD_SIZE", "1"))


class Run(NamedTuple):
    """What a recipe and a command line say, parsed and checked."""

    model_args: ModelArguments
    data_args: DataArguments
    training_args: RunArguments
    recipe: str  # YAML of every field, without secrets
    date: str | None = None  # the day that chat templates read, as 2026-07-29; null: each one's own clock

    @property
    def output_dir(self) -> Path:
        return Path(self.training_args.output_dir)

    @property
    def rows_per_step(self) -> int:
        args = self.training_args
        return args.rows_per_forward * args.gradient_accumulation_steps

    @property
    def workers(self) -> int | None:
        return self.training_args.dataset_num_proc or self.data_args.preprocessing_num_workers
