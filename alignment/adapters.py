"""LoRA adapters and quantised bases: what is trained, on which base, and what cannot work."""

import hashlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_DEFAULTS
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file
from trl.trainer.utils import global_then_local_main_first

from .configs import ModelArguments
from .errors import UserError
from .models import Adapter, Source, check_model_path, find_adapter, first_line, load_policy, parameter_dtype, pinned, sharding

logger = logging.getLogger(__name__)

MERGED_BASE = "base"  # in the run folder: the model that an SFT adapter was merged into, and that a new adapter belongs to
MERGED_FROM = "merged_from.json"
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_out", "embed_in", "word_embeddings")
KNOWN_LAYERS = (nn.Linear, nn.Embedding, Conv1D)  # what a recipe may name


# ---- A new adapter ----


def lora_config(model_args: ModelArguments, config: PreTrainedConfig | None = None) -> LoraConfig | None:
    """The adapter that a recipe describes, or None. config: the base's, which says whether head and embeddings are one."""
    if not model_args.use_peft:
        return None
    targets, whole = model_args.lora_target_modules, model_args.lora_modules_to_save
    tied = config is not None and config.get_text_config().tie_word_embeddings
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=whole,
        # Otherwise peft trains two copies of a matrix that is one in the model.
        ensure_weight_tying=tied and any(name in EMBEDDINGS for name in whole or ()),
        bias="none",
    )


def prepare_base(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """A frozen base, quantised or not, ready for an adapter and for gradient checkpointing."""
    if getattr(model, "is_quantized", False):
        keep_4bit_layout(model)
        return prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs or {"use_reentrant": False},
        )
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def add_adapter(model: PreTrainedModel, config: LoraConfig, args: TrainingArguments) -> PeftModel:
    """A new adapter on a frozen base. Raises UserError if peft cannot add it, to layers that the model lacks for one."""
    if isinstance(model, PeftModel):
        raise UserError("the model has an adapter already; give either that or peft_config, or merge it first")
    try:
        return get_peft_model(prepare_base(model, args), config)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft cannot add this adapter to {model.name_or_path!r}: {first_line(error)}") from error


def keep_4bit_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with AVX512-BF16.

    The repacked layout has no backward: training that goes on after an evaluation would lose the gradient through every
    quantised layer, silently.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


# ---- An adapter to begin with ----


def starting_point(
    model_args: ModelArguments, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[str | PeftModel, LoraConfig | None]:
    """What a trainer is given: a model's name or folder, or an adapter on its base, to train on; and the new adapter to add.

    args.model_init_kwargs: how models are loaded.
    """
    config, adapter = check_model_path(model_args), find_adapter(model_args)
    new_adapter = lora_config(model_args, config)
    if adapter is None:
        return model_args.model_name_or_path, new_adapter
    name, base = adapter.source.name, adapter.base.name
    if continues(model_args, config):
        size = f"rank {adapter.config.r}, alpha {adapter.config.lora_alpha}"
        logger.info("%s is a LoRA adapter of %s (%s): neither merged nor stacked, it is itself trained on.", name, base, size)
        model = prepare_base(load_base(adapter, tokenizer, **(args.model_init_kwargs or {})), args)
        return PeftModel.from_pretrained(model, name, revision=adapter.source.revision, is_trainable=True), None
    folder = merged_base_folder(args)
    trained = f"a new adapter of the merged model, which is kept in {folder}," if new_adapter else "the whole merged model"
    logger.info("%s is a LoRA adapter: it is merged into its base %s, and %s is trained.", name, base, trained)
    with global_then_local_main_first():
        merge(adapter, folder, model_args, tokenizer)
    return str(folder), new_adapter


def continues(model_args: ModelArguments, config: PreTrainedConfig) -> bool:
    """Whether the SFT adapter itself is trained on, by the recipe or by the base: 4 or 8 bits cannot hold a merged sum."""
    if model_args.sft_adapter is not None:
        return model_args.sft_adapter == "continue"
    return model_args.use_peft and (model_args.load_in_4bit or model_args.load_in_8bit or quantised_by(config) is not None)


def load_base(adapter: Adapter, tokenizer: PreTrainedTokenizerBase, **init_kwargs: Any) -> PreTrainedModel:
    """The model below an adapter, with room for the tokens that the adapter's tokenizer adds."""
    model = load_policy(adapter.base.name, **{**init_kwargs, "revision": adapter.base.revision})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


def merged_base_folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir).resolve() / MERGED_BASE


def merge(adapter: Adapter, folder: Path, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write base + adapter into `folder`, in the precision that is trained, unless it is there already.

    On disk rather than in memory: a new adapter can then name the model that it belongs to, and every strategy loads it in
    its own way.
    """
    facts = merge_facts(adapter, parameter_dtype(model_args.torch_dtype))
    record = folder / MERGED_FROM
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == facts:
        return
    if folder.exists() and not record.is_file():
        raise UserError(f"{folder}: is in the way of the merged model; choose another output_dir, or move it")
    staged = folder.with_name(f".{folder.name}")
    for outdated in (staged, folder):
        if outdated.exists():
            shutil.rmtree(outdated)
    with whole_models():
        base = load_base(adapter, tokenizer, dtype=facts["dtype"], trust_remote_code=model_args.trust_remote_code)
        model = PeftModel.from_pretrained(base, adapter.source.name, revision=adapter.source.revision)
        model.merge_and_unload().save_pretrained(staged)
    (staged / MERGED_FROM).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    staged.rename(folder)


def merge_facts(adapter: Adapter, dtype: str) -> dict[str, Any]:
    """What a merged model is made of, in values that JSON knows; a change in any of them makes another model."""
    base_files = Path(adapter.base.name).glob("*.safetensors")  # none for a name on the Hub
    return {
        "adapter": list(adapter.source),
        "adapter_sha256": hashlib.sha256(adapter_weights(adapter).read_bytes()).hexdigest(),
        "base": list(adapter.base),
        "base_files": sorted([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in base_files),
        "dtype": dtype,
    }


def adapter_weights(adapter: Adapter) -> Path:
    """Its safetensors file. Raises UserError if there is none."""
    path = cached_file(
        adapter.source.name,
        ADAPTER_SAFE_WEIGHTS_NAME,
        revision=adapter.source.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    if path is None:
        raise UserError(
            f"model_name_or_path = {adapter.source.name!r}: is a LoRA adapter without {ADAPTER_SAFE_WEIGHTS_NAME}; save it as "
            "safetensors (load it with peft, then save_pretrained)"
        )
    return Path(path)


@contextmanager
def whole_models() -> Iterator[None]:
    """Inside, models are loaded whole, also by one process of a launch under ZeRO-3."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None:
            hf_deepspeed.set_hf_deepspeed_config(reference())


# ---- What the run folder says ----


def settle_adapter(trainer: Trainer, model_args: ModelArguments) -> None:
    """When every process has its model: name the base in what will be saved, and drop a merged model that nothing names."""
    adapter, model = find_adapter(model_args), trainer.model
    keep_4bit_layout(model)
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        config.base_model_name_or_path, config.revision = trained_base(model_args, trainer.args)
    trainer.base_model_name = model_args.model_name_or_path  # for the card
    if adapter is not None and not model_args.use_peft:
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            shutil.rmtree(merged_base_folder(trainer.args))


def trained_base(model_args: ModelArguments, args: TrainingArguments) -> Source:
    """The model that the trained adapter belongs to."""
    adapter = find_adapter(model_args)
    if adapter is None:
        return pinned(Source(model_args.model_name_or_path, model_args.model_revision))
    if continues(model_args, check_model_path(model_args)):
        return pinned(adapter.base)
    return pinned(Source(str(merged_base_folder(args)), None))


def provenance(model_args: ModelArguments) -> dict[str, Any]:
    """For environment.json: the model that training began with and, where it came from an adapter, that and its base."""
    adapter = find_adapter(model_args)
    if adapter is None:
        return {"model": pinned(Source(model_args.model_name_or_path, model_args.model_revision))._asdict()}
    use = "continued" if continues(model_args, check_model_path(model_args)) else "merged"
    return {"model": pinned(adapter.base)._asdict(), "sft_adapter": {**adapter.source._asdict(), "use": use}}


# ---- What cannot work, before anything is loaded ----


def check_adapters(model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig) -> None:
    """Raises UserError, with every reason at once, for adapters and quantisation that the libraries cannot train here.

    config: of the model, or of the adapter's base.
    """
    adapter = find_adapter(model_args)
    complaints = [
        *quantisation_complaints(model_args, args, config),
        *sharding_complaints(model_args, args, config),
        *start_complaints(model_args, args, config, adapter),
    ]
    new_adapter = model_args.use_peft and not (adapter is not None and continues(model_args, config))
    # Under ZeRO-3 building a model is a collective; there the layers are checked when it is loaded.
    if new_adapter and sharding() != "ZeRO-3":
        complaints += layer_complaints(model_args, config)
    if complaints:
        raise UserError("\n".join(complaints))


def quantised_by(config: PreTrainedConfig) -> str | None:
    """How a checkpoint's own weights are quantised, by its config.json: bitsandbytes, gptq, awq, ...; None if they are not."""
    own = own_quantisation(config)
    return str(own.get("quant_method", "bitsandbytes")) if own else None


def own_quantisation(config: PreTrainedConfig) -> dict[str, Any]:
    own = getattr(config, "quantization_config", None) or {}
    return own if isinstance(own, dict) else own.to_dict()


def bits_of(model_args: ModelArguments, config: PreTrainedConfig) -> int | None:
    """8 or 4 under bitsandbytes, by the recipe or by the checkpoint."""
    own = own_quantisation(config) if quantised_by(config) == "bitsandbytes" else {}
    if model_args.load_in_8bit or own.get("load_in_8bit"):
        return 8
    return 4 if model_args.load_in_4bit or own.get("load_in_4bit") else None


def quantisation_complaints(model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig) -> Iterator[str]:
    own, bits = quantised_by(config), bits_of(model_args, config)
    place = f"model_name_or_path = {model_args.model_name_or_path!r}"
    if own and not model_args.use_peft:
        yield (
            f"{place}: its weights are quantised ({own}), and quantised weights cannot be trained; add use_peft: true to "
            "train an adapter on them, or name the unquantised model"
        )
    key = "load_in_8bit" if model_args.load_in_8bit else "load_in_4bit"
    asked = model_args.load_in_8bit or model_args.load_in_4bit
    if asked and own and not (own == "bitsandbytes" and own_quantisation(config).get(key)):
        yield f"{key} = True: the weights of {model_args.model_name_or_path!r} are quantised already ({own}); remove {key}"
    if bits and importlib.util.find_spec("bitsandbytes") is None:
        yield f"{f'{key} = True' if asked else place}: needs the package bitsandbytes; run `pip install bitsandbytes`"
    if bits == 8 and model_args.use_dora and args.device.type == "cpu":
        yield (
            "use_dora = True: reading 8-bit weights, as DoRA does, loses their scales on a CPU (peft and bitsandbytes); use "
            "load_in_4bit, or LoRA"
        )


def sharding_complaints(model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig) -> Iterator[str]:
    """What the libraries do under each strategy was tried on two processes; what is not named here works."""
    strategy, bits = sharding(), bits_of(model_args, config)
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
