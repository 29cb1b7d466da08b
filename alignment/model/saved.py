"""Whether the folder that a run leaves is the model that was trained: the same ids and the same logits, read again."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TrainingStopped, UserError
from .adapters import keep_4bit_layout, whole_models
from .config_files import whole_model, write_configs
from .tokenizer_files import misread, save_tokenizer, settle_class
from .vocabulary import embedding_rows

logger = logging.getLogger(__name__)

ROWS, TOKENS = 3, 64  # of training rows, that are read again
REFUSALS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError)
# Of mean |log-probability| + 1: what differs between two computations of the same numbers, in 32 bits and in 16.
TOLERANCE = {False: 1e-3, True: 3e-2}


# ---- Before training ----


def try_to_save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    came: dict[str, Any],
    rows: list[list[int]],
    *,
    eos_token: str | None,
    trust_remote_code: bool,
) -> None:
    """Save all but the weights, and read it: what the end of the run would refuse is refused now.

    rows: token ids of training rows. Raises UserError.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            write_configs(model, folder, came)
            if isinstance(model, PeftModel):
                model.peft_config[model.active_adapter].save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
            settle_class(tokenizer, folder, rows)
            save_tokenizer(tokenizer, folder, eos_token=eos_token)
            if not isinstance(model, PeftModel):
                AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except REFUSALS as error:
            raise UserError(
                f"{model.config._name_or_path or 'the model'}: what the run would leave beside its weights cannot be saved and "
                f"read again ({type(error).__name__}: {error}). Correct the file that it names in the model's folder"
            ) from error
    generation = whole_model(model).generation_config
    try:
        if generation is not None:
            generation.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        logger.warning(
            "generation_config.json is saved with its settings as they came, which contradict each other: %s", reason
        )


# ---- After training ----


def token_logps(model: nn.Module, rows: list[list[int]]) -> list[Tensor]:
    """Log-probability of every token but the first, row by row, by the model's plain forward; float32 on the CPU."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
            found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1).cpu())
    return found


def spoken(model: nn.Module, rows: list[list[int]]) -> list[Tensor]:
    """`token_logps` of a model in training, on all processes of a launch."""
    was_training = model.training
    model.eval()
    try:
        return token_logps(model, rows)
    finally:
        model.train(was_training)


def refuse_another_model(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    wanted: list[Tensor],
    *,
    init_kwargs: dict[str, Any],
    half: bool,
) -> None:
    """Raises TrainingStopped if `folder`, read again, gives other ids or log-probabilities than the model that was trained.

    rows, wanted: see `spoken`. init_kwargs: how the model, or the base of an adapter, was loaded. half: computed in 16 bits.
    """
    if problem := misread(tokenizer, folder, rows):
        raise TrainingStopped(f"{folder}: the saved tokenizer is not the one that was trained with: {problem}")
    try:
        saved = read_again(folder, model, init_kwargs)
    except REFUSALS as error:
        raise TrainingStopped(
            f"{folder}: the saved model cannot be read again ({type(error).__name__}: {error}). Its weights are there"
        ) from error
    if saved is None:
        return
    device = next(saved.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=half):
        found = token_logps(saved.eval(), rows)
    ours, theirs = torch.cat(wanted), torch.cat(found)
    off, limit = (ours - theirs).abs().mean().item(), TOLERANCE[half] * (1 + ours.abs().mean().item())
    if not off <= limit:
        raise TrainingStopped(
            f"{folder}: the saved model, read again, is not the one that was trained: its log-probabilities of training tokens "
            f"are off by {off:.3g} nats on average (allowed: {limit:.3g}). The last checkpoint is as it was"
        )
    logger.info("Read again from %s: the same token ids, and log-probabilities within %.2g nats.", folder, off)


def read_again(folder: Path, model: PreTrainedModel | PeftModel, init_kwargs: dict[str, Any]) -> nn.Module | None:
    """The model in `folder`, on the CPU if it is not quantised; None, with a line, where it does not fit into memory."""
    base = whole_model(model)
    options = {key: value for key, value in init_kwargs.items() if key in ("trust_remote_code", "code_revision")}
    quantised = getattr(base, "is_quantized", False)
    bytes_needed = 4 * sum(parameter_count(p) for p in base.parameters())
    if not quantised and bytes_needed > psutil.virtual_memory().available:
        logger.warning(
            "%s: not computed with again, for %.3g GB do not fit into this machine's memory; its token ids are the same.",
            folder, bytes_needed / 1e9,
        )  # fmt: skip
        return None
    with whole_models():
        if not isinstance(model, PeftModel):
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        config = PeftConfig.from_pretrained(folder)
        options = dict(init_kwargs) if quantised else {**options, "dtype": torch.float32}
        options["revision"] = config.revision
        under = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **options)
        tokens = embedding_rows(model)
        if tokens > under.get_input_embeddings().num_embeddings:
            under.resize_token_embeddings(tokens)
        saved = PeftModel.from_pretrained(under, folder)
        keep_4bit_layout(saved)
        return saved


def parameter_count(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
