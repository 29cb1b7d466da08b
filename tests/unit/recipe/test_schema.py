"""The schemas that recipes name for editors: shipped as they are generated, never stricter than the parser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from alignment.ablation.matrix import KEYS
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser, Loader, RecipeError, translate
from alignment.recipe.values import Mismatch
from on_policy_data_gen.recipe import KINDS
from scripts import write_schemas
from scripts.simpo_config import SimPOConfig

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "training_configs").rglob("*.yaml"))
NAME = re.compile(r"# yaml-language-server: \$schema=(\S+)$")
PARSERS = {
    **{name: (ModelArguments, DataArguments, config) for name, config in write_schemas.METHODS.items()},
    "on_policy": KINDS,
}
LEAST = {"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "output_dir": "o", "use_cpu": True}


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    return write_schemas.schemas()


@pytest.fixture(scope="module")
def validators(schemas) -> dict[str, Draft202012Validator]:
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    return {name: Draft202012Validator(schema) for name, schema in schemas.items()}


def named_schema(path: Path) -> Path:
    first = NAME.match(path.read_text(encoding="utf-8").splitlines()[1])
    assert first, f"{path}: its second line names no schema"
    return (path.parent / first[1]).resolve()


def complaints(validator: Draft202012Validator, recipe: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(recipe)]


# ---- What is shipped ----


def test_the_shipped_schemas_are_the_generated_ones(schemas):
    """Otherwise: make schemas."""
    shipped = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in write_schemas.FOLDER.glob("*.json")}
    assert shipped == schemas


@pytest.mark.parametrize("loader", [Loader, yaml.SafeLoader], ids=["the parser's YAML", "YAML 1.1"])
def test_every_shipped_recipe_names_the_schema_of_its_entry_point_and_fits_it(loader, validators):
    assert len(RECIPES) > 45
    for path in RECIPES:
        schema = named_schema(path)
        text = path.read_text(encoding="utf-8")
        script = re.search(r"scripts/run_(\w+)\.py", text)
        assert script is None or script[1] == schema.stem or path.parent.name == "quickstart", path
        assert schema.parent == write_schemas.FOLDER
        assert complaints(validators[schema.stem], yaml.load(text, loader)) == [], path


def test_every_key_with_a_help_text_has_it_as_its_description(schemas):
    for name, kinds in PARSERS.items():
        parser = H4ArgumentParser(kinds)
        for key in parser.targets.keys() - parser.old_spellings.keys():
            words = " ".join(parser.targets[key].field.metadata.get("help", "").split()).replace("%%", "%")
            assert words in schemas[name]["properties"][key]["description"]


def test_the_schema_of_matrices_has_the_keys_that_are_read(schemas):
    assert set(schemas["ablation"]["properties"]) == set(KEYS)


# ---- What it refuses, and takes ----

BAD = [
    {"gama_beta_ratio": 0.5},
    {"SimPO": {"beta": 2.0}},  # a recipe is flat
    {"beta": "high"},
    {"beta": [2.0, 10.0]},
    {"learning_rate": "1e-6x"},
    {"max_length": 10.5},
    {"bf16": "maybe"},
    {"bf16": 2},
    {"preprocessing": "strict"},
    {"loss_type": "dpo"},
    {"pair_layout": "pack"},
    {"lr_scheduler_type": "cosinus"},
    {"optim": "adam_torch"},
    {"torch_dtype": "bf16"},
    {"bnb_4bit_quant_type": "int4"},
    {"log_level": "loud"},
    {"eval_strategy": "sometimes"},
    {"dataset_mixer": ["d"]},
    {"dataset_splits": {"train": 1}},
    {"dataset_splits": [1]},
    {"model_name_or_path": 7},
    {"lora_target_modules": 3},
    {"gradient_checkpointing_kwargs": [True]},
    {"warmup_ratio": "some"},
    {"chat_template_kwargs": "enable_thinking"},
]
GOOD = [
    {"learning_rate": 1e-6},
    {"learning_rate": "1e-6"},
    {"max_length": "2_048"},
    {"max_length": 2048.0},
    {"max_tokens_per_micro_batch": "auto"},
    {"max_tokens_per_micro_batch": 8192},
    {"recompute_layers": "all"},
    {"max_steps": "1e1"},
    {"eval_strategy": False},  # a bare no
    {"report_to": "none"},
    {"report_to": ["none"]},
    {"dataset_splits": "train,test"},
    {"dataset_mixer": '{"d": 0.5}'},
    {"lora_target_modules": "all-linear"},
    {"torch_dtype": None},
    {"torch_dtype": "null"},
    {"dtype": "bfloat16"},
    {"evaluation_strategy": "no"},
    {"warmup_ratio": 0.1},
    {"overwrite_output_dir": True},
    {"gradient_checkpointing": "Yes"},
    {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"model_init_kwargs": {"attn_implementation": "sdpa", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"lr_scheduler_kwargs": '{"num_cycles": 0.5}'},
    {"log_level": "info"},
]


def parse(keys: dict[str, Any], folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(LEAST | {"output_dir": str(folder / "run")} | keys), encoding="utf-8")
    H4ArgumentParser((ModelArguments, DataArguments, SimPOConfig)).parse([str(recipe)])


def test_a_bad_recipe_is_marked_by_the_editor_and_refused_by_the_parser(validators, tmp_path):
    for keys in BAD:
        assert complaints(validators["simpo"], LEAST | keys), keys
        with pytest.raises(RecipeError, match=next(iter(keys))):
            parse(keys, tmp_path)


def test_what_the_parser_takes_is_not_marked(validators, tmp_path):
    for keys in GOOD:
        assert complaints(validators["simpo"], LEAST | keys) == [], keys
        parse(keys, tmp_path)


VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, 1.0, 2.5, 1e-6, 1e30, "", " ", "none", "NULL", "true", "No", "on", "Y", "0", "1",
    "12", "-3.5", "1e-6", ".5", "5.", "1_000", "1e1_0", "inf", "-Infinity", "nan", " 4 ", "auto", "all", "a,b", "1,2", "[1, 2]",
    '["a"]', "[]", "{}", '{"a": 1}', "text", "two words", [], [1], [0.5], ["a", "b"], ["1"], [None], [True], {}, {"a": 1},
    {"a": "b"}, {"a": True}, {"a": {"b": [1]}}, {"a": None}, [{}],
]  # fmt: skip


def read(parser: H4ArgumentParser, key: str, value: Any) -> None:
    """As the parser does it, key by key. Raises Mismatch."""
    given = {key: value}
    for kind in parser.dataclass_types:
        given = kind.rewrite(given)[0] if hasattr(kind, "rewrite") else given
    for key, value in given.items():
        present, translated, _ = translate(key, value) if key in parser.old_spellings else (key, value, "")
        if present in parser.targets:
            parser.targets[present].read(translated)


@pytest.mark.parametrize("name", PARSERS)
def test_no_value_of_any_key_is_marked_that_the_parser_reads(name, schemas):
    """Every key against values of every form, and every name of every choice; old spellings too."""
    parser, schema = H4ArgumentParser(PARSERS[name]), schemas[name]
    choices = [choice for entry in schema["$defs"].values() for choice in entry.get("enum", [])]
    choices += re.findall(r'"([\w-]+)"', json.dumps([entry.get("anyOf", entry) for entry in schema["properties"].values()]))
    values = [*VALUES, *dict.fromkeys(choice for choice in choices if isinstance(choice, str))]
    marked = 0
    for key in schema["properties"]:
        validator = Draft202012Validator({**schema["properties"][key], "$defs": schema["$defs"]})
        for value in values:
            if validator.is_valid(value):
                continue
            marked += 1
            with pytest.raises(Mismatch):
                read(parser, key, value)
    assert marked > 1000
