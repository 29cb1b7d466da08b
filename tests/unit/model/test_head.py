"""The scoring forward against log-softmax over all logits."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from alignment.model import head
from alignment.model.head import (
    ADAPTED_TOKENS,
    TILE_TOKENS,
    TILE_VOCABULARY,
    add_lm_head,
    score_chunk,
    tiled_logps,
)
from tests.builders import SIZES, VOCABULARY, tiny_model

LOGITS_OF_EVERY_KIND = ["llama", "mistral", "gemma2", "qwen2", "phi", "granite", "cohere", "hyperclovax"]


def scored_batch(rows: int = 2, tokens: int = 12) -> dict[str, Tensor]:
    """Random ids and shifted labels of which the first third is ignored, one more in the first row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (rows, tokens + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, : tokens // 3] = -100
    labels[0, -1] = -100
    return {"input_ids": ids[:, :-1], "shift_labels": labels}


def plain_scores(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and mean logits from all logits, zero where nothing is scored."""
    logits, labels = model(input_ids=batch["input_ids"]).logits, batch["shift_labels"]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return logps.where(labels != -100, 0), logits.mean(-1).where(labels != -100, 0)


def head_scores(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    output = model(**batch, fused_lm_head=True)
    return output.log_probs, output.mean_logits


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of an uneven weighting, so that tokens that changed places would show."""
    model.zero_grad()
    (logps * torch.linspace(0.5, 2, logps.numel(), dtype=logps.dtype).view_as(logps)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_scores_and_gradients(model: nn.Module, batch: dict[str, Tensor], **tolerance: float) -> None:
    expected_logps, expected_means = plain_scores(model, batch)
    expected = gradients(model, expected_logps)
    logps, means = head_scores(model, batch)
    torch.testing.assert_close(logps, expected_logps, **tolerance)
    torch.testing.assert_close(means, expected_means, **tolerance)
    torch.testing.assert_close(gradients(model, logps), expected, **tolerance)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", LOGITS_OF_EVERY_KIND)
def test_scores_and_gradients_are_those_of_all_logits(kind, tie):
    model = tiny_model(kind, dtype=torch.float64, tie=tie)
    add_lm_head(model)
    assert_same_scores_and_gradients(model, scored_batch(), rtol=0, atol=1e-9)


def test_soft_capping_moves_the_scores_that_are_compared_here():
    capped, free = tiny_model("gemma2"), tiny_model("gemma2", final_logit_softcapping=None)
    (logps, _), (free_logps, _) = (plain_scores(model, scored_batch()) for model in (capped, free))
    assert (logps - free_logps).abs().max() > 0.1


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (2.0, 0.5)])
def test_every_chunk_size_gives_the_same_scores_and_gradients(chunk, bias, softcap, scale):
    torch.manual_seed(0)
    head = nn.Linear(8, 33, bias=bias, dtype=torch.float64)
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(33, (10,)), torch.randn(10, dtype=torch.float64)
    logits = head(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.log_softmax(-1)[torch.arange(10), labels]
    logps, means = tiled_logps(head, hidden, labels, softcap=softcap, scale=scale, chunk=chunk)

    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(means, logits.mean(-1), rtol=0, atol=1e-12)
    wanted = [hidden, *head.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((logps * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        rtol=0,
        atol=1e-12,
    )


def test_no_scored_position_gives_zeros_and_zero_gradients():
    model = tiny_model()
    add_lm_head(model)
    batch = scored_batch()
    batch["shift_labels"][:] = -100
    logps, means = head_scores(model, batch)
    assert not logps.any()
    assert not means.any()
    grads = gradients(model, logps)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "phi"])
def test_scores_and_gradients_are_those_of_trls_head(kind):
    ours, theirs = tiny_model(kind), tiny_model(kind)
    add_lm_head(ours)
    add_fused_lm_head(theirs, outputs=("log_probs", "mean_logits"))
    (logps, means), (trl_logps, trl_means) = (head_scores(model, scored_batch()) for model in (ours, theirs))
    scored = scored_batch()["shift_labels"] != -100
    torch.testing.assert_close(logps[scored], trl_logps[scored], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means[scored], trl_means[scored], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(ours, logps), gradients(theirs, trl_logps.where(scored, 0)), rtol=1e-4, atol=1e-4)


# On CUDA TRL's head, which computes in float32, and without a GPU too.
@pytest.mark.parametrize(("fused", "dtype", "atol"), [(False, torch.float64, 1e-9), (True, torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False},
        {"target_modules": ["q_proj"], "init_lora_weights": False},
    ],
    ids=["adapter on the head", "head trained whole", "frozen head"],
)
def test_an_adapted_model_scores_as_its_own_logits_do(kind, lora, fused, dtype, atol, monkeypatch):
    monkeypatch.setattr(head, "has_fused_kernel", lambda device: fused)
    model = tiny_model(kind, dtype=dtype)
    add_lm_head(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **lora))
    assert_same_scores_and_gradients(adapted, scored_batch(), rtol=0, atol=atol)


@pytest.mark.parametrize("lora", [None, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("fused", [False, True])
def test_the_head_is_called_once_however_many_chunks_it_computes(lora, fused, monkeypatch):
    monkeypatch.setattr(head, "has_fused_kernel", lambda device: fused)
    monkeypatch.setattr(head, "ADAPTED_TOKENS", 3)
    model = tiny_model()
    add_lm_head(model)
    if lora is not None:
        targets = {"target_modules": ["q_proj"], **lora}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **targets))
    calls: list[nn.Module] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: calls.append(module))
    for _ in range(2):
        head_scores(model, scored_batch())[0].sum().backward()
    assert len(calls) == 2
    plain = model(input_ids=scored_batch()["input_ids"]).logits  # its own forward is back
    assert plain.shape[-1] == VOCABULARY


def test_positions_that_are_handed_over_are_those_that_would_be_found():
    model, batch = tiny_model(), scored_batch()
    add_lm_head(model)
    scored = (batch["shift_labels"].flatten() != -100).nonzero().squeeze(-1)
    torch.testing.assert_close(head_scores(model, {**batch, "scored": scored}), head_scores(model, batch), rtol=0, atol=0)


def test_a_mixture_of_experts_scores_as_its_logits_do():
    model = tiny_model("mixtral")  # float32: its experts know no float64
    add_lm_head(model)
    assert_same_scores_and_gradients(model, scored_batch(), rtol=0, atol=2e-5)


def test_the_load_balancing_loss_of_a_mixture_of_experts_is_the_models_own():
    model = tiny_model("mixtral")
    batch = {**scored_batch(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["attention_mask"][1, 7:] = 0
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    add_lm_head(model)
    found = model(**batch, fused_lm_head=True).aux_loss
    torch.testing.assert_close(found, expected)
    assert found.requires_grad
    assert model(**batch).aux_loss is not None


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("granitemoe", "num_local_experts"),
        ("phimoe", "num_local_experts"),
        ("jetmoe", "num_local_experts"),
        ("olmoe", "num_experts"),
    ],
)
def test_the_load_balancing_loss_is_the_models_own_whatever_its_config_calls_the_experts(kind, experts):
    sizes = {key: value for key, value in SIZES.items() if key != "num_attention_heads" or kind != "jetmoe"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **{experts: 4}, num_experts_per_tok=2, output_router_logits=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = model(input_ids=scored_batch()["input_ids"]).aux_loss
    add_lm_head(model)
    torch.testing.assert_close(model(**scored_batch(), fused_lm_head=True).aux_loss, expected)


def test_xlstm_scores_with_its_soft_cap():
    sizes = {"hidden_size": 64, "num_heads": 2, "num_blocks": 1, "qk_dim_factor": 1.0, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("xlstm", **sizes, output_logit_soft_cap=0.1)).eval()
    with torch.no_grad():
        expected, _ = plain_scores(model, scored_batch())
        add_lm_head(model)
        logps, _ = head_scores(model, scored_batch())
    torch.testing.assert_close(logps, expected)


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model(dtype=torch.float64)
    add_lm_head(model)
    expected = gradients(model, plain_scores(model, scored_batch())[0])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, head_scores(model, scored_batch())[0]), expected, rtol=0, atol=1e-9)


class RowsOfLogits(TorchDispatchMode):
    """The most rows that any tensor as wide as the vocabulary has had, in forward and backward."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim > 1 and result.shape[-1] == VOCABULARY:
            self.largest = max(self.largest, result.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("adapter", [False, True])
def test_no_tensor_holds_more_than_one_chunk_of_logits(adapter):
    model = tiny_model("gemma2")
    add_lm_head(model)
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    batch = scored_batch(rows=4, tokens=600)
    with RowsOfLogits() as seen:
        head_scores(model, batch)[0].sum().backward()
    assert seen.largest == (ADAPTED_TOKENS if adapter else TILE_TOKENS)


def test_that_measure_sees_the_logits_of_a_plain_forward():
    with RowsOfLogits() as seen:
        plain_scores(tiny_model(), scored_batch(rows=2, tokens=600))
    assert seen.largest == 1200


def test_bf16_hidden_states_give_float32_scores():
    torch.manual_seed(0)
    head = nn.Linear(8, 33, bias=False, dtype=torch.bfloat16)
    hidden, labels = torch.randn(10, 8, dtype=torch.bfloat16), torch.randint(33, (10,))
    logps, means = tiled_logps(head, hidden, labels, softcap=None, scale=1.0)
    expected = head(hidden).float().log_softmax(-1)[torch.arange(10), labels]
    assert (logps.dtype, means.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)


def test_bf16_gradients_are_summed_over_chunks_in_float32():
    """1,024 tokens in 4 chunks: bf16 sums between chunks would lose what float32 keeps."""
    torch.manual_seed(0)
    head = nn.Linear(8, 33, bias=False, dtype=torch.bfloat16)
    hidden, labels = torch.randn(1024, 8, dtype=torch.bfloat16), torch.randint(33, (1024,))
    tiled_logps(head, hidden, labels, softcap=None, scale=1.0)[0].sum().backward()
    wide = head.weight.detach().double().requires_grad_()
    (hidden.double() @ wide.T).log_softmax(-1)[torch.arange(1024), labels].sum().backward()
    assert head.weight.grad.dtype == torch.bfloat16
    # bf16 logits and products are off by 2^-9 each, at random; a sum of a thousand is off by far less than its spread.
    error = (head.weight.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert error < 0.01


def test_under_bf16_autocast_scores_are_float32_of_the_models_own_bf16_logits():
    model = tiny_model()
    add_lm_head(model)
    batch = scored_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = plain_scores(model, batch)
        logps, _ = head_scores(model, batch)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    wanted = gradients(model, expected)
    for name, grad in gradients(model, logps).items():
        assert grad.dtype == torch.float32, name
        assert (grad - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_generation_and_the_plain_forward_are_unchanged(kind):
    def outputs(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
        model.eval()
        prompt = scored_batch()["input_ids"]
        plain = model(input_ids=prompt, labels=prompt)
        return model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0), plain.logits, plain.loss

    model = tiny_model(kind)
    before = outputs(model)
    add_lm_head(model)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)


def test_evaluation_without_gradients_gives_the_same_scores():
    model = tiny_model()
    add_lm_head(model)
    with torch.no_grad():
        logps, _ = head_scores(model, scored_batch())
    torch.testing.assert_close(logps, head_scores(model, scored_batch())[0])
    assert not logps.requires_grad


def kept_bytes(logps_of: Callable[[], Tensor]) -> int:
    """Of the tensors that wait for the backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps_of()
    return sum(sizes)


@pytest.mark.parametrize("tiles", [0, 1, 2, 3, 6, 100])
def test_tiles_that_were_kept_give_the_gradients_of_those_computed_again_within_their_budget(tiles, monkeypatch):
    """50 tokens in chunks of 20 and two tiles of vocabulary: 6 tiles, the largest of 20 x 2,048 float64."""
    torch.manual_seed(0)
    linear = nn.Linear(8, TILE_VOCABULARY + 7, bias=False, dtype=torch.float64)
    hidden = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    labels, upstream = torch.randint(TILE_VOCABULARY + 7, (50,)), torch.randn(50, dtype=torch.float64)

    def logps() -> Tensor:
        return tiled_logps(linear, hidden, labels, softcap=None, scale=0.5, chunk=20)[0]

    monkeypatch.setattr(head, "KEPT_BYTES", 0)
    nothing_kept, expected = kept_bytes(logps), torch.autograd.grad(logps() @ upstream, [hidden, linear.weight])
    monkeypatch.setattr(head, "KEPT_BYTES", budget := tiles * 20 * TILE_VOCABULARY * 8)
    assert (kept_bytes(logps) > nothing_kept) == (tiles > 0)
    assert kept_bytes(logps) - nothing_kept <= budget + 6 * 20 * 8  # and the largest logit of each row of a tile
    scored = logps() @ upstream
    for _ in range(2):  # a second backward finds them unchanged
        found = torch.autograd.grad(scored, [hidden, linear.weight], retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5)])
def test_a_vocabulary_of_several_tiles_gives_the_scores_and_gradients_of_one(softcap, scale, bias):
    torch.manual_seed(0)
    words = 2 * TILE_VOCABULARY + 7
    head = nn.Linear(8, words, bias=bias, dtype=torch.float64)
    hidden = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(words, (50,))
    labels[:3] = torch.tensor([0, TILE_VOCABULARY, words - 1])
    upstream = torch.randn(50, dtype=torch.float64)
    results = []
    for logps, mean_logits in (
        tiled_logps(head, hidden, labels, softcap=softcap, scale=scale, chunk=16),
        score_chunk(head, hidden, labels, softcap, scale),
    ):
        grads = torch.autograd.grad((logps * upstream).sum(), [hidden, *head.parameters()])
        results.append([logps, mean_logits, *grads])
    for tiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(tiled, plain, rtol=0, atol=1e-9)
