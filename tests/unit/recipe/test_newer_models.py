"""Recipes for models that the paper has not: their settings, templates, sizes and packed layout, without their weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignment.data.chat import exact_pair_text
from alignment.data.template import with_settings
from alignment.data.tokenization import LengthRules, tokenize_pairs
from alignment.errors import UserError
from alignment.model.endings import end_of_turn
from alignment.model.shared_prompt import why_not
from benchmarks.recipe_memory import MODELS, full_size, lengths, newer_recipes, table_row
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders
from tests.unit.data.test_trl_templates import PROMPTS, QUESTION, reply
from tests.unit.recipe.newer_models import PUBLISHED
from tests.unit.recipe.test_recipes import parse, recipe_text

DATE = "2026-07-29"
NAMES = newer_recipes()
WHOLE = [name for name in NAMES if not name.endswith("lora")]
OF_AN_ADAPTER = {
    "torch_dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "learning_rate", "per_device_train_batch_size",
    "per_device_eval_batch_size", "output_dir", "run_name", "save_steps", "save_total_limit",
}  # fmt: skip
every_model = pytest.mark.parametrize("model", MODELS)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(recipe_text(name))


def recipe_of(model: str) -> dict[str, Any]:
    """The whole model's."""
    (recipe,) = (recipe for recipe in map(read, WHOLE) if recipe["model_name_or_path"] == model)
    return recipe


# ---- Settings ----


def test_every_model_has_a_whole_recipe_and_one_of_an_adapter():
    assert len(NAMES) == 2 * len(MODELS) == 2 * len(PUBLISHED)
    assert {read(name)["model_name_or_path"] for name in WHOLE} == set(MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_a_newer_recipe_says_that_it_is_untried_and_stays_in_the_authors_ranges(name):
    head = " ".join(recipe_text(name).partition("\n\n")[0].replace("\n# ", " ").split())
    assert "Not trained by us, and not a published run." in head
    assert ("its own files were not at hand" in head) == (read(name)["model_name_or_path"].split("/")[0] in UNSEEN)
    model_args, _, config = parse(name)
    assert (config.preprocessing, config.pair_layout, config.total_train_batch_size) == ("exact", "auto", 128)
    rate = config.learning_rate / (10 if model_args.use_peft else 1)
    assert any(rate == pytest.approx(one) for one in (3e-7, 5e-7, 8e-7, 1e-6))
    assert 2 <= config.beta <= 10
    assert 0 < config.gamma_beta_ratio <= 0.5
    assert config.remarks() == []


UNSEEN = {"mistralai", "allenai", "HuggingFaceTB"}  # whose templates trl does not ship


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("lora")])
def test_an_adapter_s_recipe_is_the_whole_model_s_but_for_the_adapter(name):
    adapter, whole = read(name), read(name.rpartition("-")[0])
    assert {key: adapter[key] for key in adapter.keys() - OF_AN_ADAPTER} == {
        key: whole[key] for key in whole.keys() - OF_AN_ADAPTER
    }


# ---- Templates ----

# Mistral's: see test_a_system_turn_moves_in_the_template_of_mistral.
TAKEN = [(model, prompt) for model in MODELS for prompt in PROMPTS if not ("Mistral" in model and prompt == "a system turn")]


@pytest.mark.parametrize(("model", "prompt"), TAKEN)
def test_the_response_is_the_reply_with_one_end_behind_the_models_own_header(model, prompt):
    known, recipe = PUBLISHED[model], recipe_of(model)
    tokenizer = known.tokenizer()
    tokenizer.chat_template = with_settings(known.template, recipe.get("chat_template_kwargs"), tokenizer)
    row = {"prompt": PROMPTS[prompt], "chosen": [reply("Blue is one.")], "rejected": [reply("No.")]}
    text = exact_pair_text(row, tokenizer, date=DATE)
    assert text["findings"] == []
    assert text["prompt"].endswith(known.header)
    assert [text[side].rstrip() for side in ("chosen", "rejected")] == [
        f"{known.space}Blue is one.{known.end}",
        f"{known.space}No.{known.end}",
    ]
    rules = LengthRules(400, 300, "keep_end", "exact")
    batch = {key: [text[key]] for key in ("prompt", "chosen", "rejected", "add_eos")}
    tokens = {key: column[0] for key, column in tokenize_pairs(batch, [0], tokenizer, rules).items()}
    ids, start = tokens["chosen_input_ids"], tokens["chosen_prompt_length"]
    assert tokenizer.decode(ids[:start]) == text["prompt"]
    # One bos, in front, where the model has one; what ends a turn in the prompt may be the same token.
    assert ids[0] == tokenizer.bos_token_id if known.bos else tokenizer.bos_token_id is None
    answered = sum(turn["role"] == "assistant" for turn in PROMPTS[prompt])
    if known.bos:
        assert ids[:start].count(tokenizer.bos_token_id) == 1 + answered * (known.bos == known.eos)
    # Generation stops at the response's end.
    end = tokenizer.convert_tokens_to_ids(known.end)
    assert end == end_of_turn(tokenizer)
    assert ids[start:].count(end) == 1
    assert not tokens["eos_added"]


def test_a_system_turn_moves_in_the_template_of_mistral():
    """It stands in front of the last turn if that is the user's, so an answered conversation has lost it."""
    row = {"prompt": PROMPTS["a system turn"], "chosen": [reply("Blue is one.")], "rejected": [reply("No.")]}
    with pytest.raises(UserError, match="writes a conversation differently"):
        exact_pair_text(row, PUBLISHED["mistralai/Mistral-7B-Instruct-v0.3"].tokenizer(), date=DATE)


@pytest.mark.parametrize(("model", "today"), [("HuggingFaceTB/SmolLM3-3B", True), ("meta-llama/Llama-3.2-3B-Instruct", False)])
def test_the_day_is_in_the_prompts_of_smollm_alone(model, today):
    """Llama-3.2's recipe gives a date of its own."""
    known = PUBLISHED[model]
    tokenizer = known.tokenizer()
    tokenizer.chat_template = with_settings(known.template, recipe_of(model)["chat_template_kwargs"], tokenizer)
    row = {"prompt": [QUESTION], "chosen": [reply("Blue is one.")], "rejected": [reply("No.")]}
    days = {exact_pair_text(row, tokenizer, date=date)["prompt"] for date in (DATE, "2026-07-30")}
    assert len(days) == 1 + today


# ---- Architectures ----

SMALL = {
    "vocab_size": builders.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SMALL_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def small_model(model: str) -> PreTrainedModel:
    """Of the model's class and kinds of layers, random, with windows shorter than the prompts."""
    kind, own = MODELS[model]
    text = own.get("text_config", own)
    small = SMALL | ({"head_dim": 8} if "head_dim" in text else {})
    if text.get("sliding_window"):
        small |= {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
    if kind == "smollm3":
        small["no_rope_layers"] = [1, 1, 1, 0]
    if "vision_config" in own:
        small = {"text_config": small, "vision_config": SMALL_VISION, "mm_tokens_per_image": 1, "image_token_index": 500}
    config = AutoConfig.for_model(kind, **small)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@every_model
def test_a_step_is_equal_packed_and_padded(model, tmp_path):
    rows = builders.token_rows([(9, 3, 9), (2, 12, 4), (20, 6, 6), (1, 1, 5)])
    found = {}
    for layout in ("packed", "padded"):
        args = SimPOConfig(
            output_dir=str(tmp_path / layout), use_cpu=True, report_to="none", pair_layout=layout, max_length=64,
            max_prompt_length=32, gradient_checkpointing=True,
        )  # fmt: skip
        trainer = SimPOTrainer(small_model(model), args, processing_class=builders.bpe_tokenizer())
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
        found[layout] = loss.detach(), gradients
    (loss, gradients), (expected_loss, expected) = found["packed"], found["padded"]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    # As far as float32 goes: tests/unit/preference/test_packed_batch.py compares these architectures in float64.
    for name, gradient in gradients.items():
        assert (norm := expected[name].norm()) > 0, name
        assert (gradient - expected[name]).norm() < 1e-5 * norm, name


# ---- Memory ----


@every_model
def test_the_published_sizes_add_up_to_the_published_parameters_and_are_packed(model):
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(full_size(model), attn_implementation="sdpa")
    assert sum(parameter.numel() for parameter in full.parameters()) == PUBLISHED[model].parameters
    assert why_not(full) is None


def test_the_longest_pair_of_the_table_is_as_long_as_the_recipes_allow():
    for name in NAMES:
        assert read(name)["max_length"] == max(lengths()["length"])


TABLE = (Path(__file__).parents[3] / "docs/recipes.md").read_text(encoding="utf-8")


def test_the_memory_table_has_every_recipe_and_its_layout():
    rows = re.findall(r"^\| `([\w.-]+)` \| (packed|padded) \|", TABLE, re.MULTILINE)
    assert sorted(rows) == [(name, "packed") for name in NAMES]


def test_the_memory_table_is_what_its_command_makes(tmp_path):
    """Of the smallest model, which takes seconds; `python benchmarks/recipe_memory.py` makes all of it."""
    assert f"\n{table_row('gemma-3-1b-it-simpo-lora', [1], tmp_path)}\n" in TABLE


def test_the_table_of_templates_is_true():
    for model, known in PUBLISHED.items():
        ends = [known.header.replace("\n", "\\n"), known.end]
        row = f"| {model} | {f'`{known.bos}`' if known.bos else 'none'} | {' | '.join(f'`{end}`' for end in ends)} |"
        assert row in TABLE.replace("\\|", "|"), row
