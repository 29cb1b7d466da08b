"""Log-probabilities of response tokens, without the logits of a whole batch.

`add_lm_head(model)` gives a causal language model a second way of being called: with `shift_labels` and
`fused_lm_head=True` its forward returns per-token log-probabilities and projects only positions that are scored, a
chunk at a time. On CUDA by TRL's Triton kernel; on a CPU, where TRL's tiles are larger than the batch, by tiles of ours.

The head module is called once a micro-batch, with that computation in the place of its forward: FSDP and ZeRO gather a
module's parameters and reduce their gradients around its call, which all processes must make equally often.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from ..errors import UserError

# A tile of 1,024 x 2,048 float32 logits is 8 MB and stays in a processor's cache, where what follows the matrix product
# is nearly free: a fifth less time than whole rows of 128,256 logits, a ninth less for 32,000.
TILE_TOKENS, TILE_VOCABULARY = 1024, 2048
# Of the forward's tiles, for its backward, which computes the others again: an eighth of the head's time for 1,200 tokens
# of 32,000 words. They are gone before the step's peak, which comes when the last gradients do.
KEPT_BYTES = 128 * 2**20
ADAPTED_TOKENS = 256  # a chunk of a head with an adapter on it
# How many experts read a token, as models and configs call it.
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
CUDA_VOCABULARY = 32768  # of TRL's tiles, 4,096 tokens high: its own choice


@dataclass
class HeadOutput(ModelOutput):
    """What is read of the forward: two (R, T) float32, zero where the label is -100, and a scalar."""

    log_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    aux_loss: Tensor | None = None  # load balancing, for a mixture of experts with output_router_logits


def add_lm_head(model: PreTrainedModel) -> None:
    """Give `model` the scoring forward. Before PEFT wraps it; `generate` and the plain forward stay as they are."""
    plain_forward = model.forward
    softcap, scale = logit_transform(model)
    routed = getattr(model.config.get_text_config(), "output_router_logits", False)

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: PreTrainedModel,
        *args,
        fused_lm_head: bool = False,
        shift_labels: Tensor | None = None,
        scored: Tensor | None = None,
        **kwargs,
    ):
        if not fused_lm_head:
            labels = {} if shift_labels is None else {"shift_labels": shift_labels}
            return plain_forward(*args, **labels, **kwargs)
        router = {"output_router_logits": True} if routed else {}
        if getattr(self, "scores_plainly", False):
            return plain_scores(plain_forward(*args, **kwargs, **router), shift_labels)
        outputs = backbone(self)(*args, **kwargs, **router)
        labels = shift_labels.flatten()
        if scored is None:  # (N,) where the flat labels are not -100; to look for them waits for the device
            scored = (labels != -100).nonzero().squeeze(-1)
        hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, scored)  # (N, H)
        score = functools.partial(head_logps, labels=labels.index_select(0, scored), softcap=softcap, scale=scale)
        logps, mean_logits = called_once(self.get_output_embeddings(), hidden, score)
        return HeadOutput(
            log_probs=spread(logps, scored, shift_labels.shape),
            mean_logits=spread(mean_logits, scored, shift_labels.shape),
            aux_loss=router_loss(outputs.router_logits, self, kwargs.get("attention_mask")) if routed else None,
        )

    model.forward = types.MethodType(forward, model)


def plain_scores(outputs: ModelOutput, shift_labels: Tensor) -> HeadOutput:
    """From the logits of a model whose head is more than this file knows: all of them are held, and scored in chunks."""
    places = (shift_labels.flatten() != -100).nonzero().squeeze(-1)
    labels = shift_labels.flatten().index_select(0, places)
    logits = outputs.logits.flatten(0, 1).index_select(0, places)  # (N, V)
    logps, mean_logits = adapted_logps(nn.Identity(), logits, labels, softcap=None, scale=1.0)
    return HeadOutput(
        log_probs=spread(logps, places, shift_labels.shape),
        mean_logits=spread(mean_logits, places, shift_labels.shape),
        aux_loss=outputs.get("aux_loss"),
    )


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head. Llama 4's base_model_prefix names nothing, and base_model is then the model itself."""
    return model.model if model.base_model is model else model.base_model


def spread(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """values (N,) at `places` of zeros of that shape."""
    return values.new_zeros(shape.numel()).index_copy(0, places, values).view(shape)


@torch.compiler.disable
def called_once(head: nn.Module, hidden: Tensor, score: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`score(multiplied, plain forward, hidden)` inside one call of `head`, with all that hangs on the call of a module."""
    leaf = multiplied(head)
    with standing_in(leaf, functools.partial(score, leaf, leaf.forward)):
        return head(hidden)


def multiplied(head: nn.Module) -> nn.Module:
    """The module whose parameters the head multiplies with, below what PEFT and FSDP 1 put around it."""
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]]
    return getattr(head, "_fsdp_wrapped_module", head)


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
    """`forward` in the place of the module's own."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def router_loss(router_logits: tuple[Tensor, ...], model: PreTrainedModel, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts, over tokens that are not padding; a packed row has none."""
    padding_mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    config = model.config.get_text_config()
    owners = (
        (owner, name) for name in CHOSEN_EXPERTS for owner in (model, config) if isinstance(getattr(owner, name, None), int)
    )
    owner, name = next(owners, (None, None))
    if owner is None:
        raise AttributeError(f"{type(model).__name__} does not say how many experts read a token")
    return load_balancing_loss_func(router_logits, router_logits[0].shape[-1], getattr(owner, name), padding_mask)


def logit_transform(model: PreTrainedModel) -> tuple[float | None, float]:
    """Soft-capping (Gemma-2, xLSTM) and multiplier (Cohere, Granite, Falcon-H1) that a model applies to its logits."""
    config = model.config.get_text_config()
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((getattr(config, name) for name in caps if hasattr(config, name)), None)
    multiplier = getattr(config, "logit_scale", getattr(config, "lm_head_multiplier", None))
    scaling = getattr(config, "logits_scaling", None)  # Granite divides by it, HyperCLOVA X multiplies
    if multiplier is None and scaling is not None:
        multiplier = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return softcap, 1.0 if multiplier is None else multiplier


def head_logps(
    head: nn.Module,
    plain_forward: Callable[[Tensor], Tensor],
    hidden: Tensor,
    *,
    labels: Tensor,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and the mean logit beside it, by the kernel that fits head and device.

    hidden: (N, H); labels: (N,) token ids. Returns (N,) nats with gradient and (N,) without; float32, or float64 for a
    float64 model.
    """
    size = len(head.weight) if is_matrix(head) else None  # out_features is wrong where PEFT has tied a copy
    if hidden.device.type == "cpu" and size is not None and len(labels) and int(labels.max()) >= size:
        raise UserError(
            f"token id {int(labels.max())}: the head has {size} rows, and no logit for it"
        )  # CUDA's own assert says so
    if not is_matrix(head):
        return adapted_logps(plain_forward, hidden, labels, softcap=softcap, scale=scale)
    if has_fused_kernel(hidden.device):
        logps, _, _, mean_logits, _ = ChunkedLogProbFunction.apply(
            hidden, head.weight, head.bias, labels, 1.0, CUDA_VOCABULARY, softcap, scale, ("mean_logits",)
        )
        return logps, mean_logits
    return tiled_logps(head, hidden, labels, softcap=softcap, scale=scale)


def has_fused_kernel(device: torch.device) -> bool:
    return device.type == "cuda"


def is_matrix(head: nn.Module) -> bool:
    """Whether all that the head does is a product with its weight: no adapter on it, no quantised weight."""
    return type(head).forward is nn.Linear.forward and not isinstance(head, BaseTunerLayer)


def adapted_logps(
    forward: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """By the head's own forward, recomputed chunk by chunk; holds the logits of one chunk."""
    pieces = [
        checkpoint(score_chunk, forward, piece, piece_labels, softcap, scale, use_reentrant=False)
        for piece, piece_labels in zip(hidden.split(ADAPTED_TOKENS), labels.split(ADAPTED_TOKENS), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def tiled_logps(
    head: nn.Linear, hidden: Tensor, labels: Tensor, *, softcap: float | None, scale: float, chunk: int = TILE_TOKENS
) -> tuple[Tensor, Tensor]:
    """By tiles of tokens and vocabulary. Holds one tile of logits, and between forward and backward up to KEPT_BYTES."""
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    keep = KEPT_BYTES if torch.is_grad_enabled() and softcap is None else 0  # soft-capping needs the logits themselves
    return LinearLogps.apply(hidden, weight, bias, labels, softcap, scale, chunk, keep)


def score_chunk(
    forward: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    logits = transform_logits(forward(hidden), softcap, scale)  # (chunk, V)
    logps = logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return logps, logits.detach().mean(-1)


def transform_logits(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    # float32 before the exponential: near -1.3 a bfloat16 moves in steps of 0.008, and beta = 10 makes that 0.08 of margin.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Tile(NamedTuple):
    """Some tokens by some of the vocabulary, and the labels that lie in it."""

    tokens: slice
    words: slice
    rows: Tensor  # among the tile's tokens
    columns: Tensor  # among its words


def tiles(labels: Tensor, vocabulary: int, tokens: int) -> Iterator[Tile]:
    for start in range(0, len(labels), tokens):
        part = labels[start : start + tokens]
        for word in range(0, vocabulary, TILE_VOCABULARY):
            rows = ((part >= word) & (part < word + TILE_VOCABULARY)).nonzero().squeeze(-1)
            span = slice(start, start + tokens)
            yield Tile(span, slice(word, min(word + TILE_VOCABULARY, vocabulary)), rows, part[rows] - word)


class LinearLogps(torch.autograd.Function):
    """`score_chunk` for a plain linear head, tile by tile: a running softmax forward, its gradient in place backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, softcap, scale, chunk, keep):
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        logits_sum, picked, total = hidden.new_zeros(3, len(labels), dtype=wide)  # (N,) each
        top = torch.full_like(total, -torch.inf)  # (N,), the largest logit so far; total sums exp(logit - top)
        kept: list[Tensor] = []  # of the first tiles exp(logit - top), and the top of then
        for tile in tiles(labels, len(weight), chunk):
            logits = transform_logits(tile_logits(hidden, weight, bias, tile), softcap, scale)  # (tokens, words)
            picked[tile.tokens][tile.rows] = logits[tile.rows, tile.columns]
            logits_sum[tile.tokens] += logits.sum(-1)
            before, now = top[tile.tokens], torch.maximum(top[tile.tokens], logits.amax(-1))
            total[tile.tokens] *= (before - now).exp()
            powers = logits.sub_(now[:, None]).exp_()
            total[tile.tokens] += powers.sum(-1)
            top[tile.tokens] = now
            keep -= powers.nbytes
            if keep >= 0:
                kept += [powers, now]
        normalizers = top + total.log()
        mean_logits = logits_sum / len(weight)
        ctx.save_for_backward(hidden, weight, bias, labels, normalizers, *kept)
        ctx.softcap, ctx.scale, ctx.chunk = softcap, scale, chunk
        ctx.mark_non_differentiable(mean_logits)
        return picked - normalizers, mean_logits

    @staticmethod
    def backward(ctx, grad_logps, _grad_mean_logits):
        hidden, weight, bias, labels, normalizers, *kept = ctx.saved_tensors
        powers, tops = iter(kept[::2]), iter(kept[1::2])
        wide = normalizers.dtype
        wanted = [torch.zeros_like(x, dtype=wide) if x is not None and needed else None
                  for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)]  # fmt: skip
        grad_hidden, grad_weight, grad_bias = wanted
        for tile in tiles(labels, len(weight), ctx.chunk):
            upstream, normalizer, slope = grad_logps[tile.tokens], normalizers[tile.tokens], None
            # d logp / d logits = onehot - softmax
            if (power := next(powers, None)) is not None:
                grad = power * ((next(tops) - normalizer).exp_() * -upstream)[:, None]
            else:
                logits = transform_logits(tile_logits(hidden, weight, bias, tile), ctx.softcap, ctx.scale)
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()  # d softcapped / d logit
                grad = logits.sub_(normalizer[:, None]).exp_().mul_(-upstream[:, None])
            grad[tile.rows, tile.columns] += upstream[tile.rows]
            grad = grad if slope is None else grad.mul_(slope)
            grad = grad if ctx.scale == 1.0 else grad.mul_(ctx.scale)
            if grad_bias is not None:
                grad_bias[tile.words] += grad.sum(0)
            if grad_hidden is not None:
                add_product(grad_hidden[tile.tokens], grad, weight[tile.words])
            if grad_weight is not None:
                add_product(grad_weight[tile.words], grad.T, hidden[tile.tokens])
        dtypes = (x if x is None else x.dtype for x in (hidden, weight, bias))
        grads = (x if x is None else x.to(dtype) for x, dtype in zip(wanted, dtypes, strict=True))
        return *grads, *(None,) * 5


def tile_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    return nn.functional.linear(hidden[tile.tokens], weight[tile.words], None if bias is None else bias[tile.words])


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, computed in right's precision and summed in total's."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right
