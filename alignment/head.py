"""Log-probabilities of response tokens, without the logits of a whole batch.

`add_lm_head(model)` gives a causal language model a second way of being called: with `shift_labels` and
`fused_lm_head=True` its forward returns per-token log-probabilities and projects only positions that are scored, a
chunk at a time. On CUDA that is TRL's Triton kernel. On a CPU TRL's head scores every position, in tiles larger than
the batch, so the chunks there are ours, behind the same arguments.
"""

import functools
import types
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput
from trl.trainer.utils import add_fused_lm_head

CHUNK_TOKENS = 256  # 256 x 128,256 float32 logits are 131 MB: past this a chunk costs memory and saves no time
OUTPUTS = ("log_probs", "mean_logits")


@dataclass
class HeadOutput(ModelOutput):
    """What is read of the forward: two (R, T) float32, zero where the label is -100, and a scalar."""

    log_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    aux_loss: Tensor | None = None  # load balancing, for a mixture of experts with output_router_logits


def add_lm_head(model: PreTrainedModel, device_type: str) -> None:
    """Give `model` the scoring forward. Before PEFT wraps it; `generate` and the plain forward stay as they are.

    device_type: "cuda" or "cpu", where the model will be trained.
    """
    # TRL's head takes the packed batch's 4D mask for a padding mask when it balances a router's load.
    routed = getattr(model.config.get_text_config(), "output_router_logits", False)
    if device_type == "cuda" and isinstance(model.get_output_embeddings(), nn.Linear) and not routed:
        add_fused_lm_head(model, outputs=OUTPUTS)
    else:
        add_chunked_lm_head(model)


def add_chunked_lm_head(model: PreTrainedModel) -> None:
    plain_forward = model.forward
    softcap, scale = logit_transform(model)
    config = model.config.get_text_config()
    routed = getattr(config, "output_router_logits", False)

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self: PreTrainedModel, *args, fused_lm_head: bool = False, shift_labels: Tensor | None = None, **kwargs):
        if not fused_lm_head:
            labels = {} if shift_labels is None else {"shift_labels": shift_labels}
            return plain_forward(*args, **labels, **kwargs)
        outputs = self.base_model(*args, **kwargs, **({"output_router_logits": True} if routed else {}))
        scored = shift_labels != -100  # (R, T)
        logps, mean_logits = chunked_logps(
            self.get_output_embeddings(),
            outputs.last_hidden_state[scored],  # (N, H)
            shift_labels[scored],
            softcap=softcap,
            scale=scale,
        )
        spread = functools.partial(logps.new_zeros(scored.shape).masked_scatter, scored)
        return HeadOutput(
            log_probs=spread(logps),
            mean_logits=spread(mean_logits),
            aux_loss=router_loss(outputs.router_logits, config, kwargs.get("attention_mask")) if routed else None,
        )

    model.forward = types.MethodType(forward, model)


def router_loss(router_logits: tuple[Tensor, ...], config: PreTrainedConfig, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts, over tokens that are not padding; a packed row has none."""
    padding_mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, padding_mask)


def logit_transform(model: PreTrainedModel) -> tuple[float | None, float]:
    """Soft-capping (Gemma-2) and multiplier (Cohere, Granite, Falcon-H1) that a model applies to its logits."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    multiplier = getattr(config, "logit_scale", getattr(config, "lm_head_multiplier", None))
    scaling = getattr(config, "logits_scaling", None)  # Granite divides by it, HyperCLOVA X multiplies
    if multiplier is None and scaling is not None:
        multiplier = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return softcap, 1.0 if multiplier is None else multiplier


def chunked_logps(
    head: nn.Module, hidden: Tensor, labels: Tensor, *, softcap: float | None, scale: float, chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and the mean logit beside it.

    hidden: (N, H); labels: (N,) token ids. Returns (N,) nats with gradient and (N,) without; float32, or float64 for a
    float64 model. Holds (chunk, V) logits at a time, in the forward and in the backward.
    """
    if type(head) is nn.Linear:
        weight, bias = head.weight, head.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return LinearLogps.apply(hidden, weight, bias, labels, softcap, scale, chunk)
    # A head with an adapter on it: its own forward, recomputed chunk by chunk.
    pieces = [
        checkpoint(score_chunk, head, piece, piece_labels, softcap, scale, use_reentrant=False)
        for piece, piece_labels in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def score_chunk(
    head: nn.Module, hidden: Tensor, labels: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    logits = transform_logits(head(hidden), softcap, scale)  # (chunk, V)
    logps = logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return logps, logits.detach().mean(-1)


def transform_logits(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    # float32 before the exponential: near -1.3 a bfloat16 moves in steps of 0.008, and beta = 10 makes that 0.08 of margin.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class LinearLogps(torch.autograd.Function):
    """`score_chunk` for a plain linear head, with the chunk's softmax turned into its gradient in place."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, softcap, scale, chunk):
        wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        logps = hidden.new_empty(labels.shape, dtype=wide)  # (N,)
        mean_logits, normalizers = torch.empty_like(logps), torch.empty_like(logps)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = transform_logits(nn.functional.linear(hidden[part], weight, bias), softcap, scale)  # (chunk, V)
            normalizers[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, labels[part, None]).squeeze(-1) - normalizers[part]
            mean_logits[part] = logits.mean(-1)
        ctx.save_for_backward(hidden, weight, bias, labels, normalizers)
        ctx.softcap, ctx.scale, ctx.chunk = softcap, scale, chunk
        ctx.mark_non_differentiable(mean_logits)
        return logps, mean_logits

    @staticmethod
    def backward(ctx, grad_logps, _grad_mean_logits):
        hidden, weight, bias, labels, normalizers = ctx.saved_tensors
        wide = normalizers.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(labels), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = transform_logits(nn.functional.linear(hidden[part], weight, bias), ctx.softcap, ctx.scale)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()  # d softcapped / d logit
            # d logp / d logits = onehot - softmax
            grad = logits.sub_(normalizers[part, None]).exp_().neg_()
            grad.scatter_add_(-1, labels[part, None], torch.ones_like(grad[:, :1]))
            grad *= grad_logps[part, None] * ctx.scale
            if slope is not None:
                grad *= slope
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
