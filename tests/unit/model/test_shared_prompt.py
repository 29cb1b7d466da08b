"""Attention of the packed batch against plain attention over the whole row, and models that it must leave alone."""

import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaForCausalLM,
    MambaConfig,
    NemotronConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)
from transformers.integrations import flex_attention as transformers_flex

from alignment.errors import UserError
from alignment.model import shared_prompt
from alignment.model.head import add_lm_head
from alignment.model.shared_prompt import (
    Attend,
    SharedPrompt,
    block_mask,
    by_segment,
    causal_mask,
    describe_kernel,
    eager,
    flash,
    flex,
    sdpa,
    shared_prompt_layout,
    use_shared_prompts,
    why_not,
)
from alignment.preference.collate import PackedCollator, PaddedCollator
from alignment.preference.losses import response_sums
from tests import reference
from tests.builders import SIZES, VOCABULARY, tiny_model, token_rows

Lengths = list[tuple[int, int, int]]
LENGTHS = [(2, 3, 1), (0, 2, 2), (6, 4, 7)]
WINDOWS = [None, 1, 3, 100]
some_lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
few = settings(max_examples=10)


def dense_mask(lengths: Lengths, window: int | None) -> Tensor:
    """(T, T) bool, said token by token: a query sees the prompt of its pair and its own branch, up to itself."""
    tokens = [
        (pair, branch, position)
        for pair, (prompt, *branches) in enumerate(lengths)
        for branch, first, length in ((None, 0, prompt), *((i, prompt, length) for i, length in enumerate(branches)))
        for position in range(first, first + length)
    ]

    def sees(query: tuple, key: tuple) -> bool:
        (pair, branch, position), (key_pair, key_branch, key_position) = query, key
        distance = position - key_position
        near = distance >= 0 and (window is None or distance < window)
        return near and pair == key_pair and key_branch in (None, branch)

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


# ---- The layout ----


def test_the_layout_of_two_pairs_written_out():
    layout = shared_prompt_layout([(2, 3, 1), (0, 2, 2)])
    #                          start, length, prompt_start, prompt_length
    assert layout.segments == ((0, 2, 0, 0), (2, 3, 0, 2), (5, 1, 0, 2), (6, 2, 6, 0), (8, 2, 6, 0))
    assert layout.key_index.tolist() == [0, 1, *(0, 1, 2, 3, 4), *(0, 1, 5), *(6, 7), *(8, 9)]
    assert layout.cu_queries.tolist() == [0, 2, 5, 6, 8, 10]
    assert layout.cu_keys.tolist() == [0, 2, 7, 10, 12, 14]
    assert (layout.max_queries, layout.max_keys) == (3, 5)
    assert {layout.key_index.dtype, layout.cu_queries.dtype, layout.cu_keys.dtype} == {torch.int32}  # varlen kernels insist


def test_the_mask_of_a_branch_of_three_tokens_behind_two_written_out():
    assert causal_mask(3, 5, None, torch.device("cpu")).int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert causal_mask(3, 5, 2, torch.device("cpu")).int().tolist() == [
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@few
@given(lengths=some_lengths, window=st.sampled_from(WINDOWS))
def test_a_token_sees_its_prompt_and_its_own_branch_up_to_itself_within_the_window(lengths, window):
    layout = shared_prompt_layout(lengths)
    tokens = sum(map(sum, lengths))
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for segment, (first, end) in zip(layout.segments, pairwise(layout.cu_keys.tolist()), strict=True):
        keys = layout.key_index[first:end].long()
        mask = causal_mask(segment.length, len(keys), window, seen.device)
        seen[segment.start : segment.start + segment.length, keys] = mask
    assert torch.equal(seen, dense_mask(lengths, window))


@few
@given(lengths=some_lengths, window=st.sampled_from(WINDOWS))
def test_the_block_mask_is_the_union_of_the_segments_masks(lengths, window):
    tokens = sum(map(sum, lengths))
    mask = block_mask(shared_prompt_layout(lengths), window, torch.device("cpu"))
    seen = flex_attention.create_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu")
    assert torch.equal(seen[0, 0], dense_mask(lengths, window))


@pytest.mark.parametrize("window", [None, 40])
def test_the_block_mask_has_the_blocks_that_torch_would_find(window):
    lengths = [(150, 100, 60), (10, 200, 40), (0, 300, 290)]
    ours = block_mask(shared_prompt_layout(lengths), window, torch.device("cpu"))
    theirs = flex_attention.create_block_mask(ours.mask_mod, None, None, 1150, 1150, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(ours, f"{kind}_{name}") for name in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(theirs, f"{kind}_num_blocks"))
        for row, count in enumerate(counts[0, 0].tolist()):
            assert torch.equal(indices[0, 0, row, :count], getattr(theirs, f"{kind}_indices")[0, 0, row, :count])
    assert (ours.full_kv_num_blocks.sum() > 0) == (window is None)


@pytest.mark.parametrize("window", [None, 40])
def test_blocks_of_the_block_mask_are_empty_where_nobody_reads(window):
    lengths, block = [(150, 100, 60), (10, 200, 40)], 128
    mask = block_mask(shared_prompt_layout(lengths), window, torch.device("cpu"))
    dense = nn.functional.pad(dense_mask(lengths, window), (0, -560 % block, 0, -560 % block))
    blocks = dense.unflatten(0, (-1, block)).unflatten(-1, (-1, block)).any(-1).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)
    assert not blocks.all()


# ---- The layout travels ----


def same(a: SharedPrompt, b: SharedPrompt) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("key_index", "cu_queries", "cu_keys"))
    return tensors and (a.segments, a.max_queries, a.max_keys) == (b.segments, b.max_queries, b.max_keys)


def test_a_layout_is_pickled_whole():
    layout = shared_prompt_layout(LENGTHS)
    assert same(pickle.loads(pickle.dumps(layout)), layout)


def test_workers_of_a_data_loader_hand_over_the_batches_that_this_process_makes():
    rows = token_rows([(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6)])
    made_here, made_there = (
        list(DataLoader(rows, batch_size=2, collate_fn=PackedCollator(), num_workers=workers)) for workers in (0, 2)
    )
    assert len(made_there) == 2
    for here, there in zip(made_here, made_there, strict=True):
        assert same(here.pop("shared_prompt"), there.pop("shared_prompt"))
        tensors = {key: value for key, value in here.items() if isinstance(value, Tensor)}
        torch.testing.assert_close({key: there[key] for key in tensors}, tensors, rtol=0, atol=0)


def test_accelerate_moves_the_layout_with_its_batch():
    batch = PackedCollator()(token_rows([(5, 3, 9)]))
    batch["shared_prompt"].block_masks[None] = block_mask(batch["shared_prompt"], None, torch.device("cpu"))
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)["shared_prompt"]
    assert {moved.key_index.device.type, moved.cu_queries.device.type, moved.cu_keys.device.type} == {"meta"}
    assert (moved.segments, moved.max_keys) == (batch["shared_prompt"].segments, batch["shared_prompt"].max_keys)
    assert moved.block_masks == {}  # they hold tensors of the other device


# ---- Kernels, against one softmax over the whole row ----


class Heads(NamedTuple):
    """(1, 4 heads, T, 8), (1, 2 heads, T, 8), (1, 2 heads, T, 8)"""

    query: Tensor
    key: Tensor
    value: Tensor


def random_heads(tokens: int, dtype: torch.dtype = torch.float64) -> Heads:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, tokens, 8) for heads in (4, 2, 2))
    return Heads(*(torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes))


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """(heads, Q, D), (key heads, K, D), (key heads, K, D), (Q, K) bool -> (Q, heads, D), float64 inside."""
    groups = len(query) // len(key)
    q, k, v = (x.double() for x in (query, key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)))
    scores = q @ k.mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1).to(query.dtype)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    left: int,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """What a causal varlen kernel computes, (T, heads, D): segment by segment, the last query on the last key."""
    outputs = []
    for (q, q_end), (k, k_end) in zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True):
        last = (k_end - k) - (q_end - q) + torch.arange(q_end - q)[:, None]  # the last key of each query
        behind = last - torch.arange(k_end - k)
        mask = (behind >= 0) & ((behind <= left) | (left < 0))
        heads = (query[q:q_end], key[k:k_end], value[k:k_end])
        outputs.append(masked_attention(*(x.transpose(0, 1) for x in heads), mask, scaling, softcap))
    return torch.cat(outputs)


class FlashCalls(NamedTuple):
    """Which kernels were loaded, and the dropout of every varlen call."""

    loaded: list[str]
    dropouts: list[float]


@pytest.fixture
def flash_attn(monkeypatch) -> FlashCalls:
    """transformers finds a flash-attn of ours, without dropout, under its own names only."""
    calls = FlashCalls([], [])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        calls.dropouts.append(dropout_p)
        assert causal
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k == cu_seqlens_k.diff().max()
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, window_size[0], softmax_scale, softcap or None)

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
    ):  # fmt: skip
        lengths = [torch.arange(len(x) + 1) * x.shape[1] for x in (q, k)]
        output = varlen(*(x.flatten(0, 1) for x in (q, k, v)), *lengths, window_size[0], softmax_scale, softcap or None)
        return output.view_as(q)

    def load(implementation: str, *args: Any, **kwargs: Any) -> tuple[Callable | None, ...]:
        if implementation not in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
            raise ImportError(f"no flash attention is called {implementation}")
        calls.loaded.append(implementation)
        pads = (flash_utils._pad_input, flash_utils._unpad_input)
        return (flash_attn_func, flash_attn_varlen_func, None, *pads)

    monkeypatch.setattr(flash_utils, "_lazy_imports", load)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", flash_utils.lazy_import_flash_attention)
    return calls


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """flex_attention as it is written, not compiled: compiled it has no backward on a CPU."""

    def plain_flex(query: Tensor, key: Tensor, value: Tensor, training: bool, **options: Any) -> Tensor:
        return flex_attention.flex_attention(query, key, value, **options)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", plain_flex)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *heads: None)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # it is traced even so
        yield


def ask_of(layout: SharedPrompt, window: int | None = None, softcap: float | None = None, implementation: str = "") -> Attend:
    return Attend(nn.Linear(1, 1), layout, 0.3, window, softcap, dropout=0.0, implementation=implementation)


def assert_attends_as_the_whole_row(kernel: Callable, window: int | None, softcap: float | None, **names: str) -> None:
    heads = random_heads(sum(map(sum, LENGTHS)))
    expected = masked_attention(*(x[0] for x in heads), dense_mask(LENGTHS, window), 0.3, softcap)[None]
    output = kernel(*heads, ask_of(shared_prompt_layout(LENGTHS), window, softcap, **names))
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((output * weights).sum(), heads),
        torch.autograd.grad((expected * weights).sum(), heads),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("block", [1, 3, 4, 128])
@pytest.mark.parametrize("window", WINDOWS)
def test_sdpa_on_a_cpu_attends_as_one_softmax_over_the_row(window, block, monkeypatch):
    monkeypatch.setattr(shared_prompt, "QUERY_BLOCK", block)
    assert_attends_as_the_whole_row(sdpa, window, None)


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_eager_attends_as_one_softmax_over_the_row(window, softcap, block, monkeypatch):
    monkeypatch.setattr(shared_prompt, "QUERY_BLOCK", block)
    assert_attends_as_the_whole_row(eager, window, softcap)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_block_of_queries_is_given_only_keys_that_one_of_them_sees(window, monkeypatch):
    monkeypatch.setattr(shared_prompt, "QUERY_BLOCK", 4)
    masks: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ask: Attend) -> Tensor:
        assert mask.shape == (query.shape[2], key.shape[2])
        masks.append(mask)
        return query

    by_segment(*random_heads(sum(map(sum, LENGTHS))), ask_of(shared_prompt_layout(LENGTHS), window), attend)
    assert all(mask.any(0).all() for mask in masks)
    assert max(map(len, masks)) == 4


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_flex_attends_as_one_softmax_over_the_row(window, softcap, flex_on_cpu):
    assert_attends_as_the_whole_row(flex, window, softcap)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", WINDOWS)
def test_flash_attends_as_one_softmax_over_the_row(window, softcap, implementation, flash_attn):
    assert_attends_as_the_whole_row(flash, window, softcap, implementation=implementation)
    assert flash_attn.loaded == [implementation]


class SaysCuda(Tensor):
    """A tensor of this CPU that takes the way of a GPU."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpa_on_a_gpu_hands_varlen_attention_the_gathered_keys(window, dtype, monkeypatch):
    layout, calls = shared_prompt_layout(LENGTHS), []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, **grouped) -> Tensor:
        calls.append((max_q, max_k, window_size[1], grouped))
        return varlen(query, key, value, cu_seq_q, cu_seq_k, window_size[0], scale, softcap=None)

    monkeypatch.setattr(shared_prompt, "varlen_attn", varlen_attn)
    heads = [x.detach() for x in random_heads(sum(map(sum, LENGTHS)), dtype)]
    output = sdpa(*(x.as_subclass(SaysCuda) for x in heads), ask_of(layout, window)).as_subclass(Tensor)
    expected = masked_attention(*(x[0] for x in heads), dense_mask(LENGTHS, window), 0.3, None)[None]
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert calls == [(layout.max_queries, layout.max_keys, 0, shared_prompt.GROUPED)]


@pytest.fixture
def cuda_autocast():
    """What `torch.autocast("cuda", torch.bfloat16)` sets where there is a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", torch.float16)


@pytest.mark.usefixtures("ampere", "cuda_autocast")
def test_sdpa_on_a_gpu_computes_in_the_dtype_of_its_autocast(monkeypatch):
    dtypes = []

    def varlen_attn(query, key, value, *args, **kwargs) -> Tensor:
        dtypes.extend(x.dtype for x in (query, key, value))
        return query

    monkeypatch.setattr(shared_prompt, "varlen_attn", varlen_attn)
    heads = [x.detach().as_subclass(SaysCuda) for x in random_heads(sum(map(sum, LENGTHS)), torch.float32)]
    sdpa(*heads, ask_of(shared_prompt_layout(LENGTHS)))
    assert dtypes == [torch.bfloat16] * 3


def test_sdpa_on_a_gpu_without_flash_attention_masks_each_segment(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(shared_prompt, "varlen_attn", None)
    heads = [x.detach() for x in random_heads(sum(map(sum, LENGTHS)), torch.float16)]
    ask = ask_of(shared_prompt_layout(LENGTHS))
    output = sdpa(*(x.as_subclass(SaysCuda) for x in heads), ask).as_subclass(Tensor)
    torch.testing.assert_close(output, sdpa(*heads, ask), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [sdpa, eager])
def test_an_attention_output_is_contiguous_because_models_view_it(kernel):
    output = kernel(*random_heads(sum(map(sum, LENGTHS))), ask_of(shared_prompt_layout(LENGTHS)))
    assert output.is_contiguous()


# ---- A prepared model that is given no layout ----


def padded(lengths: list[int], side: str) -> dict[str, Tensor]:
    """Random ids, padded on one side."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask if side == "right" else mask.flip(1)}


def outputs_without_a_layout(model: PreTrainedModel) -> dict[str, Tensor]:
    model.eval()
    prompts = padded([3, 12, 7], "left")
    new = model.generate(**prompts, max_new_tokens=12, do_sample=False, pad_token_id=0, output_logits=True,
                         return_dict_in_generate=True)  # fmt: skip
    whole = model(input_ids=prompts["input_ids"])
    return {
        "padded on the right": model(**padded([20, 4, 11], "right")).logits,
        "no padding": whole.logits,
        "generated": new.sequences,
        "generated logits": torch.stack(new.logits),
    }


@pytest.mark.parametrize(
    ("kind", "attention"),
    [*((kind, attention) for kind in ("llama", "mistral", "qwen2") for attention in ("sdpa", "eager")), ("gemma2", "eager")],
)
def test_generation_and_padded_forwards_of_a_prepared_model_are_unchanged(kind, attention):
    model = tiny_model(kind, attn_implementation=attention)
    before = outputs_without_a_layout(model)
    use_shared_prompts(model)
    torch.testing.assert_close(outputs_without_a_layout(model), before, rtol=0, atol=0)


def flash_model(kind: str, implementation: str, **settings: Any) -> PreTrainedModel:
    model = tiny_model(kind, dtype=torch.float64, **settings)
    model.config._attn_implementation = implementation
    return model


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_model_with_flash_attention_is_prepared_and_scores_packed_rows(kind, implementation, flash_attn):
    batch = PackedCollator()(token_rows([(5, 3, 9), (2, 12, 4), (20, 6, 6)]))
    eager_model = tiny_model(kind, dtype=torch.float64, attn_implementation="eager")
    model = flash_model(kind, implementation)
    for each in (eager_model, model):
        use_shared_prompts(each)
    # Norms are rounded to float32.
    torch.testing.assert_close(scores(model, batch), scores(eager_model, batch), rtol=0, atol=1e-5)
    assert set(flash_attn.loaded) == {implementation}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_padded_forwards_of_a_prepared_model_with_flash_attention_are_unchanged(kind, flash_attn):
    model = flash_model(kind, "flash_attention_2")
    before = outputs_without_a_layout(model)
    use_shared_prompts(model)
    torch.testing.assert_close(outputs_without_a_layout(model), before, rtol=0, atol=0)


def test_the_saved_config_of_a_prepared_model_is_the_models_own():
    model = tiny_model()
    before = model.config.to_json_string()
    use_shared_prompts(model)
    assert model.config.to_json_string() == before


def test_a_model_may_be_prepared_twice():
    model = tiny_model()
    expected = outputs_without_a_layout(model)
    for _ in range(2):
        use_shared_prompts(model)
    batch = PackedCollator()(token_rows([(5, 3, 9)]))
    torch.testing.assert_close(outputs_without_a_layout(model), expected, rtol=0, atol=0)
    assert torch.isfinite(scores(model, batch)).all()


# ---- Models that cannot ----


def scores(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """(2B,) summed log-probabilities, from all logits."""
    inputs = {key: value for key, value in batch.items() if key not in ("is_response", "index", "shift_labels")}
    logps = model(**inputs, use_cache=False).logits.log_softmax(-1)
    token_logps = logps.gather(-1, batch["shift_labels"].clamp(min=0)[..., None]).squeeze(-1)
    return token_logps.where(batch["is_response"], 0).sum(-1)


def random_model(config_type: type[PreTrainedConfig], **own: Any) -> PreTrainedModel:
    fields = {key: value for key, value in SIZES.items() if key not in own}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_type(**fields, **own))


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


each_that_cannot = pytest.mark.parametrize(
    ("config_type", "own", "culprit"),
    [
        (MambaConfig, {}, "mixer (MambaMixer)"),
        (BambaConfig, {**MAMBA2, "attn_layer_indices": [1]}, "mamba (BambaMixer)"),
        (
            Qwen3NextConfig,
            {**EXPERTS, **LINEAR, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
            "linear_attn (Qwen3NextGatedDeltaNet)",
        ),
        (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "self_attn (GptOssAttention)"),
        (FalconConfig, {"alibi": True}, "FalconForCausalLM"),
        (BloomConfig, {"n_head": 4}, "BloomForCausalLM"),
        (Llama4TextConfig, {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}, "chunked_attention"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)


@each_that_cannot
def test_a_model_that_cannot_share_prompts_is_refused_with_the_reason(config_type, own, culprit):
    model = random_model(config_type, **own)
    assert culprit in why_not(model)
    with pytest.raises(ValueError, match=re.escape(why_not(model))):
        use_shared_prompts(model)


@each_that_cannot
def test_a_model_that_cannot_share_prompts_is_scored_in_padded_rows(config_type, own, culprit):
    model = random_model(config_type, **own)
    rows = token_rows([(5, 3, 9), (2, 12, 4)])
    expected = torch.cat(reference.mean_logps(model, rows))
    add_lm_head(model)
    batch = PaddedCollator(pad_token_id=0)(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "shift_labels")}
    logps, tokens = response_sums(model(**inputs, use_cache=False, fused_lm_head=True).log_probs, batch["is_response"])
    torch.testing.assert_close(logps / tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen2", "phi", "granite", "cohere", "mixtral"])
def test_a_model_that_can_share_prompts_is_not_refused(kind):
    assert why_not(tiny_model(kind)) is None


class OwnLlama(LlamaForCausalLM):
    """As a model with remote code: an architecture's name, and code that nobody here has seen."""


def test_a_model_with_its_own_code_is_refused_whatever_it_calls_itself():
    model = OwnLlama(tiny_model().config)
    assert why_not(model) == "OwnLlama has its own code, which may know nothing of transformers' attention"


def test_an_attention_that_cannot_be_chosen_is_an_error_and_not_a_silent_full_attention(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda *_: None)  # as transformers: it only warns
    with pytest.raises(ValueError, match="LlamaForCausalLM does not let its attention be chosen"):
        use_shared_prompts(tiny_model())


def test_an_attention_that_is_not_known_is_refused_by_its_name():
    model = tiny_model()
    model.config._attn_implementation = "paged|eager"
    assert "'paged|eager'" in why_not(model)


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("config_type", "own"),
    [
        # Its decoder layers hand no keywords on: the layout never reaches the attention.
        (NemotronConfig, {}),
        # Their windows are in the mask alone: the attention is not told of them.
        (PhimoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
        (Qwen2MoeConfig, {**EXPERTS, **SLIDING}),
        # It computes a mask of its own in every layer.
        (DogeConfig, {}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_model_whose_packed_scores_would_be_wrong_is_refused(config_type, own):
    assert why_not(random_model(config_type, **own)) is not None


# ---- Dropout ----


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_dropout_is_applied_to_packed_rows(attention):
    model = tiny_model(attention_dropout=0.5, attn_implementation=attention).train()
    use_shared_prompts(model)
    batch = PackedCollator()(token_rows([(5, 3, 9)]))
    first, second = (scores(model, batch) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(scores(model.eval(), batch), scores(model, batch))


def test_attention_dropout_is_handed_to_flash_attention(flash_attn):
    ask = ask_of(shared_prompt_layout(LENGTHS), implementation="flash_attention_2")._replace(dropout=0.5)
    flash(*random_heads(sum(map(sum, LENGTHS))), ask)
    assert flash_attn.dropouts == [0.5]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prepared_model_without_a_layout_keeps_its_attention_dropout(attention):
    def seeded(model: PreTrainedModel) -> Tensor:
        torch.manual_seed(1)
        return model(**padded([20, 4, 11], "right")).logits

    model = tiny_model(attention_dropout=0.5, attn_implementation=attention).train()
    before = seeded(model)
    use_shared_prompts(model)
    torch.testing.assert_close(seeded(model), before, rtol=0, atol=0)
    assert not torch.equal(before, seeded(model.eval()))


def test_flex_attention_keeps_few_graphs_whatever_the_lengths_and_windows(monkeypatch):
    """Beyond torch's limit it would run uncompiled. With a backend that runs the graphs as they are."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention.flex_attention, backend=graphs)

    def friendly(query: Tensor, key: Tensor, value: Tensor, training: bool, **options: Any) -> Tensor:
        return compiled(query, key, value, **options)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", friendly)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *heads: None)
    counted = []
    for number in range(12):
        layout = shared_prompt_layout([(5 + number, 60 + 9 * number, 70), (3, 40 + number, 11)])
        heads = random_heads(sum(s.length for s in layout.segments))
        for no_gradient in (True, False):
            with torch.set_grad_enabled(not no_gradient):
                for window in (None, 32):
                    ask = ask_of(layout, window=window, softcap=30.0, implementation="flex_attention")
                    expected = eager(*heads, ask)
                    torch.testing.assert_close(flex(*heads, ask), expected, rtol=1e-4, atol=1e-5)
        counted.append(graphs.frame_count)
    assert counted[-1] <= 6, counted  # with a window and without one alike
    assert counted[7:] == counted[-1:] * 5, counted
    assert torch._dynamo.config.recompile_limit >= shared_prompt.FLEX_GRAPHS


def test_compiled_layers_keep_few_graphs_with_flex_attention_too(monkeypatch):
    """Both windows of Gemma-2, without a gradient."""

    def traced(query: Tensor, key: Tensor, value: Tensor, training: bool, **options: Any) -> Tensor:
        return flex_attention.flex_attention(query, key, value, **options)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", traced)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", shared_prompt.FLEX_GRAPHS)
    config = Gemma2Config(**SIZES | {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 16})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention").eval()
    use_shared_prompts(model)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    for layer in model.model.layers:
        layer.compile(backend=graphs, dynamic=True)
    counted = []
    for number in range(6):
        layout = shared_prompt_layout([(20 + 30 * number, 13 + 9 * number, 12), (7, 31 + number, 9)])
        ids = torch.randint(VOCABULARY, (1, sum(s.length for s in layout.segments)))
        mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)  # as the collator has it
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, shared_prompt=layout, use_cache=False)
        counted.append(graphs.frame_count)
    assert counted[0] > 0
    assert counted[3:] == [counted[2]] * 3, counted


@pytest.mark.parametrize(
    ("asked", "layout", "settings", "half", "ampere", "said"),
    [
        ("sdpa", "packed", {}, True, True, "torch's varlen flash attention, which"),
        (
            "sdpa",
            "packed",
            {},
            False,
            True,
            "sdpa with a mask for each segment, because flash attention does not compute float32",
        ),
        ("sdpa", "packed", {}, True, False, "because flash attention does not run on this GPU"),
        ("sdpa", "padded", {}, True, True, "sdpa, as transformers has it"),
        ("eager", "packed", {"head_dim": 16}, True, True, "flex_attention: the arithmetic of eager"),
        ("eager", "packed", {"head_dim": 8}, True, True, "eager, whole segments, because flex_attention has no heads of 8"),
        ("eager", "packed", {"head_dim": 16, "attention_dropout": 0.1}, True, True, "because flex_attention has no dropout"),
        ("eager", "kept", {"head_dim": 16}, True, True, "eager, whole segments, because pair_layout is packed"),
        ("flash_attention_2", "packed", {}, True, True, "flash_attention_2, as asked"),
    ],
)
def test_the_kernel_that_is_named_is_the_one_that_computes_there(asked, layout, settings, half, ampere, said, monkeypatch):
    monkeypatch.setattr(shared_prompt, "has_flash", lambda device: ampere)
    model = tiny_model(**settings)
    model.config._attn_implementation_internal = asked
    if layout != "padded":
        use_shared_prompts(model, keeps_eager=layout == "kept")
    assert said in describe_kernel(model, torch.device("cuda"), layout=layout, half=half)


@pytest.mark.parametrize(
    ("asked", "said"), [("sdpa", "sdpa, segment by segment"), ("flex_attention", "flex_attention, as asked")]
)
def test_flex_attention_is_itself_on_a_cpu_too(asked, said):
    model = tiny_model()
    model.config._attn_implementation_internal = asked
    use_shared_prompts(model)
    assert describe_kernel(model, torch.device("cpu"), layout="packed", half=False) == said


def test_flex_attention_refuses_dropout():
    ask = ask_of(shared_prompt_layout(LENGTHS), implementation="flex_attention")._replace(dropout=0.5)
    with pytest.raises(UserError, match=r"0\.5.*flex_attention.*disable_dropout: true"):
        flex(*random_heads(sum(map(sum, LENGTHS))), ask)


@pytest.mark.usefixtures("ampere")
def test_sdpa_on_a_gpu_refuses_dropout():
    heads = [x.detach().as_subclass(SaysCuda) for x in random_heads(sum(map(sum, LENGTHS)), torch.bfloat16)]
    with pytest.raises(UserError, match="disable_dropout: true"):
        sdpa(*heads, ask_of(shared_prompt_layout(LENGTHS), implementation="sdpa")._replace(dropout=0.5))
