"""Recipe and command line -> dataclasses: every spelling is understood or refused, nothing is lost or guessed."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from copy import copy
from enum import Enum
from itertools import count
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import trl
import yaml
from accelerate.parallelism_config import ParallelismConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from alignment.errors import UserError
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import (
    DROPPED,
    RENAMED,
    SWITCHES,
    H4ArgumentParser,
    RecipeError,
    dump_recipe,
    full_recipe,
    is_secret,
    quoted,
)
from scripts.dpo_config import DPOConfig
from scripts.orpo_config import ORPOConfig
from scripts.sft_config import SFTConfig
from scripts.simpo_config import SimPOConfig

ROOT = Path(__file__).parents[3]
GOLDEN = sorted((ROOT / "tests/golden/data/recipes").glob("*.yaml"))
Write = Callable[[str], str]

SIMPO = H4ArgumentParser((ModelArguments, DataArguments, SimPOConfig))
SFT = H4ArgumentParser((ModelArguments, DataArguments, SFTConfig))
TRL = H4ArgumentParser((ModelArguments, DataArguments, trl.DPOConfig))
DPO = H4ArgumentParser((ModelArguments, DataArguments, DPOConfig))
METHODS = {"dpo": DPO, "ipo": DPO, "orpo": H4ArgumentParser((ModelArguments, DataArguments, ORPOConfig))}


@pytest.fixture(scope="module")
def write(tmp_path_factory) -> Write:
    """Puts text into a new recipe and gives its path."""
    folder, numbers = tmp_path_factory.mktemp("recipes"), count()

    def write_recipe(text: str) -> str:
        path = folder / f"{next(numbers)}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_recipe


def parse(*argv: str) -> Any:
    """The training arguments of a SimPO run on a CPU."""
    return SIMPO.parse([*argv, "--use_cpu"])[2]


def parsed(key: str, *argv: str) -> Any:
    """What the command line makes of one key, in whichever dataclass it stands."""
    return next(getattr(config, key) for config in SIMPO.parse([*argv, "--use_cpu"]) if hasattr(config, key))


def complaints(*argv: str, parser: H4ArgumentParser = SIMPO) -> list[str]:
    with pytest.raises(RecipeError) as error:
        parser.parse([*argv, "--use_cpu"])
    assert str(error.value).splitlines() == error.value.complaints, "each complaint is one line"
    return error.value.complaints


# ---- The forms of a command line ----


@pytest.mark.parametrize(
    "words",
    [
        ["--gamma_beta_ratio=0.5"],
        ["--gamma-beta-ratio=0.5"],
        ["--gamma_beta_ratio", "0.5"],
        ["--gamma-beta-ratio", "5e-1"],
        ["--gamma_beta_ratio=1", "--gamma-beta-ratio=.5"],
    ],
)
def test_a_key_has_hyphens_or_underscores_and_its_value_follows_a_space_or_an_equals_sign(words):
    assert parsed("gamma_beta_ratio", *words) == 0.5


@pytest.mark.parametrize("words", [["--do_eval"], ["--do-eval"], ["--do_eval=true"], ["--do_eval", "yes"]])
def test_a_flag_is_true_on_its_own_or_says_so(words):
    assert parsed("do_eval", *words, "--beta=1") is True


@pytest.mark.parametrize("word", ["--no_disable_dropout", "--no-disable-dropout", "--disable_dropout=off"])
def test_a_flag_is_taken_back_with_no_or_with_a_value(word):
    assert parsed("disable_dropout", word) is False


@pytest.mark.parametrize(
    "text", ["true", "True", "TRUE", "yes", "Yes", "on", "1", "t", "y", "false", "FALSE", "no", "Off", "0", "f", "n"]
)
def test_a_boolean_may_be_spelt_in_every_usual_way(text, write):
    expected = text.lower() in ("true", "yes", "on", "1", "t", "y")
    assert parsed("bf16", f"--bf16={text}") is expected
    assert parsed("bf16", write(f"bf16: {text}")) is expected
    assert parsed("bf16", write(f"bf16: '{text}'")) is expected


def test_only_the_first_equals_sign_ends_the_key():
    assert parsed("optim_args", "--optim_args=a=1,b=2") == "a=1,b=2"


def test_a_negative_number_is_a_value_and_no_option():
    assert parsed("max_steps", "--max_steps", "-1") == -1
    assert parsed("label_pad_token_id", "--label_pad_token_id", "-100", "--beta", "3") == -100


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset_splits=train_sft,test_sft"],
        ["--dataset_splits=train_sft, test_sft"],
        ['--dataset_splits=["train_sft", "test_sft"]'],
        ["--dataset_splits", "train_sft", "test_sft"],
        ["--dataset-splits", "train_sft", "test_sft", "--beta=2"],
    ],
)
def test_a_list_is_written_with_commas_as_json_or_as_words(words):
    assert parsed("dataset_splits", *words) == ["train_sft", "test_sft"]


def test_a_list_may_have_one_entry_or_none(write):
    assert parsed("lora_target_modules", "--lora_target_modules=all-linear") == ["all-linear"]
    assert parsed("lora_target_modules", write("lora_target_modules: all-linear")) == ["all-linear"]
    assert parsed("include_for_metrics", "--include_for_metrics=") == []
    assert parsed("include_for_metrics", "--include_for_metrics=[]") == []


def test_a_mapping_is_written_as_json():
    mixer = '{"HuggingFaceH4/ultrafeedback_binarized": 0.5, "local/pairs": 200}'
    expected = {"HuggingFaceH4/ultrafeedback_binarized": 0.5, "local/pairs": 200}
    assert parsed("dataset_mixer", f"--dataset_mixer={mixer}") == expected
    assert parsed("dataset_mixer", "--dataset_mixer", mixer) == expected
    kwargs = '--gradient_checkpointing_kwargs={"use_reentrant": false}'
    assert parsed("gradient_checkpointing_kwargs", kwargs) == {"use_reentrant": False}


@pytest.mark.parametrize("text", ["null", "none", "None"])
def test_a_field_that_may_be_empty_is_emptied_by_null_and_none(text, write):
    recipe = write("attn_implementation: sdpa\nmax_length: 2048\ngradient_checkpointing: true\n")
    assert parsed("attn_implementation", recipe, f"--attn_implementation={text}") is None
    assert parsed("max_length", recipe, f"--max_length={text}") is None
    assert parsed("attn_implementation", write(f"attn_implementation: {text}")) is None


@pytest.mark.parametrize("text", ["none", "null", "None"])
def test_reporting_to_none_is_reporting_to_nobody(text, write):
    assert parse(f"--report_to={text}").report_to == []
    assert parse(write(f"report_to: {text}")).report_to == []
    assert parse(write(f"report_to:\n- {text if text == 'none' else 'none'}")).report_to == []


@pytest.mark.parametrize("text", ["report_to: no", "report_to: false", "report_to: off"])
def test_reporting_to_no_is_reporting_to_nobody(text, write):
    assert parsed("report_to", write(text)) == []


def test_a_long_value_is_quoted_with_an_end(write):
    for text in ("lora_target_modules: [" + ", ".join(["1"] * 20_000) + "]", "seed: " + "x" * 9000):
        (line,) = complaints(write(text))
        assert len(line) < 600
        assert "expected" in line


def test_one_tracker_or_several_may_be_named(write):
    assert parse("--report_to=wandb").report_to == ["wandb"]
    assert parse("--report_to", "wandb", "tensorboard").report_to == ["wandb", "tensorboard"]
    assert parse("--report_to=wandb,tensorboard").report_to == ["wandb", "tensorboard"]
    assert parse(write("report_to: [wandb, tensorboard]")).report_to == ["wandb", "tensorboard"]


@pytest.mark.parametrize("text", ["5e-7", "5.0e-7", "5E-7", "0.0000005", "'5e-7'", ".5e-6"])
def test_a_learning_rate_is_a_number_however_it_is_written(text, write):
    recipe = write(f"learning_rate: {text}\nlr_scheduler_kwargs: {{min_lr: {text.strip(chr(39))}}}")
    assert parse(recipe).learning_rate == 5e-7
    assert parse(recipe).lr_scheduler_kwargs == {"min_lr": 5e-7}
    assert parsed("learning_rate", f"--learning_rate={text.strip(chr(39))}") == 5e-7


@pytest.mark.parametrize("text", ["1e3", "1000", "1000.0", "1_000"])
def test_a_whole_number_may_be_written_as_a_power_of_ten(text, write):
    assert parsed("seed", f"--seed={text}") == 1000
    assert parsed("seed", write(f"seed: {text}")) == 1000
    assert type(parsed("seed", write(f"seed: {text}"))) is int


def test_a_whole_number_becomes_a_float_where_the_field_is_one(write):
    SIMPO.parse([write("beta: 10\nnum_train_epochs: 1\nseed: 7")])
    assert {key: (value, type(value)) for key, value in SIMPO.recipe.items()} == {
        "beta": (10.0, float),
        "num_train_epochs": (1.0, float),
        "seed": (7, int),
    }


def test_a_union_takes_what_the_value_looks_like(write):
    fields = [("pad_to_multiple_of", "8", 8), ("pad_to_multiple_of", "auto", "auto")]
    fields += [("optim_target_modules", "all-linear", "all-linear"), ("optim_target_modules", "q,v", ["q", "v"])]
    fields += [("deepspeed", "zero.json", "zero.json"), ("deepspeed", '{"a": 1}', {"a": 1})]
    fields += [("trackio_static_space_id", "false", False), ("trackio_static_space_id", "me/space", "me/space")]
    for key, text, value in fields:
        assert SFT.targets[key].read(text) == value
        assert SFT.targets[key].read(value) == value


@pytest.mark.parametrize("value", ["no", "off", "false"])
def test_an_unquoted_no_names_the_strategy_no(value, write):
    config = parse(write(f"eval_strategy: {value}\nsave_strategy: {value}"))
    assert (config.eval_strategy, config.save_strategy) == (IntervalStrategy.NO, SaveStrategy.NO)


def test_fsdp_is_switched_on_by_a_flag_as_in_transformers(write):
    assert SIMPO.targets["fsdp"].read(True) is True
    assert parse("--fsdp").fsdp is True
    assert parse(write("fsdp: true")).fsdp is True
    assert parse(write("fsdp: full_shard auto_wrap")).fsdp_config["reshard_after_forward"] is True


def test_text_that_looks_like_something_else_stays_text():
    assert parsed("run_name", "--run_name=2024") == "2024"
    assert parsed("run_name", "--run_name=true") == "true"
    assert parsed("chat_template", "--chat_template={% for m in messages %},{% endfor %}").startswith("{%")
    assert parsed("model_revision", "--model_revision=null") == "null"


def test_dates_in_a_recipe_are_text(write):
    assert parse(write("run_name: 2024-01-31")).run_name == "2024-01-31"
    assert parse(write("run_name: 2024-13-01")).run_name == "2024-13-01"


def test_a_recipe_may_end_in_yml_and_options_may_stand_alone(tmp_path):
    recipe = tmp_path / "run.yml"
    recipe.write_text("beta: 3.0")
    assert parse(str(recipe)).beta == 3.0
    assert parse().beta == 2.0


def test_the_command_line_beats_the_recipe_and_the_recipe_the_default(write):
    recipe = write("beta: 3.0\ngamma_beta_ratio: 0.7")
    config = parse(recipe, "--beta=4")
    assert (config.beta, config.gamma_beta_ratio, config.label_smoothing) == (4.0, 0.7, 0.0)
    SIMPO.parse([recipe, "--beta=4", "--lora_r=8"])
    assert SIMPO.recipe == {"beta": 4.0, "gamma_beta_ratio": 0.7, "lora_r": 8}


def test_the_last_of_two_equal_options_counts():
    assert parse("--beta=3", "--beta=4").beta == 4.0


def test_without_an_argument_the_process_s_own_command_line_is_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_simpo.py", "--beta=7", "--use_cpu"])
    assert SIMPO.parse()[2].beta == 7.0


@pytest.mark.parametrize("parser", [SIMPO, SFT, DPO, TRL])
def test_help_lists_every_field_and_its_text(parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse(["recipe.yaml", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "[RECIPE.yaml] [--key=value ...]" in text
    assert [key for key in parser.targets if f"--{key} " not in text and f"--{key}," not in text] == []


def test_a_field_that_two_dataclasses_share_is_set_in_both():
    model_args, _, config = SFT.parse(["--trust_remote_code", "--use_cpu"])
    assert model_args.trust_remote_code
    assert config.trust_remote_code


# ---- Published recipes ----


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_recipe_keeps_its_meaning(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    parser = METHODS.get(path.stem.split("-")[0], SIMPO)
    model_args, data_args, config = parser.parse([str(path)])
    objects = {**vars(model_args), **vars(data_args), **vars(config)}
    renamed = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}
    for key, value in written.items():
        expected = [] if key == "report_to" else value
        assert objects[renamed.get(key, key)] == expected, key
    assert len(parser.notices) == 4
    assert set(parser.recipe) == {RENAMED.get(key, key) for key in written}


def test_all_golden_recipes_are_there():
    assert len(GOLDEN) == 14


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("evaluation_strategy: epoch", "eval_strategy", "epoch"),
        ("warmup_ratio: 0.25", "warmup_steps", 0.25),
        ("warmup_ratio: 0", "warmup_steps", 0.0),
        ("warmup_steps: 0\nwarmup_ratio: 0.25", "warmup_steps", 0.25),
        ("group_by_length: true", "train_sampling_strategy", "group_by_length"),
        ("group_by_length: false", "train_sampling_strategy", "random"),
        ("use_flash_attention_2: true", "attn_implementation", "flash_attention_2"),
        ("use_flash_attention_2: no", "attn_implementation", None),
        ("no_cuda: true", "use_cpu", True),
        ("push_to_hub_token: secret", "hub_token", "secret"),
        ("push_to_hub_model_id: my-model", "hub_model_id", "my-model"),
        ("dtype: bfloat16", "torch_dtype", "bfloat16"),
        ("per_gpu_train_batch_size: 3", "per_device_train_batch_size", 3),
        ("per_gpu_eval_batch_size: 3", "per_device_eval_batch_size", 3),
        ("gradient_checkpointing: true", "gradient_checkpointing", True),
        ("gradient_checkpointing: true", "activation_checkpointing", True),
    ],
)
def test_an_old_spelling_is_understood_in_both_places_with_one_notice(text, key, value, write):
    recipe = write(text)
    *earlier, last = text.split("\n")
    old = last.split(":")[0]
    assert parsed(key, recipe) == value
    assert [
        notice for notice in SIMPO.notices if notice.startswith(f"{recipe}, line {len(earlier) + 1}: {old} is ")
    ] == SIMPO.notices
    assert len(SIMPO.notices) == 1
    option = "--" + last.replace(": ", "=")
    assert parsed(key, option) == value
    assert len(SIMPO.notices) == 1
    assert old not in SIMPO.recipe


@pytest.mark.parametrize("option", ["--no_cuda", "--no-cuda"])
def test_no_cuda_is_a_key_of_its_own_and_not_the_opposite_of_cuda(option):
    SIMPO.parse([option])
    assert SIMPO.recipe == {"use_cpu": True}


def test_present_spellings_give_no_notice(write):
    parse(write("eval_strategy: epoch\nwarmup_steps: 0.1\nactivation_checkpointing: true\nattn_implementation: sdpa"))
    assert SIMPO.notices == []


@pytest.mark.parametrize("text", ["overwrite_output_dir: true", "logging_dir: logs", "save_safetensors: true"])
def test_a_key_that_means_nothing_any_more_is_ignored_with_a_notice(text, write):
    recipe = write(f"beta: 3.0\n{text}")
    assert parse(recipe).beta == 3.0
    key = text.split(":")[0]
    assert SIMPO.notices == [f"{recipe}, line 2: {key} is ignored: {DROPPED[key]}"]
    assert key not in SIMPO.recipe


def test_weights_in_another_format_than_safetensors_are_refused(write):
    recipe = write("save_safetensors: false")
    assert complaints(recipe) == [f"{recipe}, line 1: save_safetensors = False: expected true: weights are always safetensors"]
    assert complaints("--no_save_safetensors")[0].startswith("--no_save_safetensors: expected true")


def test_warmup_steps_beat_the_ratio_as_they_always_did(write):
    recipe = write("warmup_ratio: 0.25\nwarmup_steps: 100")
    assert parse(recipe).warmup_steps == 100
    assert SIMPO.notices == [f"{recipe}, line 1: warmup_ratio is ignored, because warmup_steps is given too"]


def test_a_ratio_on_the_command_line_still_beats_the_recipe(write):
    assert parse(write("warmup_steps: 100"), "--warmup_ratio=0.25").warmup_steps == 0.25
    assert parse(write("evaluation_strategy: epoch"), "--eval_strategy=no").eval_strategy == "no"
    assert parse(write("activation_checkpointing: true"), "--no_gradient_checkpointing").activation_checkpointing is False


@pytest.mark.parametrize("ratio", ["1.0", "-0.1", "ten"])
def test_a_ratio_that_would_be_read_as_a_number_of_steps_is_refused(ratio, write):
    assert "expected a" in complaints(write(f"warmup_ratio: {ratio}"))[0]


def test_two_spellings_of_one_thing_may_agree_but_not_differ(write):
    assert parse(write("evaluation_strategy: epoch\neval_strategy: epoch")).eval_strategy == "epoch"
    recipe = write("evaluation_strategy: epoch\neval_strategy: steps")
    assert complaints(recipe) == [
        f"{recipe}, line 2: eval_strategy = 'steps': expected the same as evaluation_strategy = 'epoch', its other spelling; "
        "keep one of them"
    ]
    contradiction = complaints("--attn_implementation=sdpa", "--use_flash_attention_2")
    assert contradiction[0].startswith("--use_flash_attention_2: expected the same as attn_implementation = 'sdpa'")


def test_the_old_length_limit_is_understood_where_a_row_is_one_sequence(write):
    recipe = write("max_seq_length: 2048")
    assert SFT.parse([recipe, "--use_cpu"])[2].max_length == 2048
    assert complaints(recipe)[0].startswith(f"{recipe}, line 1: unknown key 'max_seq_length'")


def test_an_old_spelling_counts_only_where_its_new_name_is_a_field(write):
    parser = H4ArgumentParser((DataArguments,))
    with pytest.raises(RecipeError, match="unknown key 'evaluation_strategy'"):
        parser.parse([write("evaluation_strategy: steps")])


# ---- What is wrong, and where ----


def test_a_misspelt_key_is_refused_with_a_suggestion(write):
    recipe = write("gama_beta_ratio: 0.5")
    assert complaints(recipe) == [f"{recipe}, line 1: unknown key 'gama_beta_ratio' (did you mean 'gamma_beta_ratio'?)"]
    assert complaints("--gama-beta-ratio", "0.5") == [
        "--gama-beta-ratio 0.5: unknown key 'gama_beta_ratio' (did you mean 'gamma_beta_ratio'?)"
    ]


def test_a_misspelt_old_key_is_suggested_as_well():
    assert complaints("--warmup_rato=0.1") == ["--warmup_rato=0.1: unknown key 'warmup_rato' (did you mean 'warmup_ratio'?)"]


def test_a_section_is_refused_because_a_recipe_is_flat(write):
    recipe = write("training:\n  beta: 2.0")
    assert complaints(recipe) == [f"{recipe}, line 1: unknown key 'training'; a recipe is flat, without sections"]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--gradient_checkpointing=maybe", "true or false"),
        ("--beta=large", "a number"),
        ("--beta=nan", "a number"),
        ("--beta=", "a number"),
        ("--beta", "a number"),
        ("--no_beta", "a number"),
        ("--lora_r=1.5", "a whole number"),
        ("--lora_r=inf", "a whole number"),
        ("--lora_r=true", "a whole number"),
        ("--loss_type=ipo", "one of sigmoid, hinge, alphapo, simper"),
        ("--eval_strategy=stpes", "one of no, steps, epoch"),
        ("--log_level=loud", "one of detail, debug, info, warning, error, critical, passive"),
        ("--dataset_splits=train,,test", "a list without empty entries"),
        ('--dataset_splits=[1, "test"]', "a list of entries, each text (in YAML perhaps with quotes)"),
        ("--dataset_mixer=pairs", 'a mapping such as {"key": 1}'),
        ('--dataset_mixer=["pairs"]', 'a mapping such as {"key": 1}'),
        ('--dataset_mixer={"a": 1, "a": 2}', "JSON (a key is given twice)"),
        ('--liger_kernel_config={"rope": "perhaps"}', "a mapping to entries, each true or false"),
        ("--parallelism_config=8", "null"),
        ("--output_dir", "text (in YAML perhaps with quotes)"),
    ],
)
def test_an_ill_typed_option_is_refused_with_what_is_expected(option, expected):
    assert complaints(option) == [f"{option}: expected {expected}"]


def test_broken_json_is_refused_and_not_taken_for_a_file_name():
    assert complaints('--lr_scheduler_kwargs={"min_lr": }')[0].startswith(
        '--lr_scheduler_kwargs={"min_lr": }: expected JSON (Expecting value'
    )


def test_a_value_of_several_lines_is_shown_in_one():
    assert complaints("--beta=1\n2") == ["--beta=1\\n2: expected a number"]


def test_two_values_where_one_belongs_are_refused():
    assert complaints("--beta", "2", "3") == ["--beta 2 3: expected a number"]
    assert complaints("--bf16=false", "recipe.yaml") == ["--bf16=false recipe.yaml: expected true or false"]


def test_an_ill_typed_key_of_a_recipe_is_refused_with_its_value(write):
    recipe = write("lora_r: many\nmodel_revision: 123\nbf16: 2\ndataset_mixer: {1: 0.5}")
    assert complaints(recipe) == [
        f"{recipe}, line 1: lora_r = 'many': expected a whole number",
        f"{recipe}, line 2: model_revision = 123: expected text (in YAML perhaps with quotes)",
        f"{recipe}, line 3: bf16 = 2: expected true or false",
        f'{recipe}, line 4: dataset_mixer = {{1: 0.5}}: expected a mapping such as {{"key": 1}}',
    ]


def test_everything_wrong_is_listed_in_one_error_with_the_place_of_each(write):
    recipe = write("gama_beta_ratio: 1\nbeta: -1.0\nseed: x\nmax_length: 128\ndataset_mixer: {pairs: 2.5}\n")
    assert complaints(recipe, "--lora-dropout=2", "--label_smoothing", "0.7", "--tf32=maybe") == [
        f"{recipe}, line 1: unknown key 'gama_beta_ratio' (did you mean 'gamma_beta_ratio'?)",
        f"{recipe}, line 3: seed = 'x': expected a whole number",
        "--tf32=maybe: expected true or false",
        "--lora-dropout=2: must be at least 0 and below 1",
        f"{recipe}, line 5: dataset_mixer.pairs = 2.5: must be a fraction in (0, 1] or a whole number of rows",
        f"{recipe}, line 2: beta = -1.0: must be positive",
        "--label_smoothing 0.7: must be at least 0 and below 0.5",
        f"{recipe}, line 4: max_prompt_length = 128: leaves no room for a response in max_length = 128 "
        "(max_prompt_length is at its default)",
    ]


def test_a_part_of_an_option_s_value_is_named():
    option = '--dataset_mixer={"pairs": 2.5}'
    advice = "must be a fraction in (0, 1] or a whole number of rows"
    assert complaints(option) == [f"{option}: dataset_mixer.pairs = 2.5: {advice}"]


@pytest.mark.parametrize("line", ["max_length: long", "max_lenght: 2048"])
def test_a_default_that_stands_in_for_a_refused_value_is_not_complained_about(line, write):
    assert len(complaints(write(f"max_prompt_length: 1800\n{line}"))) == 1


def test_a_refusal_of_transformers_is_one_line_behind_the_settings_that_it_names(write):
    assert complaints("--accelerator_config=gone.json")[0].startswith("--accelerator_config=gone.json: [Errno 2]")
    unknown = complaints(write("accelerator_config: {split: true}"))
    assert "accelerator_config = {'split': True}: " in unknown[0]


def test_bf16_without_a_gpu_that_has_it_is_refused_with_what_works_instead(write, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    recipe = write("bf16: true")
    with pytest.raises(RecipeError) as error:
        SIMPO.parse([recipe])
    assert str(error.value) == (
        f"{recipe}, line 1: bf16 = True: no GPU that computes in bf16; set bf16: false, or use_cpu: true to train on the CPU"
    )
    SIMPO.parse([recipe, "--bf16=false"])
    SIMPO.parse([recipe, "--use_cpu"])
    with pytest.raises(RecipeError, match=r"^--bf16_full_eval: no GPU"):
        SIMPO.parse(["--bf16_full_eval", "--no_bf16"])
    with pytest.raises(RecipeError, match=r"^the command line: bf16 = True: no GPU"):
        TRL.parse([])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", ": is empty; expected lines of `key: value`"),
        ("# a comment\n", ": is empty; expected lines of `key: value`"),
        ("- beta\n- 2.0", ", line 1: holds a list; expected lines of `key: value`"),
        ("beta", ", line 1: holds a str; expected lines of `key: value`"),
        ("beta: 2.0\ngamma_beta_ratio: 0.5\nbeta: 3.0", ", line 3: 'beta' is given twice"),
        ("dataset_mixer:\n  pairs: 0.5\n  pairs: 1.0", ", line 3: 'pairs' is given twice"),
        ("beta: 2.0\nloss_type: [sigmoid\nseed: 1", ", line 2: "),
        ("beta: 2.0\n\tseed: 1", ", line 2: "),
        ("beta: !!python/object:os.system 1", ", line 1: could not determine a constructor"),
        ("beta: 2.0\n---\nbeta: 3.0", ", line 3: a second document begins"),
        ("beta: \x07", ": unacceptable character"),
        ("beta: 2.0\nchat_template_kwargs: &a {x: *a}", ", line 2: an alias stands in what it names"),
        ("lora_target_modules: &a\n- q_proj\n- *a", ", line 1: an alias stands in what it names"),
        ("chat_template_kwargs: {x: " + "[" * 3000 + "]" * 3000 + "}", ": is nested too deeply"),
        ("beta: 2.0\nseed 3\nmax_steps: 4", ", line 2: could not find expected ':'; a key and its value stand as `key: value`"),
        (
            "chat_template: {{ messages }}",
            ", line 1: found unhashable key; text that begins with { or [, such as Jinja, needs quo",
        ),
        ("run_name: @me", ", line 1: found character '@' that cannot start any token; text that begins so needs quotes"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_place_of_the_fault(text, complaint, write):
    recipe = write(text)
    assert len(complaints(recipe)) == 1
    assert complaints(recipe)[0].startswith(recipe + complaint)


def test_a_tagged_number_is_as_doubtful_as_another(write):
    assert "seed = '010': expected a decimal number" in complaints(write("seed: !!int 010"))[0]
    assert parsed("seed", write("seed: !!int 12")) == 12


def test_what_turns_out_later_is_told_with_the_line_of_its_key(write):
    recipe = write("beta: 2.0\nchat_template: x.jinja\ndataset_mixer:\n  pairs: 1.0")
    SIMPO.parse([recipe, "--strategy=zero3"])
    for message, place in {
        "chat_template = 'x.jinja': no such file": f"{recipe}, line 2: ",
        "pairs: has no rows": f"{recipe}, line 3: ",
        "dataset_mixer.pairs: has no rows": f"{recipe}, line 3: ",
        "strategy = zero3: this launch is single": "--strategy=zero3: ",
        "pairs/train.jsonl, line 3: is no JSON": "",
        "beta and gamma": "",
        "seed: is at its default": "",
    }.items():
        with pytest.raises(UserError) as error, SIMPO.placing():
            raise UserError(message)
        assert str(error.value) == place + message


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path):
    (tmp_path / "simpo.yaml").write_text("beta: 2.0")
    missing = str(tmp_path / "simpi.yaml")
    assert complaints(missing) == [f"{missing}: no such file (did you mean 'simpo.yaml'?)"]
    (tmp_path / "folder.yaml").mkdir()
    assert complaints(str(tmp_path / "folder.yaml")) == [f"{tmp_path}/folder.yaml: Is a directory"]
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9")
    assert complaints(str(tmp_path / "latin.yaml"))[0].startswith(f"{tmp_path}/latin.yaml, line 1: is not UTF-8 (byte 0xe9); ")
    (tmp_path / "notepad.yaml").write_bytes("beta: 2.0\n".encode("utf-16"))
    assert complaints(str(tmp_path / "notepad.yaml"))[0].endswith("iconv -f utf-16 -t utf-8")


@pytest.mark.parametrize(
    "text", ["beta: 3.0\n---\n", "---\nbeta: 3.0\n", "---\nbeta: 3.0\n...\n", "\ufeffbeta: 3.0", "beta: 3.0\n---\n# end\n"]
)
def test_empty_documents_and_marks_around_a_recipe_are_no_part_of_it(text, write):
    assert parse(write(text)).beta == 3.0


def test_every_line_of_a_refusal_names_the_file_and_the_line_of_its_key(write):
    recipe = write(
        "# a comment\nbeta: -1\n\nmax_length: 100\nsed: 3\nlora_r: x\ntraining:\n  seed: 1\nper_device_eval_batch_size: 0\n"
    )
    lines = complaints(recipe)
    places = [int(re.match(rf"{re.escape(recipe)}, line (\d+): ", line)[1]) for line in lines]
    assert sorted(places) == [2, 4, 5, 6, 7, 9]


def test_a_key_that_comes_by_an_anchor_is_named_where_it_was_written(write):
    recipe = write("<<: {beta: -3}\ngamma_beta_ratio: 0.5")
    assert complaints(recipe) == [f"{recipe}, line 1: beta = -3.0: must be positive"]


def test_thousands_of_unknown_keys_are_a_list_with_an_end(write):
    recipe = write("".join(f"key_{number}: 1\n" for number in range(20_000)))
    with pytest.raises(RecipeError) as error:
        SIMPO.parse([recipe])
    lines = str(error.value).splitlines()
    assert len(error.value.complaints) == 20_000
    assert len(lines) < 50
    assert lines[-1] == f"... and {20_001 - len(lines)} more of the kind"


# ---- What YAML 1.1 and the shell make of a value ----


@pytest.mark.parametrize("text", ["0100", "010", "-010", "+07", "08", "0_1", "1:30", "1:30:00", "-1:30", "190:20:30.15"])
@pytest.mark.parametrize("key", ["max_steps", "seed", "learning_rate", "save_total_limit", "eval_steps", "warmup_ratio"])
def test_a_number_that_yaml_counts_in_eights_or_sixties_is_refused(key, text, write):
    recipe = write(f"{key}: {text}")
    (line,) = complaints(recipe)
    assert line.startswith(f"{recipe}, line 1: {key} = '{text}': expected ")
    assert "without leading zeros or colons" in line


def test_such_a_number_is_refused_inside_a_mapping_or_a_list_too(write):
    for text in ("lr_scheduler_kwargs: {num_cycles: 010}", "lr_scheduler_kwargs: {a: [1:30]}", "dataset_mixer: {pairs: 0100}"):
        assert "without leading zeros or colons" in complaints(write(text))[0]


def test_where_text_is_meant_such_a_number_is_that_text(write):
    assert parse(write("run_name: 0100")).run_name == "0100"
    assert parse(write("run_name: 12:30")).run_name == "12:30"
    assert type(parse(write("run_name: 007")).run_name) is str
    assert parsed("dataset_mixer", write("dataset_mixer: {010: 1.0}")) == {"010": 1.0}
    assert parsed("dataset_splits", write("dataset_splits: [007, train]")) == ["007", "train"]


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("10", 10), ("1_000", 1000), ("0x10", 16), ("1e2", 100)])
def test_numbers_without_a_double_meaning_are_read(text, value, write):
    assert parse(write(f"seed: {text}")).seed == value


@pytest.mark.parametrize("text", ["dataset_splits: [no, yes]", "seed: .inf", "max_steps: .nan", "seed: yes", "seed: 1.5"])
def test_words_and_infinities_where_text_or_a_count_belongs_are_refused(text, write):
    assert len(complaints(write(text))) == 1


@pytest.mark.parametrize("home", ["~/run", "$HOME/run", "${HOME}/run", "${HOME}/./run"])
def test_a_home_and_a_variable_in_a_path_stand_for_what_they_are_to_a_shell(home, write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("output_dir", "model_name_or_path", "tokenizer_name_or_path", "resume_from_checkpoint"):
        assert Path(parsed(key, write(f"{key}: {home}"))) == tmp_path / "run"
        assert Path(parsed(key, f"--{key}={home}")) == tmp_path / "run"
    assert list(map(Path, parsed("dataset_mixer", write(f"dataset_mixer: {{{json.dumps(home)}: 1.0}}")))) == [tmp_path / "run"]
    assert Path(parsed("chat_template", write(f"chat_template: {home}.jinja"))) == tmp_path / "run.jinja"
    assert "$" not in yaml.safe_load(dump_recipe(SIMPO.recipe))["chat_template"]


@pytest.mark.parametrize(
    "path", ["${SCRATCH}/run", "$SCRATCH/run", "run/$SCRATCH", "${SCRATCH:-/tmp}/run", "${EMPTY}/run", "~nobody-here/run"]
)
@pytest.mark.parametrize("key", ["output_dir", "model_name_or_path", "dataset_mixer"])
def test_a_path_with_a_variable_that_is_not_set_is_refused(path, key, write, monkeypatch):
    monkeypatch.delenv("SCRATCH", raising=False)
    monkeypatch.setenv("EMPTY", "")
    recipe = write(yaml.safe_dump({key: {path: 1.0} if key == "dataset_mixer" else path}))
    (line,) = complaints(recipe)
    assert line.startswith(f"{recipe}, line 1: {key} = ")
    assert "is not set" in line or "no user is called 'nobody-here'" in line


def test_what_exists_under_the_very_name_is_meant_by_it(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("$SCRATCH", "~odd"):
        (tmp_path / name).mkdir()
        assert parsed("model_name_or_path", f"--model_name_or_path={name}") == name
        assert parsed("dataset_mixer", "--dataset_mixer", json.dumps({name: 1.0})) == {name: 1.0}


def test_jinja_text_is_no_path():
    text = "~ {{ '$HOME' ~ x }}"
    assert parsed("chat_template", f"--chat_template={text}") == text


@pytest.mark.parametrize("key", ["wandb_project", "WANDB_MODE", "mlflow_tracking_uri", "tensorboard_logging_dir", "hf_home"])
def test_what_trackers_and_libraries_read_from_the_environment_is_said_to_belong_there(key, write):
    recipe = write(f"{key}: x")
    assert complaints(recipe) == [
        f"{recipe}, line 1: unknown key {key!r}; it is read from the environment: export {key.upper()}=..."
    ]


def test_a_key_to_a_tracker_is_not_repeated():
    assert "abc" not in complaints("--wandb_api_key=abc")[0]


@pytest.mark.parametrize("word", ["recipe.json", "beta=2", "-beta"])
def test_a_first_word_that_is_neither_recipe_nor_option_is_refused(word):
    assert complaints(word) == [f"{word}: expected a recipe, a file that ends in .yaml or .yml, or --key=value"]


# ---- What a run records ----


def test_a_credential_is_used_but_never_shown(write):
    recipe = write("push_to_hub_token: hf_secret\nmodel_init_kwargs: {token: hf_other, use_cache: false}")
    config = parse(recipe)
    assert config.hub_token == "hf_secret"
    assert config.model_init_kwargs == {"token": "hf_other", "use_cache": False}
    for text in (dump_recipe(SIMPO.recipe), full_recipe(SIMPO.recipe, SIMPO.dataclass_types)):
        assert "hf_" not in text
        assert yaml.safe_load(text)["model_init_kwargs"] == {"use_cache": False}
    assert "hf_secret" not in "".join(SIMPO.notices)
    assert parse("--hub_token=hf_secret").hub_token == "hf_secret"
    assert "hf_secret" not in complaints("--hub_token", "hf_secret", "x")[0]
    assert "17" not in complaints(write("hub_token: 17"))[0].removeprefix(recipe).split("hub_token")[1]


def test_tokens_of_a_tokenizer_are_no_credentials():
    SFT.parse(["--eos_token=<|end|>", "--use_cpu"])
    assert yaml.safe_load(full_recipe(SFT.recipe, SFT.dataclass_types))["eos_token"] == "<|end|>"
    SIMPO.parse(["--label_pad_token_id=-100"])
    assert yaml.safe_load(dump_recipe(SIMPO.recipe)) == {"label_pad_token_id": -100}


@pytest.mark.parametrize("key", ["a/chat_token", "my_token"])
def test_a_dataset_whose_name_sounds_like_a_credential_is_recorded(key):
    recipe = {"dataset_mixer": {key: 0.5}}
    assert yaml.safe_load(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    "text", ["5e-7", "no", "2024-01-31", "1:30", "", " a ", "a: b", "# a", "a\n\nb\n", "\x85", "\u2028", "Größe"]
)
def test_text_is_recorded_letter_by_letter(text, write):
    SIMPO.parse([f"--text_column={text}"])
    assert SIMPO.parse([write(dump_recipe(SIMPO.recipe))])[1].text_column == text


@pytest.mark.parametrize("parser", [SIMPO, SFT, DPO, TRL])
@pytest.mark.parametrize(
    "argv", [["--use_cpu", "--bf16"], ["--use_cpu", "--gradient_checkpointing", "--lora_r=8", "--report_to=wandb"]]
)
def test_the_full_recipe_names_every_field_and_gives_the_same_run(parser, argv, write):
    objects = parser.parse(argv)
    given_keys = list(parser.recipe)
    text = full_recipe(parser.recipe, parser.dataclass_types)
    before, defaults = text.split("# defaults\n")
    assert list(yaml.safe_load(before)) == given_keys
    assert set(given_keys) | set(yaml.safe_load(defaults)) == set(parser.targets) - set(RENAMED)
    assert parser.parse([write(text)]) == objects
    assert parser.notices == []


@pytest.mark.parametrize("recipe", [{}, {"hub_token": "hf_secret"}])
def test_the_full_recipe_of_a_run_that_says_nothing_in_public_is_all_defaults(recipe, write):
    text = full_recipe(recipe, SIMPO.dataclass_types)
    assert text.startswith("# defaults\n")
    assert SIMPO.parse([write(text)]) == SIMPO.parse([])


def test_a_run_is_not_changed_by_what_transformers_does_to_its_mappings(write):
    parse(write("fsdp: true\nfsdp_config: {fsdp_version: 2}"))
    assert SIMPO.recipe["fsdp_config"] == {"fsdp_version": 2}


def test_importing_the_parser_loads_no_model_code():
    script = "import sys, alignment.recipe.parser; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# ---- Properties, over every field of every config ----
#
# The fields' own names, types, defaults and metadata, without the cross-checks, so that any well-typed value is legal.


def without_checks(parser: H4ArgumentParser) -> H4ArgumentParser:
    fields = [
        (name, target.kind, copy(target.field))
        for name, target in parser.targets.items()
        # Old spellings are set under their new names; include_num_input_tokens_seen makes one thing of "no" and false.
        if name not in (*RENAMED, "include_num_input_tokens_seen")
    ]
    return H4ArgumentParser((dataclasses.make_dataclass("Plain", fields),))


PLAIN = {"simpo": without_checks(SIMPO), "sft": without_checks(SFT), "dpo": without_checks(DPO), "trl": without_checks(TRL)}
every_config = pytest.mark.parametrize("config", list(PLAIN))
quick = settings(max_examples=30, deadline=None, derandomize=True)

WORDS = st.sampled_from(["all-linear", "wandb", "a b", "full", "x=y", "Größe", "zero.json"])
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False))
KEYS = st.text(max_size=8).filter(lambda key: not is_secret(key))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)


def members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def names_of(kind: type[Enum]) -> list[str]:
    return [member.value for member in kind]


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Well-typed values of an annotation, text only where it cannot be meant for another member of a union."""
    kinds = members(kind)
    if len(kinds) > 1:
        kinds = [member for member in kinds if member is not ParallelismConfig]
        if any(map(is_enum, kinds)):
            kinds = [member for member in kinds if member is not str]
        alone = {str, NoneType} == set(kinds)
        text = st.text(max_size=12).filter(lambda text: text.strip().lower() not in ("null", "none"))
        return st.one_of((text if alone else WORDS) if member is str else values_of(member) for member in kinds)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if is_enum(kind):
        return st.sampled_from(names_of(kind))
    if get_origin(kind) is list:
        return st.lists(values_of(*get_args(kind)).filter(lambda item: item != ""), max_size=3)
    if (get_origin(kind) or kind) is dict:
        return st.dictionaries(KEYS, values_of(get_args(kind)[1]) if get_args(kind) else ANYTHING, max_size=3)
    return {
        Any: ANYTHING,
        NoneType: st.none(),
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=12),
    }[kind]


def recipes(parser: H4ArgumentParser) -> st.SearchStrategy[dict[str, Any]]:
    """A few fields with well-typed values."""
    strategies = {}
    for name, target in parser.targets.items():
        if is_secret(name):
            continue
        values = values_of(target.kind)
        if "choices" in target.field.metadata:
            optional = [None] if NoneType in members(target.kind) else []
            values = st.sampled_from([*target.field.metadata["choices"], *optional])
        if name == "report_to":
            values = values.filter(lambda value: value is not None)  # read as "none", tested above
        if name == "fsdp":
            values = st.one_of(st.booleans(), st.none(), WORDS)
        strategies[name] = values
    return st.lists(st.sampled_from(sorted(strategies)), max_size=8, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: strategies[name] for name in names})
    )


def plain(parser: H4ArgumentParser, *argv: str) -> Any:
    return parser.parse(list(argv))[0]


@every_config
@quick
@given(data=st.data())
def test_a_recipe_survives_being_parsed_and_dumped(config, data, write):
    parser = PLAIN[config]
    recipe = data.draw(recipes(parser))
    expected = parser.dataclass_types[0](**recipe)
    for text in (dump_recipe(recipe), full_recipe(recipe, parser.dataclass_types)):
        assert plain(parser, write(text)) == expected
    assert plain(parser, write(dump_recipe(recipe))) == expected
    assert parser.recipe == recipe
    assert dump_recipe(parser.recipe) == dump_recipe(typed(parser, recipe))
    # A reader without this suite's loader sees the same.
    assert yaml.safe_load(dump_recipe(recipe)) == recipe


def typed(parser: H4ArgumentParser, recipe: dict[str, Any]) -> dict[str, Any]:
    """Floats written as whole numbers, as the fields declare them."""
    return {key: parser.targets[key].read(value) for key, value in recipe.items()}


def option(draw: Any, key: str, value: Any) -> list[str]:
    """One of the ways to write a setting on a command line."""
    name = f"--{key.replace('_', '-') if draw(st.booleans()) else key}"
    if value is True and draw(st.booleans()):
        return [name]
    text = json.dumps(value) if isinstance(value, list | dict) or value is None else str(value)
    return [name, text] if not text.startswith("--") and draw(st.booleans()) else [f"{name}={text}"]


@every_config
@quick
@given(data=st.data())
def test_the_command_line_and_the_recipe_spell_the_same_values(config, data, write):
    parser = PLAIN[config]
    recipe = data.draw(recipes(parser))
    words = [word for key, value in recipe.items() for word in option(data.draw, key, value)]
    assert plain(parser, *words) == plain(parser, write(dump_recipe(recipe)))


def near_misses() -> st.SearchStrategy[str]:
    """A field's name with one letter dropped, doubled or replaced."""

    def damage(name: str, place: int, letter: str) -> str:
        place %= len(name)
        return name[:place] + letter + name[place + 1 :]

    fields = st.sampled_from([name for name in SIMPO.targets if len(name) > 7])
    return st.builds(damage, fields, st.integers(0, 50), st.sampled_from(["", "q", "zz", "_"])).filter(is_unknown)


def is_unknown(key: str) -> bool:
    if is_secret(key):
        return False  # shown without its value, as tested above
    return key not in {*SIMPO.targets, *RENAMED, *SWITCHES, *DROPPED} and key.removeprefix("no_") not in SIMPO.targets


@settings(max_examples=100, deadline=None, derandomize=True)
@given(key=near_misses(), on_command_line=st.booleans())
def test_no_near_miss_of_a_key_passes_and_each_gets_a_suggestion(key, on_command_line, write):
    word = f"--{key}=1" if on_command_line else write(f"{key}: 1")
    place = word if on_command_line else f"{word}, line 1"
    lines = complaints(word)
    assert len(lines) == 1
    assert lines[0].startswith(f"{place}: unknown key {key!r} (did you mean '")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(key=st.text(min_size=1, max_size=12).filter(is_unknown), value=ANYTHING)
def test_no_unknown_key_passes(key, value, write):
    recipe = write(yaml.safe_dump({key: value, "beta": 3.0}))
    assert any(line.startswith(recipe) and f": unknown key {key!r}" in line for line in complaints(recipe))


def admits(parser: H4ArgumentParser, name: str) -> set[Any]:
    """The types of YAML values that a field takes; "text" if it takes any text at all."""
    target = parser.targets[name]
    kinds = members(target.kind)
    types: set[Any] = {get_origin(kind) or kind for kind in kinds}
    if any(map(is_enum, kinds)) or "choices" in target.field.metadata:
        types.discard(str)
    if str in types or list[str] in kinds:
        types.add("text")
    if any(list in {get_origin(item) for item in members(get_args(kind)[0])} for kind in kinds if get_origin(kind) is list):
        types.add("lists")
    if float in types:
        types.add(int)
    if "const" in target.field.metadata:
        types.add(bool)
    if name == "report_to":
        types.add(NoneType)
    return types


MISFITS = [
    # value, the types that admit it
    (None, {NoneType}),
    (3, {int}),
    (1.5, {float}),
    (math.inf, {float}),
    (math.nan, set()),
    (True, {bool}),
    ("perhaps", {"text"}),
    ("", {"text", list}),
    ([], {list}),
    ([{}], set()),
    ([[]], {"lists"}),
    ({}, {dict}),
    ({1: 2}, set()),
]


@every_config
@pytest.mark.parametrize(("value", "kinds"), MISFITS, ids=[repr(value) for value, _ in MISFITS])
def test_exactly_the_fields_whose_type_does_not_admit_a_value_refuse_it(config, value, kinds, write):
    parser = PLAIN[config]
    recipe = write(yaml.safe_dump(dict.fromkeys(parser.targets, value)))
    expected = {name for name in parser.targets if not admits(parser, name) & kinds}
    try:
        parser.parse([recipe])
        lines: list[str] = []
    except RecipeError as error:
        lines = error.complaints
    assert {re.match(r".*?, line \d+: (\w+) = ", line)[1] for line in lines} == expected


def test_the_properties_meet_every_kind_of_annotation():
    kinds = {leaf for parser in PLAIN.values() for target in parser.targets.values() for leaf in members(target.kind)}
    origins = {get_origin(kind) or kind for kind in kinds if not is_enum(kind)}
    assert {bool, int, float, str, list, dict, Literal, NoneType} <= origins


def test_a_problem_of_a_recipe_names_an_old_spelling_as_it_was_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: run\ngradient_checkpointing_kwargs: {use_reentrent: false}\n", encoding="utf-8")
    (line,) = complaints(str(path))
    assert line.startswith(f"{path}, line 2: gradient_checkpointing_kwargs = {{'use_reentrent': False}}: use_reentrent is not")


def test_an_error_of_a_library_is_put_down_to_settings_that_it_shows_and_not_to_a_digit_in_a_word():
    assert quoted(4, "micro batch 4 is too large")
    assert quoted("ds.json", "received 'ds.json'")
    assert not quoted(4, "expected a base64 encoded string")


@pytest.mark.parametrize("loss", ["cross_entropy", "fused_linear_cross_entropy"])
@pytest.mark.parametrize("parser", [SIMPO, SFT], ids=["simpo", "sft"])
def test_a_loss_of_ligers_own_is_refused_where_it_is_asked_for(parser, loss):
    (line,) = complaints("--output_dir=run", f'--liger_kernel_config={{"rope": true, "{loss}": true}}', parser=parser)
    assert "losses of Liger's own" in line
    parser.parse(["--output_dir=run", "--use_cpu", f'--liger_kernel_config={{"rope": true, "{loss}": false}}'])
