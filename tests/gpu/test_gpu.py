"""What only a GPU can show: its kernels against float64, golden runs, finite gradients, and that nothing waits.

Skipped where there is no GPU. `make gpu-proof` runs these first.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from alignment.model import shared_prompt
from alignment.model.head import add_lm_head
from alignment.model.shared_prompt import Attend, shared_prompt_layout, use_shared_prompts
from alignment.preference.collate import PackedCollator, PaddedCollator, on_device
from alignment.preference.losses import response_sums
from alignment.preference.trainer import FORWARD_COLUMNS
from alignment.run.guards import keep_off_cudnn_attention
from tests.builders import token_rows
from tests.golden.test_golden import FLOAT32, assert_follows, run_recipe  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
# A few layers as wide as heads of 64 ask for, so that every kernel runs in the sizes it is made for.
SIZES = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
UNEVEN = [(300, 200, 350), (900, 20, 60), (5, 400, 10)]


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error of a whole tensor, in float64."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


# ---- The published code's numbers ----


@pytest.mark.parametrize("options", [[], ["--use_liger_kernel=false"], ["--max_tokens_per_micro_batch=192"]], ids=str)
@pytest.mark.parametrize("name", FLOAT32)
def test_a_published_recipe_gives_the_published_trace(name, options, run_recipe):  # noqa: F811
    assert_follows(run_recipe(name, "--use_cpu=false", *options).state.log_history, name)


# ---- Attention ----

LENGTHS = [(700, 300, 150), (1, 40, 2), (0, 9, 130), (513, 128, 129)]


def dense(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """One softmax over the whole row, in the tensors' own precision."""
    layout = shared_prompt_layout(LENGTHS)
    owner, reads, position = shared_prompt.readers(layout).long().to(query.device)
    distance = position[:, None] - position[None]
    seen = (distance >= 0) & ((owner[None] == owner[:, None]) | (owner[None] == reads[:, None]))
    seen = seen if window is None else seen & (distance < window)
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize(
    ("kernel", "softcap", "dtype", "tolerance"),
    [
        ("sdpa", None, torch.bfloat16, 2e-2),
        ("sdpa", None, torch.float16, 2e-3),
        ("sdpa", None, torch.float32, 2e-5),
        ("eager", 50.0, torch.float32, 2e-5),
        ("eager_or_flex", 50.0, torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(32, 8, 128), (16, 8, 256), (14, 2, 64)])
def test_packed_attention_is_one_softmax_in_float64(heads, key_heads, size, kernel, softcap, dtype, tolerance, window):
    torch.manual_seed(0)
    tokens = sum(map(sum, LENGTHS))
    tensors = [torch.randn(1, count, tokens, size, device=GPU).to(dtype) for count in (heads, key_heads, key_heads)]
    upstream = torch.randn(1, tokens, heads, size, device=GPU)
    ask = Attend(nn.Linear(1, 1), shared_prompt_layout(LENGTHS).to(GPU), size**-0.5, window, softcap, kernel)

    def with_gradients(attend: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = attend(*inputs)
        return [output, *torch.autograd.grad((output * upstream.to(output.dtype)).sum(), inputs)]

    found = with_gradients(lambda *x: getattr(shared_prompt, kernel)(*x, ask), *tensors)
    expected = with_gradients(lambda *x: dense(*x, window, softcap), *(x.double() for x in tensors))
    assert max(off(a, b) for a, b in zip(found, expected, strict=True)) < tolerance


def test_flex_attention_is_never_uncompiled_whatever_the_lengths(monkeypatch):
    """Uncompiled, it would hold the scores of a row."""
    torch.compiler.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for number in range(12):
        layout = shared_prompt_layout([(50 + 90 * number, 60 + 9 * number, 700), (3, 400 + number, 11)]).to(GPU)
        tokens = sum(s.length for s in layout.segments)
        heads = [torch.randn(1, count, tokens, 64, device=GPU, dtype=torch.bfloat16) for count in (8, 2, 2)]
        for window in (None, 64):
            ask = Attend(nn.Linear(1, 1), layout, 0.125, window, 50.0, "eager")
            with torch.no_grad():
                shared_prompt.eager_or_flex(*heads, ask)
            shared_prompt.eager_or_flex(*(x.requires_grad_() for x in heads), ask).sum().backward()


# ---- Models ----


def model_on_gpu(kind: str, attention: str | None, layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    window = {"sliding_window": 200} if kind in ("mistral", "gemma2") else {}
    with GPU:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **SIZES, **window), dtype=torch.float32, attn_implementation=attention
        )
    model = model.to(dtype).train()
    add_lm_head(model)
    if layout != "padded":
        use_shared_prompts(model, keeps_eager=layout == "packed, eager kept")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def scores_and_gradient(model: nn.Module, layout: str, *, autocast: bool = False) -> tuple[Tensor, Tensor]:
    rows = token_rows(UNEVEN)
    batch = on_device(PaddedCollator(0)(rows) if layout == "padded" else PackedCollator()(rows), GPU)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        output = model(**{key: batch[key] for key in FORWARD_COLUMNS if key in batch}, use_cache=False, fused_lm_head=True)
    sums, tokens = response_sums(output.log_probs, batch["is_response"])
    means = sums / tokens
    (means * torch.linspace(-1, 1, len(means), device=GPU)).sum().backward()
    return means.detach(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def expected():
    """Of padded rows in float32 under eager attention, once for each kind of model."""
    known: dict[str, tuple[Tensor, Tensor]] = {}

    def scores(kind: str) -> tuple[Tensor, Tensor]:
        if kind not in known:
            known[kind] = scores_and_gradient(model_on_gpu(kind, "eager", "padded"), "padded")
        return known[kind]

    return scores


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("layout", ["padded", "packed", "packed, eager kept"])
@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("llama", "flex_attention"),
        ("mistral", "sdpa"),
        ("qwen3", "sdpa"),
        ("gemma2", "eager"),
    ],
)
def test_scores_and_gradients_are_those_of_plain_padded_rows(kind, attention, layout, precision, expected):
    keep_off_cudnn_attention()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    found, gradient = scores_and_gradient(
        model_on_gpu(kind, attention, layout, dtype), layout, autocast=precision == "autocast"
    )
    wanted, wanted_gradient = expected(kind)
    assert torch.isfinite(gradient).all()
    assert (found - wanted).abs().max() < {"float32": 1e-4, "autocast": 0.02, "bfloat16": 0.05}[precision]
    assert off(gradient, wanted_gradient) < {"float32": 1e-3, "autocast": 0.05, "bfloat16": 0.15}[precision]


@pytest.mark.parametrize("length", [448, 960, 512])
def test_gradients_behind_a_mask_are_finite_whatever_the_length(length):
    keep_off_cudnn_attention()
    query, key, value = (torch.randn(4, 16, length, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool, device=GPU).tril().expand(4, 1, -1, -1).clone()
    nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).float().square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


# ---- Waits ----


def waits(work: Callable[[], object]) -> Counter[str]:
    """Where the host waited for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_a_micro_batch_waits_for_nothing(kind, attention):
    model = model_on_gpu(kind, attention, "packed", torch.bfloat16)
    scores_and_gradient(model, "packed")  # compiles
    scores_and_gradient(model, "packed")
    rows = token_rows(UNEVEN)

    def micro_batch() -> None:
        batch = on_device(PackedCollator()(rows), GPU)
        output = model(**{key: batch[key] for key in FORWARD_COLUMNS if key in batch}, use_cache=False, fused_lm_head=True)
        sums, tokens = response_sums(output.log_probs, batch["is_response"])
        (sums / tokens).sum().backward()

    assert not waits(micro_batch)


def test_that_measure_sees_a_wait():
    assert waits(lambda: torch.ones(1, device=GPU).item())
    assert waits(lambda: send_to_device(torch.ones(1), GPU))
