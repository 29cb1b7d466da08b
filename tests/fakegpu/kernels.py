"""The fake GPU's kernels: what each demands of its arguments, and somebody in its place; and the project on its ways."""

import math
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob

from alignment.model import head, shared_prompt
from tests.fakegpu.device import GPU, HALVES, on_the_host, set_up
from tests.fakegpu.watch import as_list


class ContractError(AssertionError):
    """What a kernel on a GPU would refuse, or read as something else."""


def demand(condition: bool, what: str) -> None:
    if not condition:
        raise ContractError(what)


def demand_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """(tokens, heads, D) each, as flash attention reads them."""
    demand(query.dtype == key.dtype == value.dtype, f"types differ: {query.dtype}, {key.dtype}, {value.dtype}")
    demand(query.dtype in HALVES, f"{query.dtype} is not half precision")
    demand(query.ndim == key.ndim == value.ndim == 3 and key.shape == value.shape, "not (tokens, heads, D)")
    demand(query.shape[1] % key.shape[1] == 0, f"{query.shape[1]} heads do not share {key.shape[1]}")
    demand(query.shape[2] == key.shape[2] <= 256 and query.shape[2] % 8 == 0, f"heads of {query.shape[2]} and {key.shape[2]}")
    demand(all(x.stride(-1) == 1 for x in (query, key, value)), "a head is not contiguous")


def demand_bounds(bounds: Tensor, tokens: int, longest: Any) -> None:
    """(S + 1,) int32: where sequences begin, the last one's end behind them."""
    demand(bounds.dtype == torch.int32, f"bounds are {bounds.dtype}, not int32")
    demand(bounds.ndim == 1 and bounds.is_contiguous(), "bounds are not one row of numbers")
    demand(type(longest) is int and 0 < longest <= tokens, f"the longest of {tokens} tokens is {longest!r}")


def demand_varlen(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor], longest: tuple[int, int]) -> None:
    demand_heads(query, key, value)
    demand(len({x.device for x in (query, key, value, *bounds)}) == 1, "tensors of several devices")
    demand_bounds(bounds[0], len(query), longest[0])
    demand_bounds(bounds[1], len(key), longest[1])


def checked_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options: Any) -> Tensor:
    """torch's varlen attention, whose own stand-in for fake tensors looks at nothing."""
    demand_varlen(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k))
    demand(options["window_size"][1] == 0, "not causal")
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
) -> Tensor:  # fmt: skip
    """In the place of flash-attn's function for packed rows."""
    demand_varlen(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    demand(causal, "not causal")
    options = {"scale": softmax_scale, "window_size": (-1, 0), **shared_prompt.GROUPED}
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


def flash_rows(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
) -> Tensor:  # fmt: skip
    """In the place of flash-attn's function for rows without padding."""
    bounds = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]
    heads = (x.flatten(0, 1) for x in (q, k, v))
    return flash_varlen(*heads, bounds, bounds, q.shape[1], k.shape[1], causal=causal, softmax_scale=softmax_scale).view_as(q)


class FlexKernel(torch.autograd.Function):
    """In the place of compiled flex attention: one kernel forward, three backward."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return query.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        heads = ctx.saved_tensors  # once: checkpointing computes them again for it
        demand(gradient.dtype == heads[0].dtype, "a gradient of another type")
        return tuple(torch.zeros_like(x) for x in heads)


def checked_flex(module, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **options: Any) -> tuple[Tensor, None]:
    """transformers' call of flex attention, which compiles. Heads are (1, heads, T, D)."""
    demand(query.dtype == key.dtype == value.dtype, f"types differ: {query.dtype}, {key.dtype}, {value.dtype}")
    demand(query.shape[-1] >= shared_prompt.FLEX_HEAD, f"a head of {query.shape[-1]}")
    demand(isinstance(mask, BlockMask) and mask.seq_lengths == (query.shape[2], key.shape[2]), "a mask of other lengths")
    numbers = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    demand(all(x.dtype == torch.int32 for x in numbers), "blocks are not numbered by int32")
    demand(len({x.device for x in (query, key, value, *numbers)}) == 1, "tensors of several devices")
    return FlexKernel.apply(query, key, value).transpose(1, 2).contiguous(), None


class TritonKernel:
    """In the place of a Triton kernel: looks at its arguments, and writes over the first as one kernel."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        demand(all(type(size) is int and size > 0 for size in grid), f"a grid of {grid}")
        return self.launch

    def launch(self, tile: Tensor, stride: int, targets: Tensor, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in (tile, targets, *args) if isinstance(x, Tensor)]
        demand({x.device.type for x in tensors} == {GPU}, "tensors of several devices")
        demand(targets.dtype == torch.int64 and all(x.is_contiguous() for x in tensors[1:]), "labels are not int64 in one row")
        demand(all(len(x) == len(tile) for x in tensors[1:]), "not one number a token")
        tile.zero_()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """In the place of cuBLAS's product with a float32 sum."""
    demand(total.dtype == torch.float32 and left.dtype == right.dtype, f"{left.dtype} and {right.dtype} into {total.dtype}")
    demand(total.shape == (left.shape[0], right.shape[1]) and left.shape[1] == right.shape[0], "shapes do not multiply")
    demand({x.device.type for x in (total, left, right)} == {GPU}, "tensors of several devices")
    total.zero_()


def load_flash(implementation: str, *_: Any, **__: Any) -> tuple[Callable | None, ...]:
    return flash_rows, flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input


@contextmanager
def gpu() -> Iterator[torch.device]:
    """Fake tensors, and the project takes the ways of a GPU."""
    device = set_up()
    kernel = TritonKernel()
    divided = types.SimpleNamespace(cdiv=lambda total, size: math.ceil(total / size))
    patches = [
        mock.patch.object(head, "has_fused_kernel", lambda device: device.type == GPU),
        mock.patch.object(shared_prompt, "varlen_attn", checked_varlen),
        mock.patch.object(shared_prompt, "flex_attention_forward", checked_flex),
        mock.patch.object(shared_prompt, "readers", on_the_host(shared_prompt.readers)),
        mock.patch.object(chunked_logprob, "_use_triton", lambda device: device.type == GPU),
        mock.patch.object(chunked_logprob, "_forward_kernel", kernel),
        mock.patch.object(chunked_logprob, "_backward_kernel", kernel),
        mock.patch.object(chunked_logprob, "_addmm_fp32", add_product),
        mock.patch.object(chunked_logprob, "triton", divided, create=True),
        mock.patch.object(flash_utils, "_lazy_imports", load_flash),
        mock.patch.object(flash_utils, "_loaded_implementation", None),
        mock.patch.object(FakeTensor, "tolist", as_list),
        mock.patch.object(PreTrainedModel, "_flash_attn_can_dispatch", return_value=True),
        mock.patch("transformers.modeling_utils.lazy_import_flash_attention", flash_utils.lazy_import_flash_attention),
        FakeTensorMode(allow_non_fake_inputs=True),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield device
