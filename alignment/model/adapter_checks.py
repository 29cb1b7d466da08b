"""Adapters and quantisation that cannot work, refused before anything is loaded."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_DEFAULTS
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, TrainingArguments
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..recipe.configs import ModelArguments
from .adapters import EMBEDDINGS, adapter_weights, continues, own_quantisation, quantised_by, tied_target
from .loading import SHARDED, Adapter, find_adapter, sharding

HEADS = ("lm_head", "embed_out")
KNOWN_LAYERS = (nn.Linear, nn.Embedding, Conv1D)  # what a recipe may name


def check_adapters(
    model_args: ModelArguments,
    args: TrainingArguments,
    config: PreTrainedConfig,
    *,
    elsewhere: str | None = None,
) -> None:
    """Raises UserError, with every reason at once, for adapters and quantisation that the libraries cannot train here.

    config: of the model, or of the adapter's base. elsewhere: the strategy of a run on another machine, whatever this one
    lacks (`local_complaints`); None: the run is this launch.
    """
    adapter = find_adapter(model_args)
    complaints = [
        *(() if elsewhere else local_complaints(model_args, args, config)),
        *quantisation_complaints(model_args, config),
        *sharding_complaints(model_args, args, config, SHARDED.get(elsewhere) if elsewhere else sharding()),
        *start_complaints(model_args, args, config, adapter),
    ]
    new_adapter = model_args.use_peft and not (adapter is not None and continues(model_args, config))
    # Under ZeRO-3 building a model is a collective; there the layers are checked when it is loaded.
    if new_adapter and sharding() != "ZeRO-3":
        complaints += layer_complaints(model_args, config)
    if complaints:
        raise UserError("\n".join(complaints))


def bits_of(model_args: ModelArguments, config: PreTrainedConfig) -> int | None:
    """8 or 4 under bitsandbytes, by the recipe or by the checkpoint."""
    own = own_quantisation(config) if quantised_by(config) == "bitsandbytes" else {}
    if model_args.load_in_8bit or own.get("load_in_8bit"):
        return 8
    return 4 if model_args.load_in_4bit or own.get("load_in_4bit") else None


def asked_quantisation(model_args: ModelArguments) -> str | None:
    """The key by which the recipe quantises."""
    return next((key for key in ("load_in_8bit", "load_in_4bit") if getattr(model_args, key)), None)


def local_complaints(model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig) -> Iterator[str]:
    """What another machine may be able to do."""
    bits, key = bits_of(model_args, config), asked_quantisation(model_args)
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        place = f"{key} = True" if key else f"model_name_or_path = {model_args.model_name_or_path!r}"
        yield f"{place}: needs the package bitsandbytes; run `pip install bitsandbytes`"
    if bits == 8 and model_args.use_dora and args.device.type == "cpu":
        yield (
            "use_dora = True: reading 8-bit weights, as DoRA does, loses their scales on a CPU (peft and bitsandbytes); use "
            "load_in_4bit, or LoRA"
        )


def quantisation_complaints(model_args: ModelArguments, config: PreTrainedConfig) -> Iterator[str]:
    own, key = quantised_by(config), asked_quantisation(model_args)
    if own and not model_args.use_peft:
        yield (
            f"model_name_or_path = {model_args.model_name_or_path!r}: its weights are quantised ({own}), and quantised weights "
            "cannot be trained; add use_peft: true to train an adapter on them, or name the unquantised model"
        )
    if key and own and not (own == "bitsandbytes" and own_quantisation(config).get(key)):
        yield f"{key} = True: the weights of {model_args.model_name_or_path!r} are quantised already ({own}); remove {key}"


def sharding_complaints(
    model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig, strategy: str | None
) -> Iterator[str]:
    """What the libraries do under each strategy was tried on two processes; what is not named here works."""
    bits = bits_of(model_args, config)
    fsdp = strategy is not None and strategy.startswith("FSDP")
    if fsdp and bits == 8:
        yield (
            f"load_in_8bit = True: {strategy} cannot shard integer weights; use load_in_4bit with a floating "
            "bnb_4bit_quant_storage, or launch with accelerate_configs/multi_gpu.yaml or deepspeed_zero3.yaml"
        )
    if strategy is not None and bits == 4:
        own = own_quantisation(config)
        storage = str(own.get("bnb_4bit_quant_storage", model_args.bnb_4bit_quant_storage)).removeprefix("torch.")
        computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
        if strategy == "FSDP 1" and storage != "float32":
            yield (
                f"bnb_4bit_quant_storage = {storage!r}: FSDP 1 shards 4-bit weights together with layers that stay in "
                "float32, so they must be stored as that; set bnb_4bit_quant_storage: float32 (the same bits), or use FSDP 2"
            )
        if strategy != "FSDP 1" and computed and storage not in ("uint8", computed):
            whole = ", which each process then keeps whole" if fsdp else ""
            yield (
                f"bnb_4bit_quant_storage = {storage!r}: {strategy} casts floating weights to {computed}, which this run "
                f"computes in, and a cast destroys packed 4-bit weights; set bnb_4bit_quant_storage: {computed} or "
                f"uint8{whole}"
            )
    if model_args.use_dora and strategy == "FSDP 1":
        yield "use_dora = True: DoRA needs whole weight matrices, and FSDP 1 keeps flat pieces of them; use FSDP 2 or ZeRO-3"
    if model_args.use_dora and bits and strategy == "ZeRO-3":
        yield (
            f"use_dora = True: DoRA copies each {bits}-bit layer to read it, and ZeRO-3 loses track of the copy; use FSDP 2 "
            "(4 bits), accelerate_configs/multi_gpu.yaml, or LoRA"
        )

    # Each gathers the adapter's two matrices anew for each chunk of the head, of which processes have different numbers.
    if strategy in ("FSDP 1", "ZeRO-3") and (adapted := adapted_head(model_args, config)):
        yield (
            f"lora_target_modules: an adapter on {adapted} cannot be trained under {strategy}, whose processes would wait for "
            f"one another's pieces of it; use FSDP 2, or lora_modules_to_save: [{adapted}], which trains it whole"
        )


def adapted_head(model_args: ModelArguments, config: PreTrainedConfig) -> str | None:
    """The output layer, where the adapter that will be trained is on it; `all-linear` leaves it out."""
    if not model_args.use_peft:
        return None
    adapter = find_adapter(model_args) if continues(model_args, config) else None
    targets = adapter.config.target_modules if adapter is not None else model_args.lora_target_modules
    return next((name for target in targets or () if (name := target.rsplit(".", 1)[-1]) in HEADS), None)


def start_complaints(
    model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig, adapter: Adapter | None
) -> Iterator[str]:
    if adapter is None:
        if model_args.sft_adapter is not None:
            yield (
                f"sft_adapter = {model_args.sft_adapter!r}: {model_args.model_name_or_path!r} is a whole model, not a LoRA "
                "adapter; remove sft_adapter"
            )
        return
    weights = adapter_weights(adapter)
    if continues(model_args, config):
        yield from contradictions(model_args, adapter)
        return
    merging = f"{adapter.source.name!r} is a LoRA adapter that would be merged into {adapter.base.name!r}"
    way_out = "set use_peft: true and sft_adapter: continue to train the adapter itself"
    if quantised_by(config):
        yield f"{merging}, whose weights are quantised: the sum would be rounded to them; {way_out}"
    if config.get_text_config().tie_word_embeddings and (layer := adapted_embedding(weights)):
        yield f"{merging}, but it adapts {layer} alone, which is one matrix with its other end there; {way_out}"
    if model_args.use_peft and args.push_to_hub:
        yield (
            f"push_to_hub = True: {merging}, and the new adapter's base would be a folder of this machine; {way_out}, or set "
            "use_peft: false"
        )


def contradictions(model_args: ModelArguments, adapter: Adapter) -> Iterator[str]:
    """Settings of a new adapter in a recipe that trains on an old one."""
    defaults, old = ModelArguments(), adapter.config
    theirs = {
        "lora_r": old.r,
        "lora_alpha": old.lora_alpha,
        "lora_dropout": old.lora_dropout,
        "use_rslora": old.use_rslora,
        "use_dora": old.use_dora,
        "lora_target_modules": sorted(old.target_modules),
        "lora_modules_to_save": sorted(old.modules_to_save or []),
    }
    for key, value in theirs.items():
        given = getattr(model_args, key)
        if given != getattr(defaults, key) and (sorted(given) if isinstance(given, list) else given) != value:
            yield (
                f"{key} = {given!r}: the adapter {adapter.source.name!r} is trained on, and it has {value!r}; remove {key}, or "
                "set sft_adapter: merge for a new adapter"
            )


def adapted_embedding(weights: Path) -> str | None:
    with safe_open(weights, framework="pt") as file:
        return next((name for name in EMBEDDINGS if any(f".{name}.lora_" in key for key in file.keys())), None)  # noqa: SIM118


def layer_complaints(model_args: ModelArguments, config: PreTrainedConfig) -> Iterator[str]:
    """Names that are no layer of the model, by its skeleton: the model without weights. peft ignores those among others."""
    targets = model_args.lora_target_modules
    if problem := tied_target(targets, config):
        yield f"lora_target_modules: {problem}"
    if targets is None and config.model_type not in LORA_DEFAULTS:
        yield (
            f"lora_target_modules = None: peft knows no usual layers for the architecture {config.model_type!r}; name the "
            "layers, or set lora_target_modules: [all-linear]"
        )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code)
    layers = [name for name, _ in skeleton.named_modules()]
    named = {"lora_target_modules": targets or [], "lora_modules_to_save": model_args.lora_modules_to_save or []}
    for key, names in named.items():
        unknown = [name for name in names if name != "all-linear" and not any(f".{x}".endswith(f".{name}") for x in layers)]
        if unknown:
            known = sorted({x.split(".")[-1] for x, module in skeleton.named_modules() if isinstance(module, KNOWN_LAYERS)})
            yield f"{key} = {names!r}: the model has no layer {', '.join(unknown)}; it has {', '.join(known)}"
