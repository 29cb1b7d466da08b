"""Attention for the packed batch: both responses of a pair read one prompt, which is computed once.

A pair is three segments of a single row: the prompt but its last token, then one branch per response, each opened by
that last token. A branch's keys are its prompt's, then its own; queries stand at the end of their keys, which is how
causal varlen kernels align them. Registered with transformers' attention interface, so no model code changes: the
layout travels as a keyword of the model's forward.
"""

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError

NAME = "shared_prompt_"  # in front of the attention implementation that a model had
BLOCK = 128  # of flex_attention
FLEX_HEAD = 16  # the smallest head that it computes
FLEX_GRAPHS = 64  # that torch may keep of it: lengths of several classes, with a gradient and without; torch's own limit is 8
# On a CPU, where a mask does not save the work that it hides: a fifth less time than whole segments. On a GPU the launches of
# so many small products cost more than they save: 2,183 a layer and micro-batch against 551.
QUERY_BLOCK = 128
# torch 2.11 has no such argument; its kernel takes fewer key heads than query heads as they are.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
PREPARED: dict[str, str] = {}  # the attention of a model that takes a layout -> the one it had
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


class SharedPrompt:
    """Who attends to whom in a packed row of T tokens and S segments; K keys in all, a prompt counted once per reader.

    key_index: (K,) int32, the row's position of each key; cu_queries, cu_keys: (S + 1,) int32, where each segment's queries,
    and its keys in key_index, begin. They are parts of one tensor, so that one copy moves them to a GPU.

    No dataclass: FSDP copies those for every layer, to cast what is in them, and block masks would be made again for each.
    """

    def __init__(self, segments: tuple[Segment, ...], numbers: Tensor):
        self.segments = segments
        self.numbers = numbers  # key_index, cu_queries and cu_keys
        self.key_index, self.cu_queries, self.cu_keys = numbers.split(
            [len(numbers) - 2 * len(segments) - 2, *[len(segments) + 1] * 2]
        )
        self.max_queries = max(s.length for s in segments)
        self.max_keys = max(s.prompt_length + s.length for s in segments)
        self.block_masks: dict[int | None, BlockMask] = {}  # by window; filled by flex_attention

    def __getstate__(self) -> tuple[tuple[Segment, ...], Tensor]:
        return self.segments, self.numbers

    def __setstate__(self, state: tuple[tuple[Segment, ...], Tensor]) -> None:
        self.__init__(*state)

    def to(self, device: torch.device, non_blocking: bool = False) -> "SharedPrompt":
        """The layout on a device; accelerate's data loader calls this. Itself where it is there already."""
        numbers = self.numbers.to(device, non_blocking=non_blocking)
        return self if numbers is self.numbers else SharedPrompt(self.segments, numbers)

    def pin_memory(self) -> "SharedPrompt":
        """The layout in pinned memory; torch's data loader calls this."""
        return SharedPrompt(self.segments, self.numbers.pin_memory())


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
    cu_queries = [0, *accumulate(s.length for s in segments)]
    cu_keys = [0, *accumulate(s.prompt_length + s.length for s in segments)]
    return SharedPrompt(tuple(segments), torch.cat([*keys, torch.tensor(cu_queries + cu_keys, dtype=torch.int32)]))


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


@torch.compiler.disable  # its lengths are numbers of Python: every batch would be compiled anew
def by_segment(query: Tensor, key: Tensor, value: Tensor, ask: Attend, attend: Callable[..., Tensor]) -> Tensor:
    """`attend(query, key, value, mask, ask)` for a few queries of a segment at a time, over the keys that any of them sees.

    The reference, and the way on a CPU.
    """
    segments = ask.layout.segments
    queries_at_once = QUERY_BLOCK if query.device.type == "cpu" else query.shape[2]
    # One split: slices would each fill a row of zeros for their gradient.
    queries, keys, values = (x.split([s.length for s in segments], dim=2) for x in (query, key, value))
    starts = {s.start: number for number, s in enumerate(segments) if not s.prompt_length}
    outputs = []  # each (1, queries, heads, D)
    for number, segment in enumerate(segments):
        read = [starts[segment.prompt_start], number] if segment.prompt_length else [number]
        own_keys, own_values = (torch.cat([x[i] for i in read], dim=2) for x in (keys, values))
        end = segment.prompt_length
        for block in queries[number].split(queries_at_once, dim=2):
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
    query, key, value = in_autocast_dtype(query, key, value)
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
        **GROUPED,
    )
    return output[None]


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch casts what goes into its own attention: a rotation has left queries and keys in float32."""
    if tensors[0].is_cuda and torch.is_autocast_enabled("cuda"):
        return tuple(x.to(torch.get_autocast_dtype("cuda")) for x in tensors)
    return tensors


def flex_in_one_type(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' flex attention of padded rows, which refuses what autocast leaves: float32 beside half precision."""
    return flex_attention_forward(module, *in_autocast_dtype(query, key, value), *args, **kwargs)


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


def eager_or_flex(query: Tensor, key: Tensor, value: Tensor, ask: Attend) -> Tensor:
    """Eager's arithmetic, soft-capping and all, by a kernel that holds no scores, where there is one."""
    has_kernel = query.is_cuda and not ask.dropout and query.shape[-1] >= FLEX_HEAD
    return (flex if has_kernel else eager)(query, key, value, ask)


def flex(query: Tensor, key: Tensor, value: Tensor, ask: Attend) -> Tensor:
    refuse_dropout(ask)
    # Beyond the limit flex_attention would run uncompiled, and hold the scores of the whole row.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, FLEX_GRAPHS)
    query, key, value = in_autocast_dtype(query, key, value)
    mask = ask.layout.block_masks.get(ask.window)
    if mask is None:
        mask = ask.layout.block_masks[ask.window] = block_mask(ask.layout, ask.window, query.device)
    output, _ = flex_attention_forward(ask.module, query, key, value, mask, scaling=ask.scaling, softcap=ask.softcap)
    return output


def readers(layout: SharedPrompt) -> Tensor:
    """(3, T) int32: of each token its segment, the segment that it reads besides, and its position in its sequence."""
    first = {s.start: number for number, s in enumerate(layout.segments) if not s.prompt_length}
    columns = [
        (n, first[s.prompt_start] if s.prompt_length else n, s.prompt_length - s.start) for n, s in enumerate(layout.segments)
    ]
    owner, reads, shift = torch.tensor(columns, dtype=torch.int32).T.repeat_interleave(
        torch.tensor([s.length for s in layout.segments]), dim=1
    )
    return torch.stack([owner, reads, shift + torch.arange(len(shift), dtype=torch.int32)])


@torch.compiler.disable  # as by_segment: compiled layers would be compiled anew for every batch
def block_mask(layout: SharedPrompt, window: int | None, device: torch.device) -> BlockMask:
    """The whole row's mask for flex_attention, in blocks."""
    tokens = sum(s.length for s in layout.segments)
    numbers = readers(layout)
    owner, reads, position = (numbers if device.type == "cpu" else numbers.pin_memory()).to(device, non_blocking=True)

    # Not the window itself: for torch a number, or none, would be other code, and each window have graphs of its own.
    first = position - (tokens if window is None else window - 1)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (position[key] >= first[query]) & (position[key] <= position[query])
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


def kernel_of(implementation: str, *, keeps_eager: bool = False) -> Kernel | None:
    """The kernel that stands for an attention implementation of transformers; None: there is none.

    keeps_eager: compute eager attention as it is written, on a GPU too.
    """
    named = {"sdpa": sdpa, "eager": eager if keeps_eager else eager_or_flex, "flex_attention": flex}
    return flash if "flash" in implementation else named.get(implementation)


def asked_attention(config: PreTrainedConfig) -> str:
    """The attention implementation that a model was loaded with, whether or not it has been prepared since."""
    name = config.get_text_config()._attn_implementation
    return PREPARED.get(name, name)


def describe_kernel(model: PreTrainedModel, device: torch.device, *, layout: str, half: bool) -> str:
    """What computes a model's attention there, and why.

    layout: "padded", "packed", or "kept", packed rows under eager attention as it is written. half: in bf16 or fp16.
    """
    config = model.config.get_text_config()
    name = asked_attention(config)
    if layout == "padded":
        return f"{name}, as transformers has it"
    if name == "flex_attention":
        return "flex_attention, as asked"
    if device.type != "cuda":
        return f"{name}, segment by segment"
    if name == "eager" and layout == "kept":
        return "eager, whole segments, because pair_layout is packed"
    if name == "eager":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if size < FLEX_HEAD:
            return f"eager, whole segments, because flex_attention has no heads of {size}"
        if getattr(config, "attention_dropout", 0) and any(getattr(m, "attention_dropout", 0) for m in model.modules()):
            return "eager, whole segments, because flex_attention has no dropout"
        return "flex_attention: the arithmetic of eager, without its scores in memory"
    if name == "sdpa" and not half:
        return "sdpa with a mask for each segment, because flash attention does not compute float32"
    if name == "sdpa" and not has_flash(device):
        return "sdpa with a mask for each segment, because flash attention does not run on this GPU"
    return "torch's varlen flash attention, which is sdpa's for rows without padding" if name == "sdpa" else f"{name}, as asked"


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


def use_shared_prompts(model: PreTrainedModel, *, keeps_eager: bool = False) -> None:
    """Let the model take a `shared_prompt` layout; called without one it works as before. Raises ValueError where it cannot.

    keeps_eager: see `kernel_of`.
    """
    if (reason := why_not(model)) is not None:
        raise ValueError(reason)
    implementation = model.config.get_text_config()._attn_implementation
    if implementation.startswith(NAME):
        return
    # transformers would look up a name with "flash" or "/" in it among its own kernels.
    name = NAME + re.sub(r"\W", "_", implementation).replace("flash", "fa") + "_kept" * keeps_eager
    mask = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2" if "flash" in implementation else implementation]
    AttentionInterface.register(name, attention(implementation, kernel_of(implementation, keeps_eager=keeps_eager)))
    AttentionMaskInterface.register(name, mask)
    PREPARED[name] = implementation
    model.set_attn_implementation(name)
    if model.config.get_text_config()._attn_implementation != name:  # transformers only warns
        raise ValueError(f"{type(model).__name__} does not let its attention be chosen")
