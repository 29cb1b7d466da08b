"""Keys that are given and that nothing reads in this run, because of what another key says: a line for each."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

from ..errors import Problem
from .parser import H4ArgumentParser, default_of
from .values import text


class Need(NamedTuple):
    """When a key is read, and how that is said where it is not."""

    is_met: Callable[[SimpleNamespace], bool]
    otherwise: str


def wants_best(values: SimpleNamespace) -> bool:
    by_metric = text(values.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy") or text(values.save_strategy) == "best"
    return values.load_best_model_at_end or values.early_stopping_patience is not None or by_metric


ADAPTER = Need(lambda values: values.use_peft, "use_peft is false")
FOUR_BITS = Need(lambda values: values.load_in_4bit, "load_in_4bit is false")
HUB = Need(lambda values: values.push_to_hub, "push_to_hub is false")
REPLIES = Need(lambda values: values.sample_prompts is not None, "there are no sample_prompts")
BEST = Need(wants_best, "nothing asks for the best: load_best_model_at_end, early_stopping_patience, save_strategy: best")
RECOMPUTED = Need(lambda values: values.activation_checkpointing, "gradient_checkpointing is false")
NEEDS: dict[str, Need] = {
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"), ADAPTER),
    **dict.fromkeys(("bnb_4bit_quant_type", "bnb_4bit_quant_storage"), FOUR_BITS),
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "hub_minutes"), HUB
    ),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), BEST),
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), RECOMPUTED),
    **dict.fromkeys(("sample_max_new_tokens", "sample_temperature"), REPLIES),
    "model_code_revision": Need(lambda values: values.trust_remote_code, "trust_remote_code is false"),
    "early_stopping_threshold": Need(lambda values: values.early_stopping_patience is not None, "no early_stopping_patience"),
    "liger_kernel_config": Need(lambda values: values.use_liger_kernel, "use_liger_kernel is false"),
    "eval_steps": Need(
        lambda values: text(values.eval_strategy) == "steps" or values.do_eval is False, "eval_strategy is not steps"
    ),
    "eval_delay": Need(
        lambda values: text(values.eval_strategy) != "no" or values.do_eval is False, "eval_strategy is no"
    ),
    "bad_rows": Need(lambda values: values.preprocessing == "exact", "preprocessing is published, which keeps what it can"),
    "gradient_accumulation_steps": Need(
        lambda values: values.total_train_batch_size is None, "total_train_batch_size decides how many there are"
    ),
    "num_train_epochs": Need(lambda values: values.max_steps <= 0, "max_steps decides how long the run is"),
}  # fmt: skip


def idle_keys(parser: H4ArgumentParser) -> list[str]:
    """A line for each key that was given, is not at its default, and has no effect. After the parser's parse()."""
    values = parser.values(parser.settings)
    given = {key: value for key, value in parser.recipe.items() if key in NEEDS and value is not None}
    changed = {key: value for key, value in given.items() if value != default_of(parser.targets[key].field)}
    return parser.placed(
        Problem(key, value, f"has no effect, because {NEEDS[key].otherwise}")
        for key, value in changed.items()
        if not NEEDS[key].is_met(values)
    )
