"""The model without its weights: what its architecture alone says about a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UserError, reason_of
from ..model.adapters import continues, lora_config
from ..model.loading import FLASH_PACKAGES, find_adapter, parameter_dtype
from ..model.shared_prompt import why_not
from ..model.text_part import freeze_other_parts, outside_text
from ..model.vocabulary import highest_id, refuse_unknown_ids
from ..recipe.configs import ModelArguments, RunArguments


@dataclass(frozen=True)
class Skeleton:
    """Parameters without data. trained: elements of those that get a gradient."""

    model: nn.Module
    config: PreTrainedConfig
    dtype: torch.dtype
    attention: str
    parameters: int
    trained: int
    why_padded: str | None  # None: its pairs can be packed


def skeleton_of(model_args: ModelArguments, args: RunArguments, config: PreTrainedConfig) -> Skeleton:
    """The policy on the meta device, its adapter included. Raises UserError for one that cannot be made."""
    wanted = (args.model_init_kwargs or {}).get("attn_implementation", model_args.attn_implementation)
    attention = "sdpa" if wanted in FLASH_PACKAGES else wanted  # alike in what they hold in memory
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=model_args.trust_remote_code
            )
            reason, used = padded_because(model, args), model.config.get_text_config()._attn_implementation
            count = sum(parameter.numel() for parameter in model.parameters())
            freeze_other_parts(model)  # as the trainer does
            if (adapter := adapter_config(model_args, config)) is not None:
                adapter.exclude_modules = adapter.exclude_modules or outside_text(model)
                model = get_peft_model(model, adapter)
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(
            f"model_name_or_path = {model_args.model_name_or_path!r}: cannot be made ({reason_of(error)})"
        ) from error
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Skeleton(model, config, dtype_of(model_args, args, config), used, count, trained, reason)


def adapter_config(model_args: ModelArguments, config: PreTrainedConfig) -> LoraConfig | None:
    """Of the adapter that is trained: a new one, or the one that is trained on."""
    old = find_adapter(model_args)
    return old.config if old is not None and continues(model_args, config) else lora_config(model_args, config)


def padded_because(model: nn.Module, args: RunArguments) -> str | None:
    """Raises UserError if packed batches are asked for and impossible."""
    if not hasattr(args, "pair_layout"):  # supervised tuning
        return None
    layout = args.pair_layout
    reason = "pair_layout is padded" if layout == "padded" else why_not(model)
    if reason is not None and layout == "packed":
        raise UserError(f"pair_layout = packed: not possible with this model, because {reason}; use auto or padded")
    return reason


def dtype_of(model_args: ModelArguments, args: RunArguments, config: PreTrainedConfig) -> torch.dtype:
    """Of the parameters as they are trained."""
    name = (args.model_init_kwargs or {}).get("dtype", parameter_dtype(model_args.torch_dtype))
    if name == "auto":
        name = config.get_text_config().dtype or config.dtype or torch.float32
    return name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."))


def refuse_ids(skeleton: Skeleton, tokenizer: PreTrainedTokenizerBase, splits: Sequence[Dataset]) -> None:
    """Raises UserError for a token that the model has no vector for."""
    columns = [(data, [name for name in data.column_names if name.endswith("input_ids")]) for data in splits]
    refuse_unknown_ids(skeleton.model, tokenizer, max(highest_id(data, names) for data, names in columns))
