"""What only its user checks, tried on a dummy parameter before anything is loaded: optimizer, schedule, names of metrics."""

import difflib
import math
import os
import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.optimization import get_scheduler
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from ..errors import Problem
from .ranges import CHECKPOINTING, DTYPES, Rule, rule_problems
from .values import text

# What a class of another library raises for a setting that it cannot use, or for a package that it lacks.
REFUSALS = (
    ValueError, TypeError, ImportError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError,
)  # fmt: skip
LOW_RANK = ("galore", "apollo", "lomo", "adalomo")  # made for the policy's own layers, which are not there yet
STEPS = 1000  # of the rehearsed schedule, where the recipe does not say how many
SPEED = ("runtime", "samples_per_second", "steps_per_second")  # of every evaluation
# No recipe can name the function that these are for.
RULES: dict[str, Rule] = {
    "batch_eval_metrics": (lambda value: not value, "is for compute_metrics, which no recipe can name; remove it"),
    "include_for_metrics": (lambda value: not value, "is for compute_metrics, which no recipe can name; remove it"),
    "text_column": (lambda value: value == "text", "is for continued pre-training, which no method here does; remove it"),
}


def rehearse(values: SimpleNamespace) -> list[Problem]:
    """Problems of a recipe's settings that no dataclass can see."""
    problems = rule_problems(values, RULES)
    if values.num_train_epochs <= 0 and values.max_steps <= 0:
        problems.append(Problem("num_train_epochs", values.num_train_epochs, "a run of no epoch would train nothing"))
    for key, config in {"fsdp": "fsdp2.yaml", "deepspeed": "deepspeed_zero3.yaml"}.items():
        is_launched = os.environ.get("WORLD_SIZE", "1") != "1" or (key == "deepspeed" and "LOCAL_RANK" in os.environ)
        if getattr(values, key) and not (is_launched or values.prepare_only or values.dry_run):
            advice = f"divides a model among processes, and one was launched; launch with accelerate_configs/{config} instead"
            problems.append(Problem(key, getattr(values, key), advice))
    problems += attention_problems(values.attn_implementation)
    if values.fsdp_config and not values.fsdp:
        problems.append(Problem("fsdp_config", values.fsdp_config, "is read with fsdp alone; remove it"))
    if values.use_liger_kernel and not is_liger_kernel_available():
        problems.append(
            Problem("use_liger_kernel", True, "the package is not installed: pip install liger-kernel", is_local=True)
        )
    if isinstance(values.lr_scheduler_kwargs, str):
        advice = 'must be a mapping such as {"min_lr": 1e-8}'
        return [*problems, Problem("lr_scheduler_kwargs", values.lr_scheduler_kwargs, advice)]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # whoever uses the setting in earnest is going to say it again
        return [*problems, *optimizer_problems(values), *schedule_problems(values), *recomputation_problems(values)]


def attention_problems(name: str | None) -> Iterable[Problem]:
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is not None and name not in known and "/" not in name:  # a kernel's repository
        plain = [each for each in known if "|" not in each]
        yield Problem(
            "attn_implementation", name, f"is no attention that transformers has{meant_key(name, plain) or among(plain)}"
        )


# ---- The optimizer ----


def optimizer_problems(values: SimpleNamespace) -> Iterable[Problem]:
    name = text(values.optim)
    if values.optim_target_modules and not name.startswith(LOW_RANK):
        advice = f"is read by galore and apollo alone, and optim is {name}; remove it"
        yield Problem("optim_target_modules", values.optim_target_modules, advice)
    try:
        make_optimizer(values)
    except REFUSALS as error:
        if name.startswith(LOW_RANK) and not isinstance(error, ImportError):
            return
        key = "optim_args" if values.optim_args and is_possible(values, optim_args=None) else "optim"
        # transformers also says so in a ValueError.
        is_local = isinstance(error, ImportError) or "not installed" in str(error) or "pip install" in str(error)
        usage = "; expected name=value, several with commas" if "unpack" in str(error) else ""
        yield Problem(key, text(getattr(values, key)), f"cannot be used: {one_line(error)}{usage}", is_local)
        return
    ignored = [entry for entry in (values.optim_args or "").replace(" ", "").split(",") if entry and is_ignored(entry, values)]
    if ignored:
        advice = f"{name} ignores {', '.join(ignored)}; remove it, or say it by another key (adam_beta1, weight_decay, ...)"
        yield Problem("optim_args", values.optim_args, advice)


def make_optimizer(values: SimpleNamespace) -> torch.optim.Optimizer:
    kind, settings = optimizer_settings(values)
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "weight_decay": values.weight_decay}]
    return kind(parameters, **settings)


def optimizer_settings(values: SimpleNamespace, **changes: Any) -> tuple[Any, dict[str, Any]]:
    args = SimpleNamespace(**vars(values) | {"optim": OptimizerNames(text(values.optim))} | changes)
    return Trainer.get_optimizer_cls_and_kwargs(args)


def is_possible(values: SimpleNamespace, **changes: Any) -> bool:
    try:
        make_optimizer(SimpleNamespace(**vars(values) | changes))
    except REFUSALS:
        return False
    return True


def is_ignored(entry: str, values: SimpleNamespace) -> bool:
    """Whether the optimizer is the same with this entry of optim_args, without it, and with another value in it."""
    key = entry.partition("=")[0]
    rest = [other for other in values.optim_args.replace(" ", "").split(",") if other != entry]
    others = [",".join(rest), ",".join([*rest, f"{key}=0.123"])]
    try:
        return all(optimizer_settings(values) == optimizer_settings(values, optim_args=other or None) for other in others)
    except REFUSALS:
        return False  # it is read, since its value matters


# ---- The schedule ----


def schedule_problems(values: SimpleNamespace) -> Iterable[Problem]:
    name = text(values.lr_scheduler_type)
    key = "lr_scheduler_kwargs" if values.lr_scheduler_kwargs else "lr_scheduler_type"
    value = text(getattr(values, key))
    if name in ("constant", "constant_with_warmup") and values.lr_scheduler_kwargs:
        yield Problem(key, value, f"lr_scheduler_type {name} has none; remove them")
        return
    numbers = {entry: number for entry, number in (values.lr_scheduler_kwargs or {}).items() if isinstance(number, int | float)}
    if wrong := [entry for entry, number in numbers.items() if not (math.isfinite(number) and number >= 0)]:
        yield Problem(key, value, f"{wrong[0]} must be finite and not negative")
        return
    steps = values.max_steps if values.max_steps > 0 else STEPS
    warmup = values.warmup_steps if values.warmup_steps >= 1 else math.ceil(steps * values.warmup_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=values.learning_rate)
    try:
        schedule = get_scheduler(
            name,
            optimizer=optimizer,
            num_warmup_steps=int(warmup),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(values.lr_scheduler_kwargs or {}),
        )
        places = (0, 1, int(warmup), steps // 2, steps - 1, steps)
        factors = [factor(place) for factor in getattr(schedule, "lr_lambdas", ()) for place in places]
        if not all(math.isfinite(factor) and 0 <= factor <= 1 + 1e-6 for factor in factors):
            raise ValueError(f"its learning rates are not all between 0 and learning_rate = {values.learning_rate:g}")
    except REFUSALS as error:
        yield Problem(key, value, f"lr_scheduler_type {name} cannot be used: {one_line(error)}")


# ---- Recomputation ----


def recomputation_problems(values: SimpleNamespace) -> Iterable[Problem]:
    key, kwargs = "activation_checkpointing_kwargs", values.activation_checkpointing_kwargs
    if not isinstance(kwargs, dict) or kwargs.keys() - set(CHECKPOINTING):
        return  # complained about elsewhere
    switches = [name for name, value in kwargs.items() if name != "determinism_check" and not isinstance(value, bool)]
    if switches:
        yield Problem(key, kwargs, f"{switches[0]} must be true or false")
        return
    try:
        checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **kwargs)
    except REFUSALS as error:
        yield Problem(key, kwargs, f"cannot be used: {one_line(error)}")


# ---- Names ----

# What from_pretrained takes beside the fields of the model's config.
LOADING = (
    "adapter_kwargs", "adapter_name", "allow_all_kernels", "attn_implementation", "cache_dir", "code_revision", "config",
    "device_map", "device_mesh", "distributed_config", "dtype", "experts_implementation", "force_download", "generation_config",
    "gguf_file", "ignore_mismatched_sizes", "kernel_config", "key_mapping", "local_files_only", "low_cpu_mem_usage",
    "max_memory", "offload_buffers", "offload_folder", "output_loading_info", "proxies", "quantization_config", "revision",
    "state_dict", "subfolder", "token", "torch_dtype", "tp_plan", "tp_size", "trust_remote_code", "use_kernels",
    "use_safetensors", "variant", "weights_only",
)  # fmt: skip


def loading_problems(kwargs: Any, config: PreTrainedConfig) -> list[Problem]:
    """Of model_init_kwargs: what neither from_pretrained nor this model's config knows."""
    known = [*LOADING, *config.to_dict()]
    dtype = kwargs.get("dtype") if isinstance(kwargs, dict) else None
    if dtype is not None and dtype not in DTYPES:
        return [Problem("model_init_kwargs", kwargs, f"dtype must be one of {', '.join(DTYPES)}")]
    unknown = [key for key in (kwargs if isinstance(kwargs, dict) else {}) if key not in known and not hasattr(config, key)]
    return [
        Problem("model_init_kwargs", kwargs, f"{key} is no setting of this model{meant_key(key, known)}") for key in unknown
    ]


def meant_key(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""


def metric_problem(metric: str | None, known: Iterable[str], prefixes: Iterable[str] = ()) -> Problem | None:
    """Of metric_for_best_model. prefixes: the names of several evaluation sets, whose figures bear them."""
    names = [*known, *SPEED]
    names = [f"{prefix}_{name}" for prefix in prefixes for name in names] or names
    if metric is None or metric.removeprefix("eval_") in names:
        return None
    return Problem("metric_for_best_model", metric, f"no evaluation gives that figure{meant(metric, names)}")


def meant(word: str, names: list[str]) -> str:
    close = difflib.get_close_matches(word.removeprefix("eval_"), names, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else among(names)


def among(names: list[str]) -> str:
    return f"; choose one of {', '.join(names)}"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
