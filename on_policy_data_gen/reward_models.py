"""Reward models: a conversation as token ids in, a score out, in padded batches on one device."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignment.data.template import Turns, render
from alignment.data.tokenization import Response, add_ends, encode_texts, writes_bos
from alignment.errors import TrainingStopped, UserError, reason_of
from alignment.model.loading import check_attention
from alignment.model.tokenizer_files import load_as_written

from .armorm import ARCHITECTURE, ArmoRM, gate_mark, gate_place
from .configs import RewardArguments


class Head(Protocol):
    """What makes scores of a padded batch."""

    def __call__(self, rows: Sequence[list[int]]) -> Tensor: ...


class RewardModel(NamedTuple):
    """A scorer with its tokenizer; window: the longest conversation it takes, in tokens."""

    kind: str
    head: Head
    tokenizer: PreTrainedTokenizerBase
    window: int

    def encode(self, conversations: Sequence[Turns]) -> list[list[int]]:
        """In the reward model's own template, with one bos where its tokenizer has one."""
        texts = [render(turns, self.tokenizer) for turns in conversations]
        add_bos = writes_bos(self.tokenizer)
        return [
            add_ends(Response(ids, []), self.tokenizer, add_eos=False, add_bos=add_bos).prompt
            for ids in encode_texts(self.tokenizer, texts)
        ]

    @torch.inference_mode()
    def scores(self, rows: Sequence[list[int]], *, batch_size: int) -> list[float]:
        """One of each row of ids, in their order; batches hold rows of like length."""
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        scores = [math.nan] * len(rows)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [rows[number] for number in numbers]
            try:
                values = self.head(batch).float().tolist()
            except torch.OutOfMemoryError as error:
                raise TrainingStopped(
                    f"out of memory: {len(batch)} conversations of up to {len(batch[0]):,} tokens do not fit. Give a smaller "
                    "--reward_batch_size; what is finished is kept, and the same command goes on"
                ) from error
            for number, value in zip(numbers, values, strict=True):
                scores[number] = value
        return scores


def reward_config(args: RewardArguments) -> PreTrainedConfig:
    """A small file, read before anything else is. Raises UserError if there is none."""
    try:
        return AutoConfig.from_pretrained(args.reward_model, revision=args.reward_revision)
    except (OSError, ValueError) as error:
        raise UserError(unloadable(args, "configuration", error)) from error


def unloadable(args: RewardArguments, what: str, error: Exception) -> str:
    return (
        f"reward_model = {args.reward_model!r}: its {what} cannot be loaded ({reason_of(error)}). Give a folder or a Hub "
        "name; a gated model needs `hf auth login`. Code that comes with a reward model is never run"
    )


def load_reward_model(args: RewardArguments, device: torch.device) -> RewardModel:
    """Raises UserError for what is no reward model, or cannot be read."""
    check_attention(args.reward_attn_implementation, use_cpu=device.type == "cpu")
    config = reward_config(args)
    is_armo = config.architectures == [ARCHITECTURE]
    kind: type = ArmoRM if is_armo else AutoModelForSequenceClassification
    if not is_armo and config.num_labels != 1:
        raise UserError(
            f"reward_model = {args.reward_model!r}: has {config.num_labels} labels ({', '.join(config.architectures or [])}); "
            "a reward model has one"
        )
    dtype = args.reward_dtype or ("float32" if device.type == "cpu" else "bfloat16")
    options = {"revision": args.reward_revision, "dtype": dtype, "attn_implementation": args.reward_attn_implementation}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        tokenizer = load_as_written(args.reward_model, args.reward_revision, trust_remote_code=False)
        model, report = kind.from_pretrained(args.reward_model, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise UserError(unloadable(args, "weights or tokenizer", error)) from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"reward_model = {args.reward_model!r}: its weights lack {', '.join(missing[:3])}, which would be random; a reward "
            "model has a trained head"
        )
    if not tokenizer.chat_template:
        raise UserError(f"reward_model = {args.reward_model!r}: its tokenizer has no chat template")
    model = model.to(device).eval()
    window = args.reward_max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    if is_armo:
        return RewardModel("ArmoRM", ArmoHead(model.heads_in_float32(), gate_mark(tokenizer)), tokenizer, window)
    return RewardModel("sequence classification", OneLabelHead(model), tokenizer, window)


class ArmoHead:
    """ArmoRM's scores of a batch."""

    def __init__(self, model: ArmoRM, mark: list[int]):
        self.model, self.mark = model, mark

    def __call__(self, rows: Sequence[list[int]]) -> Tensor:
        ids, mask = right_padded(rows, 0, self.model.device)
        places = torch.tensor([gate_place(row, self.mark) for row in rows], device=ids.device)
        return self.model(ids, mask, places)


class OneLabelHead:
    """The only logit of a sequence-classification model, as transformers reads it: at the last token that is not padding."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.config = model, model.config.get_text_config()
        self.own_pad = self.config.pad_token_id

    def __call__(self, rows: Sequence[list[int]]) -> Tensor:
        # Without a padding token of its own, one that no row holds: with eos, say, rows would be read before their end.
        pad = unused_id(rows) if self.own_pad is None else self.own_pad
        self.config.pad_token_id = pad
        ids, mask = right_padded(rows, pad, self.model.device)
        return self.model(input_ids=ids, attention_mask=mask).logits[:, 0]


def unused_id(rows: Sequence[list[int]]) -> int:
    used = set().union(*rows)
    return next(number for number in range(len(used) + 1) if number not in used)


def right_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, longest)."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
