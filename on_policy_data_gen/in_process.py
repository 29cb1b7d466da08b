"""Generation by transformers, in padded batches. What a prompt gets depends on its seed, not on the batch that it is in."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment.data.prompts import row_seed
from alignment.errors import TrainingStopped
from alignment.model.adapters import load_to_use
from alignment.model.config_files import whole_model
from alignment.model.generation import drawing, left_padded, plain_settings, up_to_end

from .configs import PolicyArguments
from .sampling import Answer, Request, Sampling


class TransformersEngine:
    """A model in this process, on one device."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, batch_size: int):
        self.model, self.tokenizer, self.sampling, self.batch_size = model, tokenizer, sampling, batch_size
        whole_model(model).generation_config = plain_settings(sampling.stop_ids, tokenizer.pad_token_id)

    @classmethod
    def load(
        cls, args: PolicyArguments, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, device: torch.device
    ) -> "TransformersEngine":
        model = load_to_use(args.model_arguments(), tokenizer).to(device)
        return cls(model, tokenizer, sampling, batch_size=args.batch_size)

    def answers(self, requests: Sequence[Request], seed: int, **options: Any) -> Iterator[Answer]:
        """The longest prompts first: if memory is short, it shows at once. options: of generate(), such as a streamer."""
        by_length = sorted(requests, key=lambda request: -len(request.ids))
        for batch in batches(by_length, self.batch_size, learned_positions(whole_model(self.model))):
            yield from self.batch(batch, seed, **options)

    @torch.inference_mode()
    def batch(self, requests: Sequence[Request], seed: int, **options: Any) -> list[Answer]:
        ids, mask = left_padded([request.ids for request in requests], self.tokenizer.pad_token_id or 0)
        steps = max(request.max_tokens for request in requests)
        device, sampling = self.model.device, self.sampling
        drawn = drawing(
            [row_seed(seed, request.id) for request in requests], steps, ids.shape[1], device,
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
        )  # fmt: skip
        try:
            tokens = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=steps,
                logits_processor=drawn,
                **options,
            )  # (B, prompt and response tokens)
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(
                f"out of memory: {len(requests)} prompts of up to {ids.shape[1]:,} tokens, with responses of up to {steps:,}, "
                "do not fit. Give a smaller --batch_size; what is finished is kept, and the same command goes on"
            ) from error
        responses = tokens[:, ids.shape[1] :].tolist()
        return [self.answer(request, response) for request, response in zip(requests, responses, strict=True)]

    def answer(self, request: Request, response: list[int]) -> Answer:
        """The response up to its end; what is behind is padding."""
        kept, ended = up_to_end(response[: request.max_tokens], self.sampling.stop_ids)
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(request.id, text, len(kept), "stop" if ended else "length")

    def close(self) -> None:
        """Leave the memory to the next stage's model."""
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many a model has that learned a vector for each, as GPT-2 did: there is nothing behind them. None: it has no such."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    is_learned = any(table is not model.get_input_embeddings() for table in tables)
    return model.config.get_text_config().max_position_embeddings if is_learned else None


def batches(requests: Sequence[Request], size: int, window: int | None) -> Iterator[list[Request]]:
    """Requests from the longest prompt to the shortest, at most `size` together.

    window: see `learned_positions`; a batch's longest prompt and longest response fit into it together.
    """
    batch: list[Request] = []
    for request in requests:
        is_over = window is not None and batch and len(batch[0].ids) + request.max_tokens > window
        if is_over or len(batch) == size:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch
