"""The tokenizer and the policy: where they come from, in which precision, without dropout."""

import importlib.util
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    extract_commit_hash,
    find_adapter_config_file,
)

from ..errors import UserError, reason_of
from ..launch.launch import launcher_strategy, receives_weights
from ..recipe.configs import DataArguments, ModelArguments
from .tokenizer_files import load_as_written, unreadable_file

MERGED_BASE = "base"  # in the run folder: the model that an SFT adapter was merged into, and that a new adapter belongs to
MERGED_FROM = "merged_from.json"
# What reading a model may end in: its files, the Hub, the way to it (a proxy that needs a package, an address that is none).
HUB_ERRORS = (OSError, ValueError, ImportError, HTTPError, SafetensorError)
SHARDED = {"zero3": "ZeRO-3", "fsdp1": "FSDP 1", "fsdp2": "FSDP 2"}  # strategies that divide parameters among processes
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
# Files that make a folder a model, also with an adapter beside them.
WHOLE_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


class Source(NamedTuple):
    """A folder, or a name on the Hub with its revision."""

    name: str
    revision: str | None


class Adapter(NamedTuple):
    """A LoRA adapter that model_name_or_path names, and the model that it was trained on."""

    source: Source
    base: Source
    config: PeftConfig


def find_adapter(model_args: ModelArguments) -> Adapter | None:
    """The adapter at model_name_or_path; None where a whole model is. Raises UserError for one that cannot be trained on."""
    source = Source(model_args.model_name_or_path, model_args.model_revision)
    try:
        config_file = find_adapter_config_file(source.name, revision=source.revision)
    except HUB_ERRORS as error:
        raise UserError(unloadable("configuration", source.name, error)) from error
    if config_file is None or any(Path(source.name, weights).is_file() for weights in WHOLE_WEIGHTS):
        return None
    config = PeftConfig.from_pretrained(Path(config_file).parent)
    place = f"model_name_or_path = {source.name!r}"
    if config.peft_type != "LORA":
        raise UserError(f"{place}: is an adapter of type {config.peft_type.value}; only LoRA adapters can be used here")
    if not config.base_model_name_or_path:
        raise UserError(f"{place}: is an adapter that names no base; add base_model_name_or_path to its adapter_config.json")
    revision = model_args.base_model_revision or config.revision or "main"
    return Adapter(source, Source(base_of(Path(config_file).parent, config), revision), config)


def base_of(folder: Path, config: PeftConfig) -> str:
    """The model below the adapter in `folder`: the one beside it, where a run left it there and it was moved since."""
    beside, named = folder / MERGED_BASE, config.base_model_name_or_path
    return str(beside) if Path(named).name == MERGED_BASE and (beside / MERGED_FROM).is_file() else named


def weights_source(model_args: ModelArguments) -> Source:
    """Where the weights below all adapters lie."""
    adapter = find_adapter(model_args)
    return Source(model_args.model_name_or_path, model_args.model_revision) if adapter is None else adapter.base


def pinned(source: Source, file: str = CONFIG_NAME) -> Source:
    """The same model, wherever and whenever it is read: a folder's whole path, or a Hub name with its commit.

    file: one that it has; an adapter has no config.json.
    """
    if Path(source.name).is_dir():
        return Source(str(Path(source.name).resolve()), None)
    commit = extract_commit_hash(cached_file(source.name, file, revision=source.revision), None)
    return Source(source.name, commit or source.revision)


def load_tokenizer(model_args: ModelArguments, data_args: DataArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one that the recipe names; padding falls back on eos, as published.

    An adapter's is its own, or its base's where it has none.
    """
    path, revision = model_args.tokenizer_name_or_path or model_args.model_name_or_path, model_args.model_revision
    if model_args.tokenizer_name_or_path is None and (adapter := find_adapter(model_args)) is not None:
        own = cached_file(path, TOKENIZER_CONFIG_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
        path, revision = (path, revision) if own else adapter.base
    try:
        tokenizer = load_as_written(path, revision, trust_remote_code=model_args.trust_remote_code)
    except (*HUB_ERRORS, KeyError, TypeError, AttributeError) as error:
        key = "model_name_or_path" if model_args.tokenizer_name_or_path is None else "tokenizer_name_or_path"
        raise UserError(unloadable("tokenizer", path, error, key)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if data_args.truncation_side is not None:
        tokenizer.truncation_side = data_args.truncation_side
    return tokenizer


def unloadable(what: str, path: str, error: Exception, key: str = "model_name_or_path") -> str:
    nowhere = "there is no folder of this name, and no name on the Hub is like it" if is_nowhere(path) else None
    return (
        f"{key} = {path!r}: its {what} cannot be loaded ({nowhere or reason_of(error)}). Give a folder written by "
        "save_pretrained, or a Hub name; a gated model needs `hf auth login`, one with its own code trust_remote_code."
    )


def is_nowhere(path: str) -> bool:
    """Neither a folder nor what could be a name on the Hub, which is all that the Hub's client would say of it."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return not Path(path).is_dir()
    return False


def check_attention(attn_implementation: str | None, *, use_cpu: bool) -> None:
    """Raises UserError if the attention kernel cannot train here, before anything is loaded."""
    where, on_cpu = f"attn_implementation = {attn_implementation}", use_cpu or not torch.cuda.is_available()
    if attn_implementation == "flex_attention" and on_cpu:
        raise UserError(f"{where}: has no backward on a CPU; set attn_implementation: eager, whose arithmetic it has")
    if attn_implementation not in FLASH_PACKAGES:
        return
    if on_cpu:
        raise UserError(f"{where}: needs a GPU and there is none in use; set attn_implementation: sdpa")
    package = FLASH_PACKAGES[attn_implementation]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{where}: the package {package} is not installed; give --attn_implementation=sdpa, which is as fast here (packed "
            "rows run torch's own flash attention), or run `pip install flash-attn --no-build-isolation`"
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
        "device_map": device_map(model_args, training_args),
    }
    return {key: value for key, value in kwargs.items() if value is not None}


def quantization(model_args: ModelArguments, training_args: TrainingArguments) -> dict[str, Any] | None:
    """bitsandbytes settings; 4-bit weights compute in bf16 where the run does. None where the checkpoint brings its own."""
    if not (model_args.load_in_8bit or model_args.load_in_4bit) or comes_quantised(check_model_path(model_args)):
        return None  # transformers takes no second ones, not even the same
    if model_args.load_in_8bit:
        return {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_compute_dtype": "bfloat16" if training_args.bf16 else "float32",
        "bnb_4bit_quant_type": model_args.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": model_args.use_bnb_nested_quant,
        "bnb_4bit_quant_storage": model_args.bnb_4bit_quant_storage,
    }


def device_map(model_args: ModelArguments, training_args: TrainingArguments) -> dict[str, str] | None:
    """Where quantised weights are loaded: each process's on its own device, unless they are sharded afterwards."""
    quantised = model_args.load_in_4bit or model_args.load_in_8bit
    return {"": str(training_args.device)} if quantised and sharding() is None else None


def sharding() -> str | None:
    """What divides the parameters among processes in this launch: ZeRO-3, FSDP 1, FSDP 2, or None."""
    if is_deepspeed_zero3_enabled():  # by the launcher, or by a recipe's own deepspeed key
        return "ZeRO-3"
    return SHARDED.get(launcher_strategy(os.environ))


def check_model_path(model_args: ModelArguments) -> PreTrainedConfig:
    """The configuration of the model, or of the adapter's base: a small file, read before any data is.

    Raises UserError if there is none.
    """
    path, revision = model_args.model_name_or_path, model_args.model_revision
    adapter = find_adapter(model_args)
    if adapter is not None:
        path, revision = adapter.base
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=model_args.trust_remote_code)
    except HUB_ERRORS as error:
        if adapter is None:
            raise UserError(unloadable("configuration", path, error)) from error
        raise UserError(
            f"model_name_or_path = {adapter.source.name!r}: is a LoRA adapter of {path!r}, which cannot be loaded "
            f"({reason_of(error)}). Put the base there, or correct base_model_name_or_path in adapter_config.json; a gated "
            "model needs `hf auth login`."
        ) from error
    refuse_other_kinds(config, path, trust_remote_code=model_args.trust_remote_code)
    for folder in dict.fromkeys((path, model_args.model_name_or_path)):
        refuse_damaged_weights(Path(folder))
    return config


def refuse_damaged_weights(folder: Path) -> None:
    """Raises UserError for a local file of weights whose header does not fit its size: half a download, a pointer of Git LFS.

    Nothing but headers is read.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"model_name_or_path = {str(folder)!r}: {unreadable_file(file, error)}") from error


def positions(model_args: ModelArguments) -> int | None:
    """How many tokens the model has positions for, prompt and response together; None where it does not say."""
    return getattr(check_model_path(model_args).get_text_config(), "max_position_embeddings", None)


def refuse_other_kinds(config: PreTrainedConfig, path: str, *, trust_remote_code: bool) -> None:
    """Raises UserError for a model that no text can be generated with by itself: one for images and text, say."""
    has_own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        raise UserError(
            f"{path!r} is a model of type {config.model_type}, which transformers has no causal language model of "
            "(AutoModelForCausalLM); give a text model, of the same family for one"
        )


def load_policy(path: str, **init_kwargs: Any) -> PreTrainedModel:
    try:
        load = unwritten_policy if can_stay_unwritten(path, init_kwargs) else AutoModelForCausalLM.from_pretrained
        model = load(path, **init_kwargs)
    except HUB_ERRORS as error:
        raise UserError(unloadable("weights", path, error)) from error
    if model._hf_peft_config_loaded:  # transformers has put the adapter into its base, where nothing would train it
        raise UserError(f"{path!r} is a LoRA adapter; load it with peft's AutoPeftModelForCausalLM and give the model")
    return model


def can_stay_unwritten(path: str, init_kwargs: dict[str, Any]) -> bool:
    """Whether this process is sent its weights by the first one, and knows their type without reading them."""
    dtype, is_quantized = init_kwargs.get("dtype", "auto"), "quantization_config" in init_kwargs
    if not receives_weights(os.environ) or dtype == "auto" or is_quantized:
        return False
    options = {key: init_kwargs[key] for key in ("revision", "trust_remote_code", "code_revision") if key in init_kwargs}
    return not comes_quantised(AutoConfig.from_pretrained(path, **options))


def comes_quantised(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint's own weights are."""
    return getattr(config, "quantization_config", None) is not None


def unwritten_policy(path: str, *, dtype: str, attn_implementation: str | None = None, **options: Any) -> PreTrainedModel:
    """The architecture, its parameters allocated and never touched, so that they take no memory until they are sharded.

    transformers 5.23 reads the whole checkpoint on every process, in spite of fsdp_cpu_ram_efficient_loading; on the meta
    device, accelerate would confuse the parameters, which it tells apart by their address.
    """
    config = AutoConfig.from_pretrained(path, **options)
    code = {key: options[key] for key in ("trust_remote_code", "code_revision") if key in options}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation, **code)
    model.tie_weights()
    return model


def disable_dropout(model: nn.Module) -> list[str]:
    """Set every dropout of the model to 0: modules, and the numbers that attention reads at run time.

    Returns what was on, for the log: `name = rate`, a * for the number of a layer, and how many such there were. After LoRA,
    so that lora_dropout is off too.
    """
    switched_off: dict[str, float] = {}
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
    alike = Counter((re.sub(r"\.\d+\.", ".*.", name), rate) for name, rate in switched_off.items())
    return [f"{name} = {rate}" + f" ({count} of them)" * (count > 1) for (name, rate), count in alike.items()]


def is_dropout_rate(key: str, value: Any) -> bool:
    named_so = "dropout" in key or key.endswith(("pdrop", "layerdrop"))
    return named_so and isinstance(value, float) and value > 0
