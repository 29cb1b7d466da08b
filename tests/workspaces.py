"""What a whole run starts from, as files: a model with its tokenizer, pairs, a recipe."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alignment.data.mixing import get_datasets
from alignment.data.prepare import to_pair_texts, to_tokens
from alignment.data.splits import PAIRS
from alignment.data.tokenization import LengthRules
from alignment.recipe.configs import DataArguments
from alignment.run.records import write_jsonl
from tests import builders


def save_model(folder: Path, **settings: Any) -> None:
    """A tiny model and its tokenizer; `settings` go into the model's config."""
    builders.tiny_model(**settings).save_pretrained(folder)
    builders.bpe_tokenizer().save_pretrained(folder)


def save_adapter(base: Path, folder: Path) -> None:
    """A LoRA adapter of the model in `base`, as an SFT run leaves it: one that changes what the model says."""
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def save_splits(folder: Path, train: list[dict], held_out: list[dict]) -> None:
    """train.jsonl and, if any row is held out, test.jsonl."""
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", train)
    if held_out:
        write_jsonl(folder / "test.jsonl", held_out)


def save_workspace(folder: Path, train: int, held_out: int, **settings: Any) -> list[dict]:
    """A model in folder/model and pairs in folder/pairs. Returns the pairs, those of training first."""
    save_model(folder / "model", **settings)
    rows = builders.pairs(train + held_out)
    save_splits(folder / "pairs", rows[:train], rows[train:])
    return rows


def save_chats(folder: Path, pairs: list[dict], train: int) -> None:
    """The chosen conversations of pairs, for supervised tuning; those behind the first `train` are held out."""
    chats = [{"messages": pair["chosen"]} for pair in pairs]
    save_splits(folder, chats[:train], chats[train:])


def recipe_keys(workspace: Path) -> dict[str, Any]:
    """Where a recipe finds what `save_workspace` saved."""
    return {"model_name_or_path": str(workspace / "model"), "dataset_mixer": {str(workspace / "pairs"): 1.0}}


def write_recipe(folder: Path, keys: dict[str, Any]) -> Path:
    """folder/recipe.yaml; a key that is None is left out."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}), encoding="utf-8")
    return path


def recipe_of_run(workspace: Path, folder: Path, recipe: dict[str, Any], changes: dict[str, Any]) -> str:
    """The recipe file of a run into folder/run."""
    return str(write_recipe(folder, {**recipe_keys(workspace), **recipe, "output_dir": str(folder / "run"), **changes}))


def held_out_tokens(workspace: Path, tokenizer: PreTrainedTokenizerBase, recipe: dict[str, Any]) -> list[dict]:
    """The held-out rows as a run with preprocessing: exact tokenizes them, in its order."""
    splits, _ = get_datasets(
        DataArguments(dataset_mixer=recipe_keys(workspace)["dataset_mixer"]),
        columns=PAIRS.columns, preprocessing="exact", bad_rows="refuse", seed=42, do_eval=True,
    )  # fmt: skip
    texts = to_pair_texts(splits["test"], tokenizer, preprocessing="exact", add_system=False, num_proc=None)
    rules = LengthRules(recipe["max_length"], recipe["max_prompt_length"], "keep_end", "exact")
    return list(to_tokens(texts, tokenizer, rules, num_proc=None))


def fake_vllm_python(folder: Path) -> tuple[Path, Path]:
    """An interpreter in whose environment the fake vllm of tests/fakevllm lies, and the log of what that is asked."""
    python, log = folder / "python", folder / "vllm.jsonl"
    environment = f"PYTHONPATH={Path(__file__).parent / 'fakevllm'} FAKE_VLLM_LOG={log}"
    python.write_text(f'#!/bin/sh\n{environment} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python, log


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
