"""LoRA adapters and quantised bases: what is trained, and on which base."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from ..errors import UserError, reason_of
from ..launch.turns import one_process_at_a_time
from ..recipe.configs import ModelArguments
from .companions import copy_companions, files_of
from .config_files import config_as_came, weights_alone, write_configs
from .endings import stop_at
from .loading import (
    MERGED_BASE,
    MERGED_FROM,
    Adapter,
    Source,
    check_model_path,
    find_adapter,
    load_policy,
    parameter_dtype,
    pinned,
)
from .text_part import outside_text
from .tokenizer_files import save_tokenizer

logger = logging.getLogger(__name__)

MERGE_LOCK = "_run/merging.lock"
SAMPLES, SAMPLE_BYTES = 64, 2**16  # of a weights file, to tell it from another
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_out", "embed_in", "word_embeddings")


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


def tied_target(targets: Iterable[str] | str | None, config: PreTrainedConfig) -> str | None:
    """Why no new adapter belongs on these layers: one is the embedding and the head of the model at once."""
    if not config.get_text_config().tie_word_embeddings or isinstance(targets, str):
        return None
    layer = next((name for name in targets or () if name.rsplit(".", 1)[-1] in EMBEDDINGS), None)
    return layer and (
        f"an adapter on {layer}, which in this model is one matrix with the layer at its other end, would change both once it "
        f"is merged; lora_modules_to_save: [{layer}] trains them as one"
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
    if problem := tied_target(config.target_modules, model.config):
        raise UserError(f"target_modules: {problem}")
    if config.exclude_modules is None:
        config.exclude_modules = outside_text(model)
    try:
        return get_peft_model(prepare_base(model, args), config)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft cannot add this adapter to {model.name_or_path!r}: {reason_of(error)}") from error


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
    merge_once(adapter, folder, model_args, args, tokenizer)
    return str(folder), new_adapter


def continues(model_args: ModelArguments, config: PreTrainedConfig) -> bool:
    """Whether the SFT adapter itself is trained on, by the recipe or by the base: 4 or 8 bits cannot hold a merged sum."""
    if model_args.sft_adapter is not None:
        return model_args.sft_adapter == "continue"
    return model_args.use_peft and (model_args.load_in_4bit or model_args.load_in_8bit or quantised_by(config) is not None)


def quantised_by(config: PreTrainedConfig) -> str | None:
    """How a checkpoint's own weights are quantised, by its config.json: bitsandbytes, gptq, awq, ...; None if they are not."""
    own = own_quantisation(config)
    return str(own.get("quant_method", "bitsandbytes")) if own else None


def own_quantisation(config: PreTrainedConfig) -> dict[str, Any]:
    own = getattr(config, "quantization_config", None) or {}
    return own if isinstance(own, dict) else own.to_dict()


def load_base(adapter: Adapter, tokenizer: PreTrainedTokenizerBase, **init_kwargs: Any) -> PreTrainedModel:
    """The model below an adapter, with room for the tokens that the adapter's tokenizer adds."""
    model = load_policy(adapter.base.name, **{**init_kwargs, "revision": adapter.base.revision})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


def load_to_use(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """The model at model_name_or_path, or the adapter there on its base, to be read and not trained."""
    options = {
        "dtype": model_args.torch_dtype or "auto",
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": model_args.trust_remote_code,
        "code_revision": model_args.model_code_revision,
    }
    options = {key: value for key, value in options.items() if value is not None}
    check_model_path(model_args)
    adapter = find_adapter(model_args)
    if adapter is None:
        model = load_policy(model_args.model_name_or_path, revision=model_args.model_revision, **options)
    else:
        base = load_base(adapter, tokenizer, **options)
        model = PeftModel.from_pretrained(base, adapter.source.name, revision=adapter.source.revision)
    return model.eval()


def merged_base_folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir).resolve() / MERGED_BASE


def merge_once(
    adapter: Adapter,
    folder: Path,
    model_args: ModelArguments,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """`merge` in the first process, which alone can save a model; the others wait, without a collective that times out."""
    turn = one_process_at_a_time(Path(args.output_dir, MERGE_LOCK), f"merging {adapter.source.name}")
    if args.process_index == 0:
        with turn:
            PartialState().wait_for_everyone()  # the others come to the lock behind this
            merge(adapter, folder, model_args, tokenizer)
        return
    PartialState().wait_for_everyone()
    with turn:
        if not (folder / MERGED_FROM).is_file():
            raise UserError(
                f"{folder}: process 0 left no merged model here; on several machines output_dir must be a folder that all see"
            )


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
        came = config_as_came(base)
        merged = model.merge_and_unload()
        with weights_alone(merged):
            merged.save_pretrained(staged)
    stop_at(merged, tokenizer, taught=False)
    write_configs(merged, staged, came)
    save_tokenizer(tokenizer, staged)
    if (beside := files_of(adapter.base)) is not None:
        copy_companions(beside, staged)
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
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference  # to a config that may be gone, in a process of several runs


# ---- What the run folder says ----


def settle_adapter(trainer: Trainer, model_args: ModelArguments) -> None:
    """When every process has its model: name the base in what will be saved, and drop a merged model that nothing names."""
    adapter, model = find_adapter(model_args), trainer.model
    keep_4bit_layout(model)
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        base, config.revision = trained_base(model_args, trainer.args)
        config.base_model_name_or_path = as_named_from_here(base)
    trainer.base_model_name = model_args.model_name_or_path  # for the card
    if adapter is not None and not model_args.use_peft:
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            shutil.rmtree(merged_base_folder(trainer.args))


def as_named_from_here(base: str) -> str:
    """A merged base by the path that it has from where the run was started, so that a project can be moved as a whole."""
    path = Path(base)
    return str(path.relative_to(Path.cwd())) if path.name == MERGED_BASE and path.is_relative_to(Path.cwd()) else base


def trained_base(model_args: ModelArguments, args: TrainingArguments) -> Source:
    """The model that the trained adapter belongs to."""
    adapter = find_adapter(model_args)
    if adapter is None:
        return pinned(Source(model_args.model_name_or_path, model_args.model_revision))
    if continues(model_args, check_model_path(model_args)):
        return pinned(adapter.base)
    return pinned(Source(str(merged_base_folder(args)), None))


def base_identity(trainer: Trainer, model_args: ModelArguments) -> str | None:
    """Which weights a trained adapter belongs to: a commit of the Hub, or a folder's fingerprint. None for a whole model."""
    if not isinstance(trainer.model, PeftModel):
        return None
    base = trained_base(model_args, trainer.args)
    return base.revision or weights_fingerprint(Path(base.name))


def start_identity(model_args: ModelArguments) -> str:
    """Which weights training begins with: a commit of the Hub or a folder's fingerprint, of an adapter and of its base."""
    adapter = find_adapter(model_args)
    own = Source(model_args.model_name_or_path, model_args.model_revision)
    sources = [pinned(own)] if adapter is None else [pinned(adapter.source, ADAPTER_CONFIG_NAME), pinned(adapter.base)]
    return " ".join(source.revision or weights_fingerprint(Path(source.name)) for source in sources)


def weights_fingerprint(folder: Path) -> str:
    """A hash of the size of every weights file and of samples all over it, which no training leaves as they were."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(size * number // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def provenance(model_args: ModelArguments) -> dict[str, Any]:
    """For environment.json: the model that training began with and, where it came from an adapter, that and its base."""
    adapter = find_adapter(model_args)
    if adapter is None:
        return {"model": pinned(Source(model_args.model_name_or_path, model_args.model_revision))._asdict()}
    use = "continued" if continues(model_args, check_model_path(model_args)) else "merged"
    return {"model": pinned(adapter.base)._asdict(), "sft_adapter": {**adapter.source._asdict(), "use": use}}
