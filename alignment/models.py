"""The tokenizer and the policy: where they come from, in which precision, with which adapter, without dropout."""

import importlib.util
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .configs import DataArguments, ModelArguments
from .errors import UserError


def load_tokenizer(model_args: ModelArguments, data_args: DataArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one that the recipe names; padding falls back on eos, as published."""
    path = model_args.tokenizer_name_or_path or model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "trust_remote_code": model_args.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(unloadable("tokenizer", path, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if data_args.truncation_side is not None:
        tokenizer.truncation_side = data_args.truncation_side
    return tokenizer


def unloadable(what: str, path: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"model_name_or_path = {path!r}: its {what} cannot be loaded ({reason}). Give a folder written by "
        "save_pretrained, or a Hub name; a gated model needs `hf auth login`, one with its own code trust_remote_code."
    )


def check_attention(attn_implementation: str | None, *, use_cpu: bool) -> None:
    """Raises UserError if the attention kernel cannot run here, before anything is loaded."""
    if attn_implementation not in ("flash_attention_2", "flash_attention_3"):
        return
    where = f"attn_implementation = {attn_implementation}"
    if use_cpu or not torch.cuda.is_available():
        raise UserError(f"{where}: needs a GPU and there is none in use; set attn_implementation: sdpa")
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[attn_implementation]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{where}: the package {package} is not installed; run `pip install flash-attn --no-build-isolation`, or set "
            "attn_implementation: sdpa"
        )


def parameter_dtype(torch_dtype: str | None) -> str:
    """The precision that parameters are loaded in, by the published rule: null is float32.

    Today's from_pretrained reads null as "the checkpoint's", bf16 for most models, in which AdamW steps round to nothing.
    """
    return "float32" if torch_dtype is None else torch_dtype


def model_init_kwargs(model_args: ModelArguments, training_args: TrainingArguments) -> dict[str, Any]:
    """Arguments of from_pretrained, in values that JSON knows."""
    kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
        "dtype": parameter_dtype(model_args.torch_dtype),
        "attn_implementation": model_args.attn_implementation,
        "code_revision": model_args.model_code_revision,
        "quantization_config": quantization(model_args, training_args),
    }
    return {key: value for key, value in kwargs.items() if value is not None}


def quantization(model_args: ModelArguments, training_args: TrainingArguments) -> dict[str, Any] | None:
    """bitsandbytes settings; 4-bit weights compute in bf16 where the run does."""
    if model_args.load_in_8bit:
        return {"quant_method": "bitsandbytes", "load_in_8bit": True}
    if not model_args.load_in_4bit:
        return None
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": "bfloat16" if training_args.bf16 else "float32",
        "bnb_4bit_quant_type": model_args.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": model_args.use_bnb_nested_quant,
        "bnb_4bit_quant_storage": model_args.bnb_4bit_quant_storage,
    }


def check_model_path(model_args: ModelArguments) -> None:
    """Raises UserError if there is no model configuration at the path: a small file, read before any data is."""
    path = model_args.model_name_or_path
    try:
        AutoConfig.from_pretrained(path, revision=model_args.model_revision, trust_remote_code=model_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(unloadable("configuration", path, error)) from error


def load_policy(path: str, **init_kwargs: Any) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(path, **init_kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(unloadable("weights", path, error)) from error


def lora_config(model_args: ModelArguments) -> LoraConfig | None:
    if not model_args.use_peft:
        return None
    targets = model_args.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=model_args.lora_modules_to_save,
        bias="none",
    )


def add_adapter(model: PreTrainedModel, config: LoraConfig, args: TrainingArguments) -> PeftModel:
    """A LoRA adapter on a frozen base, quantised or not, ready for gradient checkpointing."""
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs or {"use_reentrant": False},
        )
    elif args.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, config)


def disable_dropout(model: nn.Module) -> list[str]:
    """Set every dropout of the model to 0: modules, and the numbers that attention reads at run time.

    Returns what was on, as `name = rate`, for the log. After LoRA, so that lora_dropout is off too.
    """
    switched_off = {}
    owners = [(name, module) for name, module in model.named_modules()]
    configs = {id(module.config): module.config for _, module in owners if hasattr(module, "config")}
    for name, owner in [*owners, *(("config", config) for config in configs.values())]:
        if isinstance(owner, nn.modules.dropout._DropoutNd) and owner.p > 0:
            switched_off[name] = owner.p
            owner.p = 0.0
        for key, value in vars(owner).items():
            if is_dropout_rate(key, value):
                switched_off[f"{name}.{key}"] = value
                setattr(owner, key, 0.0)
    return [f"{name} = {rate}" for name, rate in switched_off.items()]


def is_dropout_rate(key: str, value: Any) -> bool:
    named_so = "dropout" in key or key.endswith(("pdrop", "layerdrop"))
    return named_so and isinstance(value, float) and value > 0
