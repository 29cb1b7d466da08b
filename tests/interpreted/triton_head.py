"""TRL's Triton kernels for the head, in Triton's interpreter, against float64; prints the errors as JSON.

A process of its own, because Triton reads TRITON_INTERPRET=1 when it is imported.
"""

import json
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from trl.kernels import chunked_logprob

from alignment.model import head
from alignment.model.head import head_logps


class Shape(NamedTuple):
    """tile, block: of the vocabulary, words that are projected at once and words that a program of the kernel reads.

    Tiles are 16 tokens high, not 4,096.
    """

    tokens: int
    hidden: int
    words: int
    dtype: str = "float32"
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    tile: int = 384
    block: int = 128


SHAPES = {
    "one tile": Shape(37, 64, 1000, tile=32768, block=1024),
    "odd tiles and a bias": Shape(37, 64, 1003, bias=True),
    "soft-capped, scaled": Shape(41, 33, 777, bias=True, softcap=3.0, scale=0.5, tile=256),
    "one token": Shape(1, 16, 50),
    "bf16": Shape(37, 64, 1003, "bfloat16"),
    "bf16, soft-capped": Shape(37, 64, 1003, "bfloat16", softcap=30.0),
}


def errors(shape: Shape) -> dict[str, float]:
    """The largest of the log-probabilities, in nats, and the largest of any gradient, relative to all of it."""
    torch.manual_seed(0)
    layer = nn.Linear(shape.hidden, shape.words, bias=shape.bias, dtype=getattr(torch, shape.dtype))
    nn.init.normal_(layer.weight, std=4 / shape.hidden**0.5)
    hidden = torch.randn(shape.tokens, shape.hidden).to(layer.weight.dtype).requires_grad_()
    labels, upstream = torch.randint(shape.words, (shape.tokens,)), torch.randn(shape.tokens)
    transform = {"labels": labels, "softcap": shape.softcap, "scale": shape.scale}
    with (
        mock.patch.object(chunked_logprob, "_use_triton", return_value=True),
        mock.patch.object(chunked_logprob, "TOKEN_CHUNK_SIZE", 16),
        mock.patch.object(chunked_logprob, "_BLOCK_SIZE", shape.block),
        mock.patch.object(head, "has_fused_kernel", return_value=True),
        mock.patch.object(head, "CUDA_VOCABULARY", shape.tile),
    ):
        found, mean_logits = head_logps(layer, layer.forward, hidden, **transform)
        gradients = torch.autograd.grad((found * upstream).sum(), [hidden, *layer.parameters()])
    exact, exact_means, exact_gradients = in_float64(layer, hidden, upstream, **transform)
    pairs = zip(gradients, exact_gradients, strict=True)
    return {
        "logps": float((found - exact).detach().abs().max()),
        "mean_logits": float((mean_logits - exact_means).abs().max()),
        "gradients": max(float((a - b).norm() / b.norm()) for a, b in pairs),
    }


def in_float64(
    layer: nn.Linear, hidden: Tensor, upstream: Tensor, *, labels: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """By log-softmax over all logits: log-probabilities, mean logits, and gradients as `errors` asks for them."""
    inputs = [x.detach().double().requires_grad_() for x in (hidden, *layer.parameters())]
    logits = nn.functional.linear(*inputs) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return logps.detach(), logits.detach().mean(-1), torch.autograd.grad((logps * upstream).sum(), inputs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: errors(shape) for name, shape in SHAPES.items()}))
