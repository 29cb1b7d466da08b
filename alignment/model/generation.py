"""Generation by transformers, in padded batches. What a prompt gets depends on its seed, not on the batch that it is in."""

import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .head import standing_in


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


def drawing(
    seeds: Sequence[int],
    steps: int,
    prompt_tokens: int,
    device: torch.device,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> LogitsProcessorList:
    """Temperature, top-k and top-p as transformers has them, in its order, and each row's draw; none for temperature 0."""
    if temperature == 0:
        return LogitsProcessorList()
    uniforms = torch.stack([uniform_numbers(seed, steps) for seed in seeds]).to(device)
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList([*warpers, DrawByRow(uniforms, prompt_tokens)])


def uniform_numbers(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1), the same on every machine; a longer row begins like a shorter one."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def left_padded(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, longest): responses begin right behind their prompts."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def up_to_end(response: list[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """The tokens in front of the first end, and whether there is one; what is behind it is padding."""
    end = next((place for place, token in enumerate(response) if token in ends), None)
    return response[:end], end is not None


def plain_settings(ends: Sequence[int], pad: int | None) -> GenerationConfig:
    """For a model's own generation_config, with which generate() fills what a call leaves open, its temperature for one."""
    return GenerationConfig(do_sample=False, use_cache=True, eos_token_id=list(ends) or None, pad_token_id=pad)


# ---- A model in training ----


@contextmanager
def called_through(wrapped: nn.Module, policy: PreTrainedModel) -> Iterator[None]:
    """Inside, `policy` is called as `wrapped`, what an adapter and a strategy have put around it.

    generate() calls the policy itself. FSDP gathers the parameters that no layer owns, embedding and head, around the call of
    its outermost module only, and autocast is there too.
    """
    if wrapped is policy:
        yield
        return
    own = policy.forward

    @functools.wraps(own)  # generate() reads the signature
    def through(*args: Any, **kwargs: Any) -> Any:
        with standing_in(policy, own):
            return wrapped(*args, **kwargs)

    with standing_in(policy, through):
        yield


def replies(
    wrapped: nn.Module,
    policy: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    ends: Sequence[int],
    pad: int | None,
    max_new_tokens: int,
    seeds: Sequence[int],
    temperature: float,
    device: torch.device,
    synced: bool,
) -> list[list[int]]:
    """A response to each of B prompts, in token ids without its end. The caller turns off dropout and gradients.

    wrapped: the policy as it is trained. device: that it computes on, wherever its parameters wait. synced: go on, on all
    processes, until the last one's longest response is done, as it takes where each forward gathers parameters; every process
    then needs a batch.
    """
    ids, mask = left_padded(prompts, pad or 0)
    before, policy.generation_config = policy.generation_config, plain_settings(ends, pad)
    try:
        with called_through(wrapped, policy):
            tokens = policy.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                logits_processor=drawing(seeds, max_new_tokens, ids.shape[1], device, temperature=temperature),
                synced_gpus=synced,
            )  # (B, prompt and response tokens)
    finally:
        policy.generation_config = before
    return [up_to_end(row, ends)[0] for row in tokens[:, ids.shape[1] :].tolist()]
