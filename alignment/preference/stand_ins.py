"""Kernels of a GPU as far as memory knows them: what they return, keep for backward and need for a moment.

Nothing here computes. For tensors without data, where the kernels themselves do not run.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

BLOCK = 64  # weights of a 4-bit layer that share one float32 scale
PROCESSORS = 132  # of an H100 or H200: rows of Liger's partial sums of a norm's gradient


# ---- Attention ----


class FusedAttention(torch.autograd.Function):
    """Flash attention: keeps its inputs, its output and a float32 a query and head.

    query, output: (T, heads, D); key, value: (K, key heads, D).
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _output, _normalizers = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)
        # Gradients of keys by query head, before heads that share a key are added up.
        expanded = [key.new_empty(len(key), *query.shape[1:]) for _ in range(2)] if query.shape[1] != key.shape[1] else []
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        del sums, expanded
        return grads


def fused_attention(gathers: bool, compute_dtype: torch.dtype | None) -> Callable[..., tuple[Tensor, None]]:
    """An attention function of transformers. gathers: a packed row's keys are copied behind their prompts'."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if compute_dtype is not None:
            query, key, value = (x.to(compute_dtype) for x in (query, key, value))
        rows, length = query.shape[0], query.shape[2]
        layout = kwargs.get("shared_prompt")
        if layout is None and mask is not None:  # torch's kernel takes a mask only with as many keys as queries
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (tokens, heads, D)
        if layout is not None and gathers:
            key, value = (x.index_select(0, layout.key_index) for x in (key, value))
        return FusedAttention.apply(query, key, value).unflatten(0, (rows, length)), None

    return attend


# ---- Liger's fused layers ----


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and a float32 a token; its gradient takes the place of the one it gets, or does not."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        ctx.in_place = in_place
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        _hidden, weight, _scales = ctx.saved_tensors
        grad_hidden = grad if ctx.in_place else torch.empty_like(grad)
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, None
        partial = weight.new_empty(PROCESSORS, len(weight), dtype=torch.float32)
        return grad_hidden, partial.sum(0).to(weight.dtype), None


class FusedProduct(torch.autograd.Function):
    """act(gate) * up, which keeps the two and writes their gradients over them."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, _grad: Tensor) -> tuple[Tensor, Tensor]:
        return ctx.saved_tensors


def fuse_layers(model: PreTrainedModel) -> None:
    """Norms and gated MLPs as Liger's kernels, by the names that models give them."""
    in_place = not model.config.get_text_config().model_type.startswith("gemma")  # as Liger has it: two norms in a row
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(lambda self, hidden: FusedNorm.apply(hidden, self.weight, in_place), module)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            module.forward = types.MethodType(gated, module)


def rotated_in_place(query: Tensor, key: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
    """The rotary embedding, which Liger writes over its inputs, and its gradient over the gradient."""
    return query, key


def gated(mlp: nn.Module, hidden: Tensor) -> Tensor:
    return mlp.down_proj(FusedProduct.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


# ---- bitsandbytes ----


class QuantisedProduct(torch.autograd.Function):
    """hidden @ weight.T with a weight of few bits, made whole for backward; 8 bits round the input for a moment and keep it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, outputs: int, bits: int) -> Tensor:
        ctx.save_for_backward(*([hidden] if bits == 8 else []))
        ctx.inputs, ctx.outputs = hidden.shape[-1], outputs
        rounded = hidden.to(torch.int8) if bits == 8 else None
        output = hidden.new_empty(*hidden.shape[:-1], outputs)
        del rounded
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        whole = grad.new_empty(ctx.outputs, ctx.inputs)
        return grad @ whole, None, None, None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer of 4 or 8 bits a weight, and its scales."""

    def __init__(self, plain: nn.Linear, bits: int, compute_dtype: torch.dtype):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.bits, self.compute_dtype = bits, compute_dtype
        count, device = plain.weight.numel(), plain.weight.device
        self.weight = nn.Parameter(torch.empty(count * bits // 8, dtype=torch.uint8, device=device), requires_grad=False)
        self.scales = nn.Buffer(torch.empty(count // BLOCK if bits == 4 else plain.out_features, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        return QuantisedProduct.apply(hidden.to(self.compute_dtype), self.weight, self.out_features, self.bits)


def quantise(model: PreTrainedModel, bits: int, compute_dtype: torch.dtype) -> None:
    """Every linear layer but the head in few bits, everything else in float32, as peft prepares such a base for training."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantisedLinear(module, bits, compute_dtype))
    widened: dict[int, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                data = parameter.data.float() if parameter.is_floating_point() else parameter.data
                module._parameters[name] = widened.setdefault(id(parameter), nn.Parameter(data, requires_grad=False))
