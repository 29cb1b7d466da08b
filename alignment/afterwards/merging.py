"""A LoRA adapter merged into its full-precision base: a model folder that needs no peft, whole or not there."""

import json
import logging
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from ..errors import TrainingStopped, UserError, reason_of
from ..model.adapter_checks import adapted_embedding
from ..model.adapters import adapter_weights, load_base, merge_facts, quantised_by, write_beside
from ..model.companions import files_of, licence_of
from ..model.config_files import config_as_came, weights_alone
from ..model.loading import (
    MERGED_FROM,
    Adapter,
    Source,
    check_model_path,
    find_adapter,
    load_tokenizer,
    pinned,
)
from ..model.precision import in_dtype
from ..model.saved import REFUSALS, token_logps
from ..model.tokenizer_files import misread, save_tokenizer, settle_class
from ..recipe.configs import DataArguments, ModelArguments
from ..report.review.reading import read_yaml
from ..report.saved_files import complete_card
from ..run.checkpoints import RECIPE_FILE, on_threads, sync, training_of
from ..run.run_folder import umask, unwritable

logger = logging.getLogger(__name__)

# How far the merged model, read again, may be off, in nats per token on average. In float32 only the order of additions
# differs, 3e-7 on a random model of two layers. In 16 bits each merged weight is rounded once more, by a relative 2^-9
# (bfloat16) or 2^-12 (float16) at most, and so is every sum on the way of both: 4e-3 and 5e-4 there, more in deep models.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
LORA = re.compile(r"\.lora_(embedding_)?[AB]\b")  # matrices of an adapter, in its file and in a model
TOKENS = 64  # of each text that is compared
UNFILLED = "[More Information Needed]"  # in the card that peft writes
TEXTS = (
    "Write two sentences about rivers.\n\nA river carries water from the hills to the sea. On its way it turns mills, feeds "
    "fields and divides towns from one another.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n\n\nprint(mean([1.0, 2.5, 4.0]))",
    "1. 12 + 30 = 42\n2. 7 x 8 = 56\n3. The square root of 144 is 12, because 12 x 12 = 144.",
    "Dear Sir or Madam, thank you for your letter of 3 May. I'm afraid we cannot accept the offer; we'd be glad to talk again.",
)


@dataclass(frozen=True)
class Agreement:
    """Mean absolute differences of log-probabilities, in nats per token, over `tokens` tokens of TEXTS."""

    moved: float  # by the adapter, from its base
    off: float  # the merged model, read again, from base and adapter
    allowed: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"log-probabilities of {self.tokens} tokens agree within {self.off:.2g} nats on average (allowed: "
            f"{self.allowed:.2g}); the adapter moves them by {self.moved:.2g}"
        )


def merge_adapter(
    name: str,
    output: Path,
    *,
    revision: str = "main",
    base: str | None = None,
    base_revision: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Agreement:
    """Merge the adapter at `name`, a folder or Hub name, into its base, and leave a whole model in `output`.

    base: to merge into, in place of the one that the adapter names. dtype: of the weights in `output`; None: the base's own.
    Each layer's sum is computed in float32 and rounded once. Raises UserError before anything is loaded for what cannot be
    merged, or where `output` exists; TrainingStopped if the merged model, read again, does not say what base and adapter say.
    """
    refuse_occupied(output)
    model_args = ModelArguments(
        model_name_or_path=name, model_revision=revision, base_model_revision=base_revision, trust_remote_code=trust_remote_code
    )
    adapter = adapter_to_merge(model_args, base)
    own = base_arguments(adapter, trust_remote_code)
    config = check_model_path(own if base else model_args)
    refuse_unmergeable(adapter, config)
    tokenizer = load_tokenizer(model_args, DataArguments())
    rows = [tokenizer(text)["input_ids"][:TOKENS] for text in TEXTS]

    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # of a merge that was killed
    try:
        model = loaded(adapter, tokenizer, dtype=dtype, trust_remote_code=trust_remote_code)
        came, loaded_dtype = config_as_came(model), str(model.get_base_model().dtype).removeprefix("torch.")
        saved_dtype = dtype or loaded_dtype
        wanted = torch.cat(token_logps(model, rows))
        with model.disable_adapter():
            moved = (wanted - torch.cat(token_logps(model, rows))).abs().mean().item()
        merged = merged_in_float32(model)
        merged.generation_config = generation_config(adapter) or merged.generation_config
        save(merged, staged, saved_dtype)
        write_beside(merged, staged, came, tokenizer, [adapter.source, adapter.base], dtype=saved_dtype)
        settle_class(tokenizer, staged, rows)
        save_tokenizer(tokenizer, staged)
        del model, merged  # the one that was saved is read into their room
        agreement = agreement_of(staged, tokenizer, rows, wanted, moved, saved_dtype, trust_remote_code)
        facts = {
            **merge_facts(adapter, saved_dtype),
            "base": list(pinned(adapter.base)),
            **training_of(name)._asdict(),
        }
        (staged / MERGED_FROM).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        card = card_of(adapter, output.name, saved_dtype, agreement, licence=licence_of(own))
        (staged / "README.md").write_text(card, encoding="utf-8")
        on_threads(sync, [path for path in staged.rglob("*") if path.is_file()])
        refuse_occupied(output)  # it took a while
        staged.rename(output)
        sync(output.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    logger.info("%s: %s.", output, agreement)
    if agreement.off > agreement.moved / 2:
        logger.warning(
            "Rounding to %s changes as much as half of what the adapter does; --dtype=float32 keeps all of it.", saved_dtype
        )
    return agreement


# ---- Before anything is loaded ----


def refuse_occupied(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already; choose another folder for the merged model, or move this one away")
    if (problem := unwritable(output)) is not None:
        raise UserError(f"{output}: {problem}")


def adapter_to_merge(model_args: ModelArguments, base: str | None) -> Adapter:
    name = model_args.model_name_or_path
    adapter = find_adapter(model_args)
    if adapter is None:
        raise UserError(
            f"{name}: is a whole model, not a LoRA adapter (there is no adapter_config.json); nothing is to be merged"
        )
    if base is not None:
        adapter = adapter._replace(base=Source(base, model_args.base_model_revision or "main"))
    own = base_arguments(adapter, trust_remote_code=False)
    if Path(adapter.base.name).is_dir() and find_adapter(own) is not None:
        raise UserError(
            f"{name}: its base {adapter.base.name} is a LoRA adapter itself; merge that first, and name the result with --base"
        )
    adapter_weights(adapter)
    return adapter


def base_arguments(adapter: Adapter, trust_remote_code: bool) -> ModelArguments:
    return ModelArguments(
        model_name_or_path=adapter.base.name, model_revision=adapter.base.revision, trust_remote_code=trust_remote_code
    )


def refuse_unmergeable(adapter: Adapter, config: PreTrainedConfig) -> None:
    """Raises UserError for bases and adapters of which no sum is a model of the base's kind."""
    source, base = adapter.source.name, adapter.base.name
    if kind := quantised_by(config):
        raise UserError(
            f"{source}: its base {base} has quantised weights ({kind}), to which the sum would be rounded; name the model that "
            "they were made from with --base"
        )
    weights = adapter_weights(adapter)
    if config.get_text_config().tie_word_embeddings and (layer := adapted_embedding(weights)):
        raise UserError(
            f"{source}: adapts {layer} alone, which in {base} is one matrix with the layer at its other end, so that merging "
            "would change both; use the adapter unmerged"
        )


# ---- Merging ----


def loaded(adapter: Adapter, tokenizer: PreTrainedTokenizerBase, *, dtype: str | None, trust_remote_code: bool) -> PeftModel:
    """The adapter on its base, in the base's own type, or in float32 where the sum is to be kept in that.

    Raises UserError for an adapter that does not fit the base.
    """
    wide = "float32" if dtype == "float32" else "auto"
    base = load_base(adapter, tokenizer, dtype=wide, trust_remote_code=trust_remote_code)
    misfit = f"{adapter.source.name}: is no adapter of {adapter.base.name}"
    try:
        model = PeftModel.from_pretrained(base, adapter.source.name, revision=adapter.source.revision)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{misfit} ({reason_of(error)}); name its base with --base") from error
    with safe_open(adapter_weights(adapter), framework="pt") as file:
        saved = {key for key in file.keys() if LORA.search(key)}  # noqa: SIM118
    expected = {key.replace(".default", "") for key in model.state_dict() if LORA.search(key)}
    if missing := sorted(saved ^ expected):
        raise UserError(
            f"{misfit}: {len(missing)} matrices have no counterpart, {missing[0]} for one; name its base with --base"
        )
    return model.eval()


def merged_in_float32(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter in it: every sum in float32, layer by layer, and rounded once to the layer's own type."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in tqdm(layers, desc="Merging", unit="layer", disable=None):
            held = {id(parameter): parameter.dtype for parameter in layer.get_base_layer().parameters()}
            layer.float()
            layer.merge(safe_merge=True)
            for parameter in layer.get_base_layer().parameters():
                parameter.data = parameter.data.to(held.get(id(parameter), parameter.dtype))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is nothing left to merge
            return model.merge_and_unload()  # now what is trained whole takes its place
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"peft cannot merge this adapter: {reason_of(error)}") from error


def generation_config(adapter: Adapter) -> GenerationConfig | None:
    """The adapter's own, which says where its turns end; None where it has none."""
    source = adapter.source
    found = cached_file(
        source.name, GENERATION_CONFIG_NAME, revision=source.revision, _raise_exceptions_for_missing_entries=False
    )
    return GenerationConfig.from_pretrained(Path(found).parent) if found else None


def save(merged: PreTrainedModel, folder: Path, dtype: str) -> None:
    """The weights, sharded as save_pretrained does it."""
    state = in_dtype(merged.state_dict(), getattr(torch, dtype), merged)
    with weights_alone(merged):
        merged.save_pretrained(folder, state_dict=state)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o666 & ~umask())  # safetensors leaves 0600, whatever the user's umask lets others read


# ---- What was saved ----


def agreement_of(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    wanted: Tensor,
    moved: float,
    dtype: str,
    trust_remote_code: bool,
) -> Agreement:
    """How near the folder, read again, is to base and adapter. Raises TrainingStopped if it is another model or tokenizer.

    wanted: log-probabilities of `rows` by base and adapter, see `token_logps`, in one piece.
    """
    left = "nothing was left in its place"
    if problem := misread(tokenizer, folder, rows):
        raise TrainingStopped(f"the saved tokenizer is not the adapter's: {problem}; {left}")
    try:
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except REFUSALS as error:
        raise TrainingStopped(f"the merged model cannot be read again ({type(error).__name__}: {error}); {left}") from error
    off = (torch.cat(token_logps(saved.eval(), rows)) - wanted).abs().mean().item()
    agreement = Agreement(moved, off, TOLERANCE[dtype], wanted.numel())
    if not agreement.off <= agreement.allowed:
        raise TrainingStopped(
            f"the merged model, read again, is not base and adapter: its log-probabilities are off by {off:.3g} nats a token "
            f"on average (allowed in {dtype}: {agreement.allowed:.2g}); {left}"
        )
    return agreement


def card_of(adapter: Adapter, name: str, dtype: str, agreement: Agreement, *, licence: dict[str, str]) -> str:
    """The adapter's card, if it has one, with a part on the files that is this folder's."""
    beside = files_of(adapter.source)
    path = beside / "README.md" if beside else None
    text = path.read_text(encoding="utf-8") if path and path.is_file() else UNFILLED
    text = f"# {name}\n" if UNFILLED in text else text
    card = ModelCard(text.partition("\n## Files\n")[0], ignore_metadata_errors=True)
    trained_in = quantised_in_training(adapter)
    card.data.tags = [tag for tag in card.data.tags or [] if tag not in ("lora", "4-bit", "8-bit")]
    weights = f"{dtype}, merged in float32 from a LoRA adapter (rank {adapter.config.r}, alpha {adapter.config.lora_alpha})"
    rows = {"Weights": weights, "Adapter": described(adapter.source), "Base": described(pinned(adapter.base))}
    if trained_in:
        rows["Base while training"] = f"quantised to {trained_in}; log-probabilities here differ from those in training"
    rows["Checked"] = str(agreement)
    metadata: dict[str, Any] = {
        **licence, "library_name": "transformers", "base_model": adapter.base.name, "base_model_relation": "finetune",
    }  # fmt: skip
    return complete_card(str(card), rows=rows, metadata=metadata, tags=[], as_saved={}, unrounded={}) + "\n"


def described(source: Source) -> str:
    return f"`{source.name}`" + (f", revision {source.revision}" if source.revision and not Path(source.name).is_dir() else "")


def quantised_in_training(adapter: Adapter) -> str | None:
    """By the run's recipe, where it is there."""
    recipe = read_yaml(Path(adapter.source.name, RECIPE_FILE))
    return next((bits for key, bits in (("load_in_4bit", "4 bits"), ("load_in_8bit", "8 bits")) if recipe.get(key)), None)
