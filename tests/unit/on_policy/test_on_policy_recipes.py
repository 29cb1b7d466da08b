"""The on-policy recipes that are shipped."""

from pathlib import Path

import pytest

from alignment.recipe.parser import H4ArgumentParser
from on_policy_data_gen.configs import SEEDS
from on_policy_data_gen.recipe import KINDS

RECIPES = sorted((Path(__file__).parents[3] / "training_configs/on-policy").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_begins_with_its_command(path):
    H4ArgumentParser(KINDS).parse([str(path)])
    command = f"# python scripts/run_on_policy.py training_configs/on-policy/{path.name}"
    assert path.read_text(encoding="utf-8").splitlines()[0].startswith(command)


def test_the_llama_recipe_has_the_published_settings():
    path = next(path for path in RECIPES if path.stem == "llama-3-8b-instruct")
    prompts, policy, rewards, pairs, own = H4ArgumentParser(KINDS).parse([str(path)])
    assert (prompts.data_dir, prompts.prompt_split) == ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")
    assert (policy.temperature, policy.top_p, policy.max_tokens) == (0.8, 0.95, 4096)
    assert (rewards.reward_model, pairs.pair_rule) == ("RLHFlow/ArmoRM-Llama3-8B-v0.1", "best_worst")
    assert tuple(own.seeds) == SEEDS == (13, 21, 42, 79, 100)
