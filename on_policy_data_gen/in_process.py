"""Generation by transformers, in padded batches. What a prompt gets depends on its seed, not on the batch that it is in."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignment.errors import TrainingStopped
from alignment.model.adapters import load_to_use
from alignment.model.config_files import whole_model

from .configs import PolicyArguments
from .sampling import Answer, Request, Sampling, row_seed


class DrawByRow(LogitsProcessor):
    """Leaves in each row one token, drawn with that row's own random number for this step, by the inverse of its distribution.

    transformers would draw all rows from one stream, in which every row's fate hangs on its neighbours.
    """

    def __init__(self, uniforms: Tensor, prompt_tokens: int):
        self.uniforms, self.prompt_tokens = uniforms, prompt_tokens  # (B, steps) float64 in [0, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # float64: a float32 sum over 128,000 tokens ends some 1e-6 beside 1, and tokens are smaller than that.
        cumulated = scores.double().softmax(-1).cumsum(-1)  # (B, V)
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_tokens, None]  # (B, 1)
        token = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class TransformersEngine:
    """A model in this process, on one device."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, batch_size: int):
        self.model, self.tokenizer, self.sampling, self.batch_size = model, tokenizer, sampling, batch_size
        # generate() fills what a call leaves open with the model's own settings, its temperature for one.
        whole_model(model).generation_config = GenerationConfig(
            do_sample=False, eos_token_id=sampling.stop_ids, pad_token_id=tokenizer.pad_token_id
        )

    @classmethod
    def load(
        cls, args: PolicyArguments, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, device: torch.device
    ) -> "TransformersEngine":
        model = load_to_use(args.model_arguments(), tokenizer).to(device)
        return cls(model, tokenizer, sampling, batch_size=args.batch_size)

    def answers(self, requests: Sequence[Request], seed: int, **options: Any) -> Iterator[Answer]:
        """The longest prompts first: if memory is short, it shows at once. options: of generate(), such as a streamer."""
        by_length = sorted(requests, key=lambda request: -len(request.ids))
        for start in range(0, len(by_length), self.batch_size):
            yield from self.batch(by_length[start : start + self.batch_size], seed, **options)

    @torch.inference_mode()
    def batch(self, requests: Sequence[Request], seed: int, **options: Any) -> list[Answer]:
        ids, mask = left_padded([request.ids for request in requests], self.tokenizer.pad_token_id or 0)
        steps = max(request.max_tokens for request in requests)
        device = self.model.device
        try:
            tokens = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=steps,
                logits_processor=self.processors(requests, seed, steps, ids.shape[1], device),
                **options,
            )  # (B, prompt and response tokens)
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(
                f"out of memory: {len(requests)} prompts of up to {ids.shape[1]:,} tokens, with responses of up to {steps:,}, "
                "do not fit. Give a smaller --batch_size; what is finished is kept, and the same command goes on"
            ) from error
        responses = tokens[:, ids.shape[1] :].tolist()
        return [self.answer(request, response) for request, response in zip(requests, responses, strict=True)]

    def processors(
        self, requests: Sequence[Request], seed: int, steps: int, prompt_tokens: int, device: torch.device
    ) -> LogitsProcessorList:
        """Temperature, top-k and top-p as transformers has them, in its order, and each row's draw; none for temperature 0."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return LogitsProcessorList()
        uniforms = torch.stack([uniform_numbers(row_seed(seed, request.id), steps) for request in requests]).to(device)
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        return LogitsProcessorList([*warpers, DrawByRow(uniforms, prompt_tokens)])

    def answer(self, request: Request, response: list[int]) -> Answer:
        """The response up to its end; what is behind is padding."""
        response = response[: request.max_tokens]
        end = next((place for place, token in enumerate(response) if token in self.sampling.stop_ids), None)
        kept = response[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(request.id, text, len(kept), "length" if end is None else "stop")

    def close(self) -> None:
        """Leave the memory to the next stage's model."""
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def left_padded(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, longest): responses begin right behind their prompts."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def uniform_numbers(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1), the same on every machine; a longer row begins like a shorter one."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
