"""The scoring forward is measured against the model's own in every run, and gives way to it where the two differ."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BigBirdConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from alignment.errors import UserError
from alignment.model.head import add_lm_head
from alignment.model.shared_prompt import use_shared_prompts
from alignment.preference import fidelity
from alignment.preference.collate import PackedCollator, PaddedCollator
from alignment.preference.fidelity import plain_mean, plain_means, scored_means, settle_scoring, short
from tests import builders

ROWS = builders.token_rows([(30, 20, 9), (3, 5, 14)])
CPU = torch.device("cpu")
# Decoders whose head has layers of its own.
TRANSFORMED = [
    "bert", "roberta", "electra", "camembert", "xlm-roberta", "megatron-bert", "rembert", "roformer", "data2vec-text",
    "ernie", "roberta-prelayernorm", "xmod", "big_bird", "xlm-roberta-xl",
]  # fmt: skip
SMALL = {
    "vocab_size": builders.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "embedding_size": 32, "initializer_range": 0.3,
    "is_decoder": True, "pad_token_id": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def decoder(model_type: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    own: dict[str, Any] = {"attention_type": "original_full"} if CONFIG_MAPPING[model_type] is BigBirdConfig else {}
    own |= {"languages": ["en_XX"], "default_language": "en_XX"} if model_type == "xmod" else {}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SMALL, **own, **settings}))


def settle(model: PreTrainedModel, collator: Any = None) -> PreTrainedModel:
    add_lm_head(model)
    settle_scoring(model, model, ROWS, collator or PaddedCollator(1), pad=1, half=False, device=CPU)
    return model


@pytest.mark.parametrize("kind", builders.KINDS)
def test_what_the_head_knows_is_measured_and_kept(kind, caplog):
    model = builders.tiny_model(kind)
    packed = kind != "mixtral"
    if packed:
        use_shared_prompts(model)
    with caplog.at_level(logging.INFO, logger="alignment"):
        settle(model, PackedCollator() if packed else None)
    assert not getattr(model, "scores_plainly", False)
    assert f"{'padded and packed' if packed else 'padded'} rows give what the model's plain forward says" in caplog.text


@pytest.mark.parametrize("model_type", TRANSFORMED)
def test_a_head_with_layers_of_its_own_is_scored_by_the_models_own_forward_and_trained(model_type):
    model = settle(decoder(model_type))
    assert model.scores_plainly
    batch = PaddedCollator(1)([short(row) for row in ROWS])
    means, _ = scored_means(model.train(), batch)
    alone = torch.stack([plain_mean(model, short(row), side, CPU) for side in ("chosen", "rejected") for row in ROWS])
    assert means.tolist() == pytest.approx(alone.tolist(), rel=1e-5)
    model(
        **{key: batch[key] for key in ("input_ids", "attention_mask", "shift_labels")}, use_cache=False, fused_lm_head=True
    ).log_probs.sum().backward()
    heads = [
        weight.grad
        for name, weight in model.named_parameters()
        if name.split(".")[0] in ("cls", "lm_head", "generator_predictions")
    ]
    assert heads
    assert all(grad is not None for grad in heads)


MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "phimoe",
    "minimax",
    "jetmoe",
    "gpt_oss",
    "ernie4_5_moe",
]


@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_router_loss_of_a_mixture_is_the_models_own_however_it_names_its_experts(model_type):
    sizes = {
        "vocab_size": builders.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
        "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_num_experts": 4, "moe_k": 2, "output_router_logits": True, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None, "max_position_embeddings": 128, "kv_channels": 8, "num_experts_per_token": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = settle(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).eval())
    batch = PaddedCollator(1)([short(row) for row in ROWS])
    (_, wanted), (_, found) = plain_means(model, batch), scored_means(model, batch)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_mixture_whose_forward_gives_no_router_loss_is_refused_with_the_way_out():
    model = builders.tiny_model("llama", output_router_logits=True)
    with pytest.raises(UserError, match="output_router_logits = True"):
        settle(model)


def test_packed_rows_that_are_not_what_the_model_says_are_refused(monkeypatch):
    model = builders.tiny_model("llama")
    use_shared_prompts(model)
    attended = fidelity.scored_means

    def other(model: nn.Module, batch: dict) -> tuple:
        means, router = attended(model, batch)
        return (means + 0.1, router) if "shared_prompt" in batch else (means, router)

    monkeypatch.setattr(fidelity, "scored_means", other)
    with pytest.raises(UserError, match="pair_layout: padded"):
        settle(model, PackedCollator())


def test_a_forward_that_fails_gives_way_too(caplog):
    model = builders.tiny_model("llama")
    model.get_output_embeddings = lambda: None
    settle(model)
    assert model.scores_plainly
    assert "AttributeError" in caplog.text


def test_measuring_leaves_the_model_and_the_random_numbers_as_they_were():
    model = builders.tiny_model("llama").train()
    state = torch.get_rng_state()
    settle(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_label_that_the_head_has_no_row_for_is_refused():
    model = builders.tiny_model("llama")
    add_lm_head(model)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UserError, match=f"token id {builders.VOCABULARY}"):
        model(input_ids=ids, shift_labels=torch.tensor([[-100, builders.VOCABULARY, -100]]), fused_lm_head=True)
