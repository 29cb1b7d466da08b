"""A policy that also sees: text trains its language model, and nothing waits for the rest."""

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel, Qwen2VLConfig, TrainingArguments

from alignment.errors import UserError
from alignment.model.adapters import add_adapter
from alignment.model.layers import recomputable_layers, recompute_first
from alignment.model.loading import check_model_path
from alignment.model.text_part import freeze_other_parts, other_parts
from alignment.preference.fitting import memory_plan
from alignment.recipe.configs import ModelArguments
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEING = ["model.vision_tower", "model.multi_modal_projector"]


def seeing_model() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    text = {"vocab_size": 512, "num_key_value_heads": 1, "sliding_window": 16, "max_position_embeddings": 256, **sizes}
    vision = {**VISION, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=500)
    return Gemma3ForConditionalGeneration(config)


def test_only_the_language_model_is_trained():
    model = seeing_model()
    assert freeze_other_parts(model) == SEEING
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(tuple(SEEING))}


def test_a_text_model_has_no_other_parts():
    assert other_parts(builders.tiny_model("gemma2")) == []


def test_every_parameter_that_is_trained_gets_a_gradient(tmp_path):
    """Which DistributedDataParallel demands."""
    args = SimPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", gradient_checkpointing=True)
    trainer = SimPOTrainer(seeing_model(), args, processing_class=builders.bpe_tokenizer())
    rows = builders.token_rows([(4, 3, 5), (2, 6, 3)])
    trainer.compute_loss(trainer.model, trainer.data_collator(rows)).backward()
    without = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_what_text_does_not_pass_is_known_to_the_memory_estimate(tmp_path):
    args = SimPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    rows = Dataset.from_list(builders.token_rows([(4, 3, 5), (2, 6, 3)]))
    trainer = SimPOTrainer(seeing_model(), args, rows, processing_class=builders.bpe_tokenizer())
    frozen = sum(p.numel() for name, p in trainer.model.named_parameters() if name.startswith(tuple(SEEING)))
    assert memory_plan(trainer).outside == frozen > 0
    trainer = SimPOTrainer(builders.tiny_model("gemma2"), args, rows, processing_class=builders.bpe_tokenizer())
    assert memory_plan(trainer).outside == 0


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_are_recomputed_where_text_passes(adapted, tmp_path):
    model = seeing_model()
    if adapted:
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
        model = add_adapter(model, config, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert recompute_first(model, 1) == 2
    layers = recomputable_layers(model)
    assert {type(layer).__name__ for layer in layers} == {"Gemma3DecoderLayer"}
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "fc1"]])
def test_no_adapter_is_put_where_no_text_passes(targets, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
    adapted = add_adapter(seeing_model(), config, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    names = get_peft_model_state_dict(adapted).keys()
    assert names
    assert not [name for name in names if "vision" in name or "multi_modal" in name]


def test_a_model_without_a_causal_language_model_is_refused_before_anything_is_loaded(tmp_path):
    Qwen2VLConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a model of type qwen2_vl, which transformers has no causal language model of"):
        check_model_path(ModelArguments(model_name_or_path=str(tmp_path)))
