"""Attention for the packed batch: both responses of a pair read one prompt, which is computed once.

A pair is three segments of a single row: the prompt but its last token, then one branch per response, each opened by
that last token. A branch's keys are its prompt's, then its own; queries stand at the end of their keys, which is how
causal varlen kernels align them. Registered with transformers' attention interface, so no model code changes: the
layout travels as a keyword of the model's forward.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError

NAME = "shared_prompt_"  # in front of the attention implementation that a model had
BLOCK = 128  # of flex_attention
QUERY_BLOCK = 128  # on a CPU, where a mask does not save the work that it hides: a fifth less time than whole segments
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Architectures whose packed scores a test compares with their padded ones. Others may not hand the layout on to their
# attention, or keep a sliding window in the mask alone.
PROVEN = {
    "apertus", "arcee", "bitnet", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text",
    "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "hyperclovax",
    "llama", "minimax_m2", "ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3",
    "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2", "vaultgemma",
}  # fmt: skip


class Segment(NamedTuple):
    """Tokens of the row that attend together: to a prompt, if they are a branch, and causally to themselves."""

    start: int
    length: int
    prompt_start: int
    prompt_length: int


@dataclass(frozen=True, eq=False)
class SharedPrompt:
    """Who attends to whom in a packed row of T tokens and S segments; K keys in all, a prompt counted once per reader."""

    segments: tuple[Segment, ...]
    key_index: Tensor  # (K,) int32: the row's position of each key
    cu_queries: Tensor  # (S + 1,) int32: where each segment's queries begin
    cu_keys: Tensor  # (S + 1,) int32: where its keys begin in key_index
    max_queries: int
    max_keys: int
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)  # by window; filled by flex_attention

    def to(self, device: torch.device, non_blocking: bool = False) -> "SharedPrompt":
        """The layout on a device; accelerate's data loader calls this."""
        return self._each_tensor(partial(Tensor.to, device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "SharedPrompt":
        """The layout in pinned memory; torch's data loader calls this."""
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, function: Callable[[Tensor], Tensor]) -> "SharedPrompt":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()}, block_masks={})


def shared_prompt_layout(lengths: list[tuple[int, int, int]]) -> SharedPrompt:
    """The layout of pairs given as (prompt, chosen branch, rejected branch) lengths in tokens, one after the other."""
    segments: list[Segment] = []
    start = 0
    for prompt, *branches in lengths:
        if prompt:
            segments.append(Segment(start, prompt, start, 0))
        branch_start = start + prompt
        for branch in branches:
            segments.append(Segment(branch_start, branch, start, prompt))
            branch_start += branch
        start = branch_start
    keys = [
        torch.arange(first, first + length, dtype=torch.int32)
        for s in segments
        for first, length in ((s.prompt_start, s.prompt_length), (s.start, s.length))
    ]
    queries_each = [s.length for s in segments]
    keys_each = [s.prompt_length + s.length for s in segments]
    return SharedPrompt(
        segments=tuple(segments),
        key_index=torch.cat(keys),
        cu_queries=torch.tensor([0, *accumulate(queries_each)], dtype=torch.int32),
        cu_keys=torch.tensor([0, *accumulate(keys_each)], dtype=torch.int32),
        max_queries=max(queries_each),
        max_keys=max(keys_each),
    )


# ---- Kernels. Queries (1, heads, T, D), keys and values (1, key heads, T, D) -> (1, T, heads, D) ----


class Attend(NamedTuple):
    """What a layer asks of its attention, beside the tensors."""

    module: nn.Module
    layout: SharedPrompt
    scaling: float
    window: int | None  # keys a query sees, itself included; None: all
    softcap: float | None
    implementation: str
    dropout: float = 0.0


Kernel = Callable[[Tensor, Tensor, Tensor, Attend], Tensor]


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: causal, the last query on the last key; with a window, only the `window` keys up to it."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


def by_segment(query: Tensor, key: Tensor, value: Tensor, ask: Attend, attend: Callable[..., Tensor]) -> Tensor:
    """`attend(query, key, value, mask, ask)` for a few queries of a segment at a time, over the keys that any of them sees.

    The reference, and the way on a CPU.
    """
    segments = ask.layout.segments
    # One split: slices would each fill a row of zeros for their gradient.
    queries, keys, values = (x.split([s.length for s in segments], dim=2) for x in (query, key, value))
    starts = {s.start: number for number, s in enumerate(segments) if not s.prompt_length}
    outputs = []  # each (1, queries, heads, D)
    for number, segment in enumerate(segments):
        read = [starts[segment.prompt_start], number] if segment.prompt_length else [number]
        own_keys, own_values = (torch.cat([x[i] for i in read], dim=2) for x in (keys, values))
        end = segment.prompt_length
        for block in queries[number].split(QUERY_BLOCK, dim=2):
            first = 0 if ask.window is None else max(end - ask.window + 1, 0)
            end += block.shape[2]
            seen = slice(first, end)
            mask = causal_mask(block.shape[2], end - first, ask.window, query.device)
            outputs.append(attend(block, own_keys[:, :, seen], own_values[:, :, seen], mask, ask).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ask: Attend) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=ask.dropout, scale=ask.scaling, enable_gqa=True
    )


def attend_eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ask: Attend) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)) * ask.scaling  # (1, heads, queries, keys)
    if ask.softcap is not None:
        scores = ask.softcap * torch.tanh(scores / ask.softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # A float32 softmax, as in the models' own eager attention; a float64 model keeps float64.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, p=ask.dropout) @ value


def eager(query: Tensor, key: Tensor, value: Tensor, ask: Attend) -> Tensor:
    return by_segment(query, key, value, ask, attend_eager)


def sdpa(query: Tensor, key: Tensor, value: Tensor, ask: Attend) -> Tensor:
    """torch's varlen attention on a GPU; a mask per segment on a CPU, and where varlen does not run: old GPUs, float32."""
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or not has_flash(query.device):
        return by_segment(query, key, value, ask, attend_sdpa)
    refuse_dropout(ask)
    keys, values = (x[0].transpose(0, 1).index_select(0, ask.layout.key_index) for x in (key, value))
    output = varlen_attn(
        query[0].transpose(0, 1),
        keys,
        values,
        ask.layout.cu_queries,
        ask.layout.cu_keys,
        ask.layout.max_queries,
        ask.layout.max_keys,
        scale=ask.scaling,
        window_size=(-1 if ask.window is None else ask.window - 1, 0),
        enable_gqa=True,
    )
    return output[None]


def has_flash(device: torch.device) -> bool:
    """Whether varlen attention runs: flash attention does from Ampere on, not on a V100 or T4."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def refuse_dropout(ask: Attend) -> None:
    if ask.dropout:
        raise UserError(
            f"attention dropout is {ask.dropout}, which {ask.implementation} cannot apply to packed batches; set "
            "disable_dropout: true, as SimPO has it, or pair_layout: padded"
        )


def flash(query: Tensor, key: Tensor, value: Tensor, ask: Attend) -> Tensor:
    """flash-attn 2 or 3, or a kernel of the hub, through transformers' own call."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _flash_attention_forward(
        query,
        key.index_select(1, ask.layout.key_index),
        value.index_select(1, ask.layout.key_index),
        attention_mask=None,
        query_length=query.shape[1],
        is_causal=True,
        dropout=ask.dropout,
        softmax_scale=ask.scaling,
        sliding_window=ask.window,
        softcap=ask.softcap,
        cu_seq_lens_q=ask.layout.cu_queries,
        cu_seq_lens_k=ask.layout.cu_keys,
        max_length_q=ask.layout.max_queries,
        max_length_k=ask.layout.max_keys,
        target_dtype=get_target_dtype(query, ask.module),
        attn_implementation=ask.implementation,
    )


def flex(query: Tensor, key: Tensor, value: Tensor, ask: Attend) -> Tensor:
    refuse_dropout(ask)
    mask = ask.layout.block_masks.get(ask.window)
    if mask is None:
        mask = ask.layout.block_masks[ask.window] = block_mask(ask.layout, ask.window, query.device)
    output, _ = flex_attention_forward(ask.module, query, key, value, mask, scaling=ask.scaling, softcap=ask.softcap)
    return output


def block_mask(layout: SharedPrompt, window: int | None, device: torch.device) -> BlockMask:
    """The whole row's mask for flex_attention, in blocks."""
    tokens = sum(s.length for s in layout.segments)
    owner, reads, position = (torch.empty(tokens, dtype=torch.int32) for _ in range(3))
    for number, s in enumerate(layout.segments):
        own = slice(s.start, s.start + s.length)
        # A branch reads the segment in front of the pair's first branch: the one that starts where its prompt does.
        prompts = [i for i, other in enumerate(layout.segments) if s.prompt_length and other.start == s.prompt_start]
        owner[own], reads[own] = number, prompts[0] if prompts else number
        position[own] = torch.arange(s.prompt_length, s.prompt_length + s.length)
    owner, reads, position = (x.to(device) for x in (owner, reads, position))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - position[key]
        near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return near & ((owner[key] == owner[query]) | (owner[key] == reads[query]))

    numbers = torch.arange(tokens, device=device)
    # Block by block of queries: torch's create_block_mask holds several T x T.
    seen = [in_blocks(visible(numbers, numbers, rows[:, None], numbers)) for rows in numbers.split(BLOCK)]
    some, whole = (torch.stack(column) for column in zip(*seen, strict=True))  # (blocks of queries, blocks of keys)
    return BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(tokens, tokens)
    )


def in_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of keys, whether any is True and whether all of BLOCK x BLOCK are. mask: (at most BLOCK, T)."""
    queries, keys = mask.shape
    blocks = F.pad(mask, (0, -keys % BLOCK, 0, BLOCK - queries)).view(BLOCK, -1, BLOCK)
    return blocks.any(2).any(0), blocks.all(2).all(0)


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, those first; with axes for batch and heads."""
    count, order = blocks.sum(-1), blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return count.to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def kernel_of(implementation: str) -> Kernel | None:
    """The kernel that stands for an attention implementation of transformers; None: there is none."""
    named = {"sdpa": sdpa, "eager": eager, "flex_attention": flex}
    return flash if "flash" in implementation else named.get(implementation)


# ---- The model ----


def attention(implementation: str, kernel: Kernel) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What transformers calls: the kernel when a layout comes along, `implementation` as it was when none does."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        shared_prompt: SharedPrompt | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if shared_prompt is not None:
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            ask = Attend(module, shared_prompt, scaling, sliding_window, softcap, implementation, dropout)
            return kernel(query, key, value, ask), None
        options = {"sliding_window": sliding_window, "softcap": softcap}
        kwargs |= {name: option for name, option in options.items() if option is not None}
        plain = plain_attention(module, implementation)
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    return forward


def plain_attention(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention that a model had before it was prepared."""
    if "flash" in implementation:
        return partial(plain_flash, implementation=implementation)
    # Every model file defines its own eager attention.
    eager_attention = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)


def plain_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    implementation: str,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' flash attention, which would take the name of its kernel from the prepared model's config."""
    output = _flash_attention_forward(
        *(x.transpose(1, 2) for x in (query, key, value)),
        attention_mask,
        query_length=query.shape[2],
        is_causal=module.is_causal,
        softmax_scale=scaling,
        target_dtype=get_target_dtype(query, module),
        attn_implementation=implementation,
        **kwargs,
    )
    return output, None


def why_not(model: PreTrainedModel) -> str | None:
    """Why this model cannot train on packed batches; None if it can."""
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation.startswith(NAME):
        return None
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} has its own code, which may know nothing of transformers' attention"
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d) or hasattr(module, "A_log"):
            return f"{name} ({type(module).__name__}) mixes tokens outside attention"
        if hasattr(module, "sinks"):
            return f"{name} ({type(module).__name__}) has attention sinks"
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS):
        return f"it has layers of type {', '.join(others)}"
    if kernel_of(implementation) is None:
        return f"its attention, {implementation!r}, has no shared-prompt kernel"
    if config.model_type not in PROVEN:
        return f"{type(model).__name__} is not among the architectures that packed batches are proven for"
    return None


def use_shared_prompts(model: PreTrainedModel) -> None:
    """Let the model take a `shared_prompt` layout; called without one it works as before. Raises ValueError where it cannot."""
    if (reason := why_not(model)) is not None:
        raise ValueError(reason)
    implementation = model.config.get_text_config()._attn_implementation
    if implementation.startswith(NAME):
        return
    # transformers would look up a name with "flash" or "/" in it among its own kernels.
    name = NAME + re.sub(r"\W", "_", implementation).replace("flash", "fa")
    mask = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2" if "flash" in implementation else implementation]
    AttentionInterface.register(name, attention(implementation, kernel_of(implementation)))
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)
    if model.config.get_text_config()._attn_implementation != name:  # transformers only warns
        raise ValueError(f"{type(model).__name__} does not let its attention be chosen")
