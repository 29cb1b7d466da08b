"""The packed batch against the padded one with all logits: layout by hand, losses, gradients, training runs."""

import functools
import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import flex_attention as transformers_flex
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from alignment.data.tokenization import SIDES
from alignment.errors import UserError
from alignment.model import shared_prompt
from alignment.model.head import add_lm_head
from alignment.model.layers import recomputable_layers
from alignment.model.shared_prompt import PROVEN, Attend, use_shared_prompts
from alignment.preference.collate import Batch, PackedCollator, PaddedCollator, Row
from alignment.preference.losses import response_sums, simpo_loss
from alignment.preference.trainer import FORWARD_COLUMNS
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import reference
from tests.builders import KINDS, SIZES, tiny_model, token_rows

LOSS = {"beta": 2.5, "gamma_beta_ratio": 0.4}
UNUSED_TOKEN = 3  # token_rows never draws it
# Of the kinds below: a window that is shorter than a prompt, in the first of two layers where layers differ.
WINDOW = {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
}


def model_of(kind: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """`builders.tiny_model`, and architectures that only this file needs, by their `model_type`."""
    if kind in KINDS:
        return tiny_model(kind, dtype=dtype, **settings)
    config_type = CONFIG_MAPPING[kind]
    known = {field.name for field in fields(config_type)}
    own = {key: value for key, value in {**WINDOW, **EXPERTS, "head_dim": 8}.items() if key in known}
    config = config_type(**{**SIZES, "bos_token_id": 0, **own, **settings})  # CWM insists on a bos
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


# ---- The batch ----


def pair(prompt: list[int], chosen: list[int], rejected: list[int], **changes: Any) -> Row:
    (row,) = token_rows([(len(prompt), len(chosen), len(rejected))])
    return {**row, "chosen_input_ids": prompt + chosen, "rejected_input_ids": prompt + rejected, **changes}


def test_two_pairs_written_out():
    batch = PackedCollator()([pair([1, 2, 3], [11, 12], [21], index=5), pair([4], [13], [22, 23, 24], index=2)])
    no = -100
    assert batch["input_ids"].tolist() == [[1, 2, *(3, 11), 3, 4, *(4, 22, 23)]]
    assert batch["position_ids"].tolist() == [[0, 1, *(2, 3), 2, 0, *(0, 1, 2)]]
    assert batch["shift_labels"].tolist() == [[no, no, *(11, 12), 21, 13, *(22, 23, 24)]]
    assert batch["is_response"].int().tolist() == [
        [0, 0, *(1, 1), 0, 0, *(0, 0, 0)],
        [0, 0, *(0, 0), 0, 1, *(0, 0, 0)],
        [0, 0, *(0, 0), 1, 0, *(0, 0, 0)],
        [0, 0, *(0, 0), 0, 0, *(1, 1, 1)],
    ]
    assert batch["shared_prompt"].segments == ((0, 2, 0, 0), (2, 2, 0, 2), (4, 1, 0, 2), (5, 1, 5, 0), (6, 3, 5, 0))
    assert batch["index"].tolist() == [5, 2]


def test_prompts_with_different_ends_are_shared_up_to_there():
    row = pair([1, 2, 3], [11], [21, 22])
    row["rejected_input_ids"] = [1, 2, 4, 21, 22]
    batch = PackedCollator()([row])
    assert batch["input_ids"].tolist() == [[1, *(2, 3), *(2, 4, 21)]]
    assert batch["shift_labels"].tolist() == [[-100, *(-100, 11), *(-100, 21, 22)]]
    assert batch["position_ids"].tolist() == [[0, *(1, 2), *(1, 2, 3)]]


def test_prompts_with_nothing_in_common_are_two_rows_one_behind_the_other():
    row = pair([1, 2, 3], [11], [21])
    row["rejected_input_ids"], row["rejected_prompt_length"] = [2, 3, 21], 2
    batch = PackedCollator()([row])
    assert batch["input_ids"].tolist() == [[1, 2, 3, *(2, 3)]]
    assert batch["shift_labels"].tolist() == [[-100, -100, 11, *(-100, 21)]]
    assert batch["shared_prompt"].segments == ((0, 3, 0, 0), (3, 2, 0, 0))


# What the published rules make of two sides, and what data sets hold.


def as_it_is(row: Row) -> Row:
    return row


def equal_responses(row: Row) -> Row:
    return {**row, "rejected_input_ids": row["chosen_input_ids"]}


def with_prompt(row: Row, side: str, change: Callable[[list[int]], list[int]]) -> Row:
    length = row[f"{side}_prompt_length"]
    prompt, response = change(row[f"{side}_input_ids"][:length]), row[f"{side}_input_ids"][length:]
    return {**row, f"{side}_input_ids": prompt + response, f"{side}_prompt_length": len(prompt)}


def end_merged_with_the_response(row: Row) -> Row:
    return with_prompt(row, "rejected", lambda prompt: [*prompt[:-1], UNUSED_TOKEN])


def end_merged_into_the_response(row: Row) -> Row:
    return with_prompt(row, "chosen", lambda prompt: prompt[:-1] or prompt)


def cut_at_the_front_of_one_side(row: Row) -> Row:
    return with_prompt(row, "chosen", lambda prompt: prompt[1:] or prompt)


CHANGES = [
    as_it_is,
    equal_responses,
    end_merged_with_the_response,
    end_merged_into_the_response,
    cut_at_the_front_of_one_side,
]


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    """1 to 8 pairs; prompts and responses of 1 to 20 tokens."""
    length = st.integers(1, 20)
    lengths = draw(st.lists(st.tuples(length, length, length), min_size=1, max_size=8))
    return [draw(st.sampled_from(CHANGES))(row) for row in token_rows(lengths)]


many = settings(max_examples=30)


@many
@given(rows=batches())
def test_every_response_token_is_scored_once_and_for_its_own_response(rows):
    batch = PackedCollator()(rows)
    (labels,) = batch["shift_labels"].tolist()
    scored = [[label for label, mine in zip(labels, own, strict=True) if mine] for own in batch["is_response"].tolist()]
    assert scored == [row[f"{side}_input_ids"][row[f"{side}_prompt_length"] :] for side in SIDES for row in rows]
    assert batch["is_response"].sum(0).tolist() == [label != -100 for label in labels]
    assert batch["token_counts"].scored == batch["is_response"].sum()


@many
@given(rows=batches())
def test_the_row_holds_the_distinct_tokens_and_no_padding(rows):
    batch = PackedCollator()(rows)
    distinct = 0
    for row in rows:
        sides = [row[f"{side}_input_ids"] for side in SIDES]
        prompts = [ids[: row[f"{side}_prompt_length"]] for ids, side in zip(sides, SIDES, strict=True)]
        shared = next((i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b), min(map(len, prompts)))
        # The last shared token opens both branches; nothing is predicted from the last token of a response.
        distinct += sum(len(ids) - 1 for ids in sides) - max(shared - 1, 0)
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["shift_labels"].shape == (1, distinct)
    assert batch["token_counts"].distinct == distinct


@many
@given(rows=batches())
def test_a_branch_behind_its_prompt_is_the_row_that_it_came_from(rows):
    batch = PackedCollator()(rows)
    segments, (tokens,), (positions,) = (batch[key] for key in ("shared_prompt", "input_ids", "position_ids"))
    segments = segments.segments
    prompts = {segment.prompt_start for segment in segments if segment.prompt_length}
    branches = [segment for segment in segments if segment.prompt_length or segment.start not in prompts]
    found = [
        torch.cat([values[s.prompt_start : s.prompt_start + s.prompt_length], values[s.start : s.start + s.length]]).tolist()
        for values in (tokens, positions)
        for s in branches
    ]
    whole = [row[f"{side}_input_ids"][:-1] for row in rows for side in SIDES]
    assert found == whole + [list(range(len(ids))) for ids in whole]
    ends = [segment.start + segment.length for segment in segments]
    assert [segment.start for segment in segments] == [0, *ends[:-1]]
    assert ends[-1] == len(tokens)


# ---- Losses and gradients ----


class Float64(TorchFunctionMode):
    """Inside, float64 stays float64. Models compute norms, rotations and softmaxes in float32 whatever their dtype."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        function = Tensor.double if function is Tensor.float else function
        return function(*map(widened, args), **{key: widened(value) for key, value in (kwargs or {}).items()})


def exact_model(kind: str, **settings: Any) -> PreTrainedModel:
    """A model that computes in float64 throughout, without dropout."""
    model = model_of(kind, dtype=torch.float64, experts_implementation="eager", **settings).eval()
    for module in model.modules():
        # Inside the layers, because gradient checkpointing computes those again outside of the model's forward. Not the head,
        # which PEFT copies: the copy's forward would be the original's.
        if not isinstance(module, GradientCheckpointingLayer) and module is not model.get_output_embeddings():
            module.forward = in_float64(module.forward)
    return model


def in_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def widened(*args: Any, **kwargs: Any) -> Any:
        with Float64():
            return forward(*args, **kwargs)

    return widened


def packed_mean_logps(model: nn.Module, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """(B,) and (B,), as `reference.mean_logps`."""
    batch = PackedCollator()(rows)
    inputs = {key: batch[key] for key in FORWARD_COLUMNS if key in batch}
    output = model(**inputs, use_cache=False, fused_lm_head=True)
    logps, tokens = response_sums(output.log_probs, batch["is_response"])
    return (logps / tokens).chunk(2)


def losses_and_gradients(
    mean_logps: Callable[[nn.Module, list[Row]], tuple[Tensor, Tensor]], model: nn.Module, rows: list[Row]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) SimPO losses, and the gradients of an uneven sum of them, so that pairs that changed places would show."""
    model.zero_grad()
    losses = simpo_loss(*mean_logps(model, rows), **LOSS)
    (losses * torch.linspace(0.5, 2, len(rows), dtype=losses.dtype)).sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_a_billionth(packed: nn.Module, plain: nn.Module, rows: list[Row]) -> None:
    expected = losses_and_gradients(reference.mean_logps, plain, rows)
    found = losses_and_gradients(packed_mean_logps, packed, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    add_lm_head(model)
    use_shared_prompts(model)
    return model


@functools.cache
def packed_and_plain(
    kind: str, attention: str, make: Callable[..., PreTrainedModel]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    packed, plain = (make(kind, attn_implementation=attention) for _ in range(2))
    return prepared(packed), plain


EVERY_KIND = ["llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3"]
KINDS_AND_ATTENTIONS = [
    (kind, attention) for kind in EVERY_KIND for attention in ("sdpa", "eager") if (kind, attention) != ("gemma2", "sdpa")
]
every_kind_and_attention = pytest.mark.parametrize(("kind", "attention"), KINDS_AND_ATTENTIONS)


@every_kind_and_attention
@settings(max_examples=6)
@given(rows=batches())
def test_losses_and_gradients_are_those_of_the_padded_path_to_a_billionth(kind, attention, rows):
    assert_equal_to_a_billionth(*packed_and_plain(kind, attention, exact_model), rows)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lengths", [[(1, 1, 1)], [(2, 1, 20)], [(20, 6, 3), (1, 9, 2), (12, 1, 1)]], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_the_smallest_and_oddest_pairs_are_equal_too(kind, lengths, change):
    rows = [change(row) for row in token_rows(lengths)]
    assert_equal_to_a_billionth(*packed_and_plain(kind, "eager", exact_model), rows)


UNEVEN = [(20, 6, 3), (1, 9, 2), (12, 17, 5), (3, 4, 20), (15, 8, 8)]


@every_kind_and_attention
@pytest.mark.parametrize("seed", range(3))
def test_in_float32_losses_and_gradients_agree_to_a_hundred_thousandth(kind, attention, seed):
    packed, plain = packed_and_plain(kind, attention, model_of)
    rows = token_rows(UNEVEN, seed)
    expected_losses, expected = losses_and_gradients(reference.mean_logps, plain, rows)
    losses, gradients = losses_and_gradients(packed_mean_logps, packed, rows)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_the_windows_compared_here_are_shorter_than_a_prompt_and_change_the_losses(kind):
    wide = {"sliding_window": 100}
    rows = token_rows(UNEVEN)
    short, long = (losses_and_gradients(reference.mean_logps, model_of(kind, **own), rows)[0] for own in ({}, wide))
    assert (short - long).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_gradient_checkpointing_changes_nothing(kind):
    model = prepared(exact_model(kind)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert_equal_to_a_billionth(model, exact_model(kind), token_rows(UNEVEN))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_flex_attention_gives_the_losses_of_the_padded_path(kind, monkeypatch):
    """Losses alone: on a CPU flex_attention has no backward. And not compiled, which takes minutes."""
    plain_flex = torch.nn.attention.flex_attention.flex_attention
    monkeypatch.setattr(
        transformers_flex, "compile_friendly_flex_attention", lambda *heads, training, **options: plain_flex(*heads, **options)
    )
    packed = prepared(exact_model(kind, attn_implementation="flex_attention"))
    plain = exact_model(kind, attn_implementation="eager")
    rows = token_rows(UNEVEN)
    with torch.no_grad():
        expected, found = reference.mean_logps(plain, rows), packed_mean_logps(packed, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", sorted(PROVEN))
def test_every_proven_architecture_has_the_losses_and_gradients_of_its_padded_path(kind):
    packed, plain = (exact_model(kind) for _ in range(2))
    assert_equal_to_a_billionth(prepared(packed), plain, token_rows(UNEVEN))


def test_bf16_autocast_gives_losses_near_the_float32_ones():
    packed, plain = packed_and_plain("llama", "sdpa", model_of)
    rows = token_rows(UNEVEN)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed_mean_logps(packed, rows)
    for half, expected in zip(found, reference.mean_logps(plain, rows), strict=True):
        assert half.dtype == torch.float32
        # Logits of a few nats are off by 2^-8 of that each; a mean over tokens by less.
        torch.testing.assert_close(half, expected, rtol=0, atol=0.05)


LORAS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("adapted", LORAS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapted_model_has_the_losses_and_gradients_of_its_padded_path(adapted, checkpointing):
    model = prepared(exact_model("llama"))
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **LORAS[adapted])
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_a_billionth(model, model, token_rows(UNEVEN))


def test_a_compiled_model_has_the_same_losses_and_gradients():
    packed, plain = (model_of("llama", dtype=torch.float32, num_hidden_layers=1) for _ in range(2))
    rows = token_rows([(5, 3, 2)])
    expected_losses, expected = losses_and_gradients(reference.mean_logps, plain, rows)
    prepared(packed)
    compiled = torch.compile(packed, backend="eager")
    losses, gradients = losses_and_gradients(packed_mean_logps, compiled, rows)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def in_one_call(query: Tensor, key: Tensor, value: Tensor, ask: Attend) -> Tensor:
    """No attention, but of the layout it reads what a GPU's varlen attention does: tensors, and two lengths as numbers."""
    layout = ask.layout
    keys, values = (x[0].transpose(0, 1).index_select(0, layout.key_index) for x in (key, value))
    near = (keys.mean(0) + values.mean(0)).repeat_interleave(query.shape[1] // key.shape[1], 0)  # (heads, D)
    most = layout.cu_queries.max() / layout.max_queries + layout.cu_keys.max() / layout.max_keys
    return (query[0].transpose(0, 1) / most + near)[None]


@pytest.mark.parametrize(("kernel", "checkpointing"), [(None, False), (in_one_call, False), (in_one_call, True)])
def test_compiled_layers_have_the_same_losses_and_gradients_and_are_not_compiled_anew_for_every_batch(
    kernel, checkpointing, monkeypatch
):
    """As `torch_compile` with accelerate's regional compilation has them."""
    if kernel is not None:
        monkeypatch.setattr(shared_prompt, "sdpa", kernel)
    packed, plain = (model_of("llama", dtype=torch.float32, num_hidden_layers=2) for _ in range(2))
    for model in (packed, plain):
        prepared(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.compiler.reset()
    compiled = CompileCounterWithBackend("aot_eager")
    for layer in recomputable_layers(packed):
        layer.compile(backend=compiled, dynamic=True)
    seen = []
    for lengths in (
        [(5, 3, 2), (7, 9, 4)],
        [(6, 8, 3)],
        [(4, 2, 9), (11, 3, 3), (2, 2, 2)],
        [(9, 4, 4), (3, 6, 5)],
        [(8, 1, 7)],
    ):
        expected, found = (losses_and_gradients(packed_mean_logps, model, token_rows(lengths)) for model in (plain, packed))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        seen.append(compiled.frame_count)
    assert seen[0] > 0, seen
    assert seen[1:] == [seen[0]] * 4, seen


# ---- The trainer ----

ROWS = token_rows([(5, 3, 9), (2, 12, 4), (1, 1, 1), (9, 6, 6), (4, 20, 2), (3, 2, 15), (7, 8, 1), (6, 5, 5)])


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(model: PreTrainedModel, layout: str, **settings: Any) -> SimPOTrainer:
        args = SimPOConfig(
            **{
                "output_dir": str(tmp_path / layout),
                "use_cpu": True,
                "disable_tqdm": True,
                "report_to": "none",
                "save_strategy": "no",
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "max_length": 64,
                "max_prompt_length": 32,
                "pair_layout": layout,
                **LOSS,
                **settings,
            }
        )
        data = Dataset.from_list(ROWS)
        return SimPOTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)

    return build


def trajectory(trainer: SimPOTrainer) -> list[dict[str, float]]:
    """What every step and the evaluation behind the last logged, but for what is timed or counts padding."""
    trainer.train()
    trainer.evaluate()
    untimed = ("loss", "grad_norm", "rewards", "logps", "logits", "lengths")
    records = [
        {key: value for key, value in record.items() if key.removeprefix("eval_").split("/")[0] in untimed}
        for record in trainer.state.log_history
    ]
    return [record for record in records if record]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_packed_run_has_the_trajectory_of_a_padded_one(kind, checkpointing, build):
    padded, packed = (
        trajectory(build(exact_model(kind), layout, gradient_checkpointing=checkpointing)) for layout in ("padded", "packed")
    )
    assert len(packed) == len(padded) == 7
    for found, expected in zip(packed, padded, strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_data_loader_workers_change_nothing(build):
    alone, helped = (trajectory(build(model_of("llama"), "packed", dataloader_num_workers=workers)) for workers in (0, 2))
    assert helped == alone


def test_auto_packs_where_it_can(build):
    assert isinstance(build(model_of("llama"), "auto").data_collator, PackedCollator)


def test_auto_falls_back_to_padded_rows_and_says_why_in_one_line(build, caplog):
    with caplog.at_level(logging.INFO, logger="alignment.preference.trainer"):
        trainer = build(model_of("mamba"), "auto", max_steps=1)
    assert isinstance(trainer.data_collator, PaddedCollator)
    (line,) = [record.getMessage() for record in caplog.records if "Padded" in record.getMessage()]
    assert "Mamba" in line
    assert len(trajectory(trainer)) == 2


def test_packed_is_an_error_where_it_is_impossible(build):
    with pytest.raises(UserError, match=r"pair_layout = packed: .*Mamba.*padded"):
        build(model_of("mamba"), "packed")


# ---- Mixtures of experts keep their router loss ----


def router_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """(tokens, experts) of each layer."""
    inputs = {key: batch[key] for key in FORWARD_COLUMNS if key in batch and key != "shift_labels"}
    return model.model(**inputs, use_cache=False, output_router_logits=True).router_logits


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_router_loss_of_a_mixture_of_experts_is_added_with_its_coefficient(layout, build):
    losses = []
    for coefficient in (0.0, 0.5):
        model = model_of("mixtral", router_aux_loss_coef=coefficient)
        trainer = build(model, layout)
        batch = trainer.data_collator(ROWS)
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    padding = batch["attention_mask"] if layout == "padded" else None  # in a packed row every token counts
    router_loss = load_balancing_loss_func(router_logits(model, batch), 4, 2, padding).item()
    assert router_loss > 1  # so that the difference shows
    assert losses[1] - losses[0] == pytest.approx(0.5 * router_loss, abs=1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_without_output_router_logits_there_is_no_router_loss(layout, build):
    losses = []
    for coefficient in (0.0, 0.5):
        model = model_of("mixtral", output_router_logits=False, router_aux_loss_coef=coefficient)
        trainer = build(model, layout)
        losses.append(trainer.compute_loss(trainer.model, trainer.data_collator(ROWS)).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_router_loss_moves_the_routers(layout, build):
    def gradients(coefficient: float) -> list[Tensor]:
        trainer = build(model_of("mixtral", router_aux_loss_coef=coefficient), layout)
        trainer.compute_loss(trainer.model, trainer.data_collator(ROWS)).backward()
        return [p.grad for name, p in trainer.model.named_parameters() if name.endswith("gate.weight")]

    without, with_it = gradients(0.0), gradients(0.5)
    assert len(without) == 2
    for before, after in zip(without, with_it, strict=True):
        assert (after - before).abs().max() > 1e-4
