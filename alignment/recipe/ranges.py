"""What the Trainer's own settings may be, and together with which others. transformers checks few, and one at a time."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers.debug_utils import DebugOption

from ..errors import Problem
from .values import text

DTYPES = ("auto", "float32", "float16", "bfloat16")
Rule = tuple[Callable[[Any], bool], str]  # what is allowed, and what to say otherwise


def finite(value: float) -> bool:
    return math.isfinite(value)


AT_LEAST_0: Rule = (lambda value: finite(value) and value >= 0, "must be finite and not negative")
ABOVE_0: Rule = (lambda value: finite(value) and value > 0, "must be positive and finite")
SHARE: Rule = (lambda value: 0 <= value < 1, "must be at least 0 and below 1")
COUNT: Rule = (lambda value: value > 0, "must be positive")
# Of a field whose fraction below 1 is a share of the run.
STEPS: Rule = (
    lambda value: finite(value) and value > 0 and (value < 1 or value == int(value)),
    "must be a whole number of steps, or a share of the run between 0 and 1",
)
SEED: Rule = (lambda value: 0 <= value < 2**32, "must be a whole number from 0 to 4294967295, which numpy takes")
# Liger's losses over whole vocabularies. TRL refuses the second with a traceback; steps of pairs would never reach either.
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
RULES: dict[str, Rule] = {
    "output_dir": (lambda value: bool(value.strip()), "must name a folder"),
    "num_train_epochs": AT_LEAST_0,
    "max_steps": (lambda value: value == -1 or value > 0, "must be positive, or -1: as many as num_train_epochs makes"),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "neftune_noise_alpha", "eval_delay"), AT_LEAST_0),
    "max_grad_norm": (lambda value: value >= 0, "must not be negative"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), SHARE),
    "warmup_steps": (
        lambda value: finite(value) and (0 <= value < 1 or value == int(value) >= 1),
        "must be a whole number of steps, or a share of the run from 0 to 1",
    ),
    **dict.fromkeys(("logging_steps", "save_steps"), STEPS),
    "eval_steps": (lambda value: value == 0 or STEPS[0](value), STEPS[1]),  # 0 means logging_steps
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("dataloader_num_workers",), (lambda value: value >= 0, "must not be negative")),
    **dict.fromkeys(
        ("dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb", "torch_empty_cache_steps",
         "eval_accumulation_steps", "save_total_limit", "early_stopping_patience"),
        COUNT,
    ),
    "early_stopping_threshold": AT_LEAST_0,
    "include_num_input_tokens_seen": (lambda value: value in (True, False, "all", "non_padding", "no"), "all or non_padding"),
    "debug": (
        lambda value: {str(word) for word in (value.split() if isinstance(value, str) else value)}
        <= {text for option in DebugOption for text in (option.value, str(option))},
        f"must be one of {', '.join(option.value for option in DebugOption)}",
    ),
    "torch_compile_backend": (
        lambda value: value.upper() in DynamoBackend.__members__,
        f"must be one of {', '.join(DynamoBackend.__members__).lower()}",
    ),
    "torch_compile_mode": (
        lambda value: value in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        "must be one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs",
    ),
    "liger_kernel_config": (
        lambda value: not any(value.get(key) for key in LIGER_LOSSES),
        f"{' and '.join(LIGER_LOSSES)} are losses of Liger's own, which would stand in for the method's; remove them, the "
        "layers' kernels are taken without",
    ),
    # What the suite does in its own way, or not at all: the setting would have no effect, or a wrong one.
    "do_train": (lambda value: value, "is what a run does; remove it (--prepare_only reads, checks and tokenizes only)"),
    "do_predict": (lambda value: not value, "is not supported; remove it. eval_pairs.jsonl has every held-out pair's figures"),
    "auto_find_batch_size": (
        lambda value: not value,
        "would change how many pairs a step has; keep total_train_batch_size and lower per_device_train_batch_size",
    ),
    "enable_jit_checkpoint": (lambda value: not value, "is not needed: a run always saves when it is asked to stop; remove it"),
    "save_on_each_node": (lambda value: not value, "output_dir is one folder that all machines see; remove it"),
    "logging_nan_inf_filter": (lambda value: not value, "must be false"),
}  # fmt: skip
# Where pairs are trained: what the Trainer would do with whole batches, and what is done pair by pair instead.
PAIR_RULES: dict[str, Rule] = {
    "average_tokens_across_devices": (lambda value: value, "must be true: every pair weighs the same, on whichever process"),
    "label_smoothing_factor": (lambda value: value == 0, "is about tokens and has no effect on pairs; label_smoothing has"),
    "length_column_name": (lambda value: value == "length", "must be length, the column of the tokenized pairs"),
    "prediction_loss_only": (lambda value: not value, "is not supported: every held-out pair's figures are kept; remove it"),
    "eval_do_concat_batches": (lambda value: value, "must be true"),
    **dict.fromkeys(
        ("eval_use_gather_object", "batch_eval_metrics", "include_for_metrics", "label_names"),
        (lambda value: not value, "is not supported; remove it"),
    ),
}
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")


def rule_problems(config: Any, rules: dict[str, Rule]) -> list[Problem]:
    """Fields that are set to what their rule does not allow."""
    values = {key: getattr(config, key, None) for key in rules}
    return [Problem(key, value, rules[key][1]) for key, value in values.items() if not allowed(value, rules[key][0])]


def allowed(value: Any, rule: Callable[[Any], bool]) -> bool:
    return value is None or rule(value)


def trainer_problems(config: Any) -> list[Problem]:
    """Everything about the Trainer's own fields, before transformers looks at them."""
    return [
        *rule_problems(config, RULES),
        *evaluation_problems(config),
        *precision_problems(config),
        *device_problems(config),
        *loader_problems(config),
    ]


def evaluation_problems(config: Any) -> Iterable[Problem]:
    """When it is evaluated, and what hangs on it. do_eval = false means never."""
    strategy, saving = text(config.eval_strategy), text(config.save_strategy)
    evaluates = strategy != "no" and config.do_eval is not False
    needed = "needs evaluations: set eval_strategy to steps or epoch, and leave do_eval at true"
    users = {
        "load_best_model_at_end": config.load_best_model_at_end,
        "early_stopping_patience": config.early_stopping_patience is not None,
        "lr_scheduler_type": text(config.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy"),
        "save_strategy": saving == "best",
    }
    yield from (Problem(key, text(getattr(config, key)), needed) for key, uses in users.items() if uses and not evaluates)
    if config.eval_on_start and config.do_eval is False:
        yield Problem("eval_on_start", True, "is an evaluation, and do_eval = False says that there is none")
    if saving == "best" and config.metric_for_best_model is None:
        yield Problem("save_strategy", "best", "by which figure? Set metric_for_best_model, such as loss")
    if not (config.load_best_model_at_end and evaluates) or saving == "best":
        return
    if strategy != saving:
        advice = f"needs a checkpoint where it evaluates: save_strategy = {saving}, eval_strategy = {strategy} must agree"
        yield Problem("load_best_model_at_end", True, advice)
    elif strategy == "steps" and not divides(config.eval_steps or config.logging_steps, config.save_steps):
        advice = (
            f"needs a checkpoint where it evaluates: save_steps = {config.save_steps:g} must be a multiple of eval_steps = "
            f"{config.eval_steps or config.logging_steps:g}, both steps or both shares"
        )
        yield Problem("load_best_model_at_end", True, advice)


def divides(part: float, whole: float) -> bool:
    """Of two numbers of steps, or two shares of the run."""
    if min(part, whole) <= 0 or not finite(part + whole):
        return True  # complained about elsewhere
    ratio = whole / part
    return (part < 1) == (whole < 1) and abs(ratio - round(ratio)) < 1e-6


def precision_problems(config: Any) -> Iterable[Problem]:
    for one, other in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if getattr(config, one) and getattr(config, other):
            yield Problem(one, True, f"cannot be combined with {other}; keep {other}")
    kwargs = {key: getattr(config, key) or {} for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")}
    for key, entries in kwargs.items():
        unknown = [name for name in entries if name not in CHECKPOINTING] if isinstance(entries, dict) else []
        if unknown:
            yield Problem(key, entries, f"{unknown[0]} is not one of {', '.join(CHECKPOINTING)}")


def device_problems(config: Any) -> Iterable[Problem]:
    """What a CPU cannot do. Nor need a machine that trains nothing."""
    on_cpu = config.use_cpu or not torch.accelerator.is_available()
    if config.prepare_only or config.dry_run or not on_cpu:
        return
    if config.ddp_backend not in (None, "gloo"):
        yield Problem("ddp_backend", config.ddp_backend, "processes on a CPU talk by gloo; remove it")
    if config.fp16 and not config.bf16:
        yield Problem("fp16", True, "needs a GPU; on a CPU set bf16: true, or neither")


def loader_problems(config: Any) -> Iterable[Problem]:
    if not config.dataloader_num_workers:
        for key in ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"):
            if getattr(config, key):
                yield Problem(key, getattr(config, key), "is about workers; set dataloader_num_workers to 1 or more")
    for key in ("split_batches", "dispatch_batches", "gradient_accumulation_kwargs"):
        if isinstance(config.accelerator_config, dict) and config.accelerator_config.get(key):
            advice = f"{key} would make a step of other pairs than total_train_batch_size says; remove it"
            yield Problem("accelerator_config", config.accelerator_config, advice)
