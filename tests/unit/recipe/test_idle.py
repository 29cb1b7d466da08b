"""alignment.recipe.idle: a key that is given and has no effect is told of, with the key that decides it."""

import pytest
import yaml

from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.idle import NEEDS, idle_keys
from alignment.recipe.parser import H4ArgumentParser
from scripts.simpo_config import SimPOConfig

# A value that is no default, beside the keys that take its effect away, and those that give it back.
CASES = {
    "lora_r": (8, {}, {"use_peft": True}),
    "lora_alpha": (8, {}, {"use_peft": True}),
    "lora_dropout": (0.5, {}, {"use_peft": True}),
    "lora_target_modules": (["q_proj"], {}, {"use_peft": True}),
    "lora_modules_to_save": (["lm_head"], {}, {"use_peft": True}),
    "bnb_4bit_quant_type": ("fp4", {}, {"use_peft": True, "load_in_4bit": True}),
    "bnb_4bit_quant_storage": ("float32", {}, {"use_peft": True, "load_in_4bit": True}),
    "hub_model_id": ("me/it", {}, {"push_to_hub": True}),
    "hub_strategy": ("end", {}, {"push_to_hub": True}),
    "hub_private_repo": (True, {}, {"push_to_hub": True}),
    "hub_always_push": (True, {}, {"push_to_hub": True}),
    "hub_revision": ("dev", {}, {"push_to_hub": True}),
    "hub_minutes": (5, {}, {"push_to_hub": True}),
    "metric_for_best_model": ("loss", {}, {"eval_strategy": "steps", "early_stopping_patience": 2}),
    "greater_is_better": (False, {}, {"eval_strategy": "steps", "eval_steps": 0.25, "load_best_model_at_end": True}),
    "activation_checkpointing_kwargs": ({"use_reentrant": True}, {}, {"activation_checkpointing": True}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": True}, {}, {"gradient_checkpointing": True}),
    "model_code_revision": ("abc", {}, {"trust_remote_code": True}),
    "early_stopping_threshold": (0.1, {}, {"eval_strategy": "steps", "early_stopping_patience": 2}),
    "liger_kernel_config": ({"rope": True}, {}, None),  # the package is not installed
    "eval_steps": (5, {}, {"eval_strategy": "steps"}),
    "eval_delay": (5, {}, {"eval_strategy": "epoch"}),
    "sample_max_new_tokens": (8, {}, {"sample_prompts": ["Why?"]}),
    "sample_temperature": (0.0, {}, {"sample_prompts": ["Why?"]}),
    "bad_rows": ("drop", {}, {"preprocessing": "exact"}),
    "gradient_accumulation_steps": (3, {"total_train_batch_size": 8}, {}),
    "num_train_epochs": (2, {"max_steps": 5}, {}),
}


def remarks(keys: dict, folder) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"output_dir": str(folder), "use_cpu": True, "report_to": "none", **keys}))
    parser = H4ArgumentParser((ModelArguments, DataArguments, SimPOConfig))
    parser.parse([str(recipe)])
    return idle_keys(parser)


def test_every_need_has_its_case():
    assert CASES.keys() == NEEDS.keys()


@pytest.mark.parametrize("key", CASES)
def test_a_key_without_effect_is_told_with_its_line_and_only_then(key, tmp_path):
    value, without, beside = CASES[key]
    (remark,) = remarks({**without, key: value}, tmp_path)
    assert remark.startswith(f"{tmp_path / 'recipe.yaml'}, line ")
    assert f"has no effect, because {NEEDS[key].otherwise}" in remark
    if beside is not None:
        assert remarks({**beside, key: value}, tmp_path) == []


def test_a_default_that_is_spelt_out_needs_no_word(tmp_path):
    assert remarks({"lora_r": 16, "hub_strategy": "every_save", "num_train_epochs": 3.0, "max_steps": 5}, tmp_path) == []
