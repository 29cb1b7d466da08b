"""Every recipe and launcher config parses, and the published runs are the published ones."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from alignment.data.template import TEMPLATE_FOLDER
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser
from scripts.dpo_config import DPOConfig
from scripts.orpo_config import ORPOConfig
from scripts.sft_config import SFTConfig
from scripts.simpo_config import SimPOConfig

ROOT = Path(__file__).parents[3]
RECIPE_FOLDER = ROOT / "training_configs"
ON_POLICY = RECIPE_FOLDER / "on-policy"  # recipes of no training: tests/unit/on_policy
RECIPES = sorted(
    path.relative_to(RECIPE_FOLDER).with_suffix("").as_posix()
    for path in RECIPE_FOLDER.rglob("*.yaml")
    if path.parent not in (ON_POLICY, RECIPE_FOLDER / "ablations")  # matrices
)
LAUNCHER_CONFIGS = sorted(path.name for path in (ROOT / "accelerate_configs").glob("*.yaml"))
CONFIG_CLASSES = {
    "scripts/run_simpo.py": SimPOConfig,
    "scripts/run_dpo.py": DPOConfig,
    "scripts/run_orpo.py": ORPOConfig,
    "scripts/run_sft.py": SFTConfig,
}


class Published(NamedTuple):
    """What differs between the published SimPO runs; lengths in tokens."""

    model_name_or_path: str
    dataset: str
    dataset_splits: list[str]
    beta: float
    gamma_beta_ratio: float
    learning_rate: float
    max_length: int = 2048
    max_prompt_length: int = 1800


ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
LLAMA_INSTRUCT = "meta-llama/Meta-Llama-3-8B-Instruct"
PREFS = ["train_prefs", "test_prefs"]
WHOLE = ["train", "test"]
PUBLISHED = {
    "mistral-7b-base-simpo": Published(
        "alignment-handbook/zephyr-7b-sft-full", ULTRAFEEDBACK, PREFS, 2.0, 0.8, 3e-7, 1024, 512
    ),
    "mistral-7b-instruct-simpo": Published(
        "mistralai/Mistral-7B-Instruct-v0.2", "princeton-nlp/mistral-instruct-ultrafeedback", WHOLE, 2.5, 0.1, 5e-7
    ),
    "llama-3-8b-base-simpo": Published("princeton-nlp/Llama-3-Base-8B-SFT", ULTRAFEEDBACK, PREFS, 2.0, 0.5, 6e-7),
    "llama-3-8b-instruct-simpo": Published(LLAMA_INSTRUCT, "princeton-nlp/llama3-ultrafeedback", WHOLE, 2.5, 0.55, 1e-6),
    "llama-3-8b-instruct-simpo-v2": Published(
        LLAMA_INSTRUCT, "princeton-nlp/llama3-ultrafeedback-armorm", WHOLE, 10, 0.3, 1e-6
    ),
    "gemma-2-9b-it-simpo": Published("google/gemma-2-9b-it", "princeton-nlp/gemma2-ultrafeedback-armorm", WHOLE, 10, 0.5, 8e-7),
}
# What the published SimPO runs share, in the published keys.
SHARED = {
    "bf16": True,
    "do_eval": True,
    "evaluation_strategy": "steps",
    "eval_steps": 400,
    "gradient_accumulation_steps": 16,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "logging_steps": 5,
    "log_level": "info",
    "seed": 42,
    "save_strategy": "steps",
    "save_steps": 1_000_000,
    "save_total_limit": 20,
    "preprocessing_num_workers": 12,
    "report_to": ["wandb"],
    "push_to_hub": False,
    "torch_dtype": None,
}
every_recipe = pytest.mark.parametrize("name", RECIPES)
ADAPTER_RECIPES = [name for name in RECIPES if name.endswith("lora")]
every_adapter_recipe = pytest.mark.parametrize("name", ADAPTER_RECIPES)
every_published_run = pytest.mark.parametrize("name", sorted(PUBLISHED))


def recipe_text(name: str) -> str:
    return (RECIPE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load(recipe_text(name))


def launch_command(name: str) -> list[str]:
    """The words of the first line: [...] --config_file LAUNCHER SCRIPT RECIPE, without its options for one process."""
    line = recipe_text(name).splitlines()[0]
    assert "accelerate launch --config_file " in line, "the first line is not the command that launches the recipe"
    return [word for word in line.removeprefix("# ").split() if word not in ("--cpu", "--num_processes=1")]


def parse(name: str) -> tuple[ModelArguments, DataArguments, SimPOConfig | SFTConfig]:
    config_class = CONFIG_CLASSES[launch_command(name)[-2]]
    parser = H4ArgumentParser((ModelArguments, DataArguments, config_class))
    return parser.parse([str(RECIPE_FOLDER / f"{name}.yaml"), "--use_cpu"])


def launcher_config(name: str) -> ClusterConfig:
    return load_config_from_file(str(ROOT / "accelerate_configs" / name))


@every_recipe
def test_every_recipe_parses(name):
    model_args, data_args, training_args = parse(name)
    assert model_args.model_name_or_path
    assert data_args.dataset_mixer
    assert training_args.output_dir


@every_recipe
def test_a_recipe_begins_with_a_command_whose_files_exist_and_that_launches_it(name):
    *_, launcher, script, recipe = launch_command(name)
    assert [file for file in (launcher, script) if not (ROOT / file).is_file()] == []
    assert recipe == f"training_configs/{name}.yaml"


@every_recipe
def test_a_run_is_named_like_its_recipe(name):
    recipe = read(name)
    assert recipe["output_dir"] == f"outputs/{name}"
    assert recipe.get("run_name", name) == name


@every_published_run
def test_a_published_run_has_the_published_settings(name):
    recipe = read(name)
    published = PUBLISHED[name]
    expected = published._asdict() | {"dataset_mixer": {published.dataset: 1.0}}
    del expected["dataset"]
    assert {key: recipe[key] for key in expected} == expected


@every_published_run
def test_the_published_runs_share_everything_else(name):
    recipe = read(name)
    own = set(Published._fields) | {"dataset_mixer", "output_dir", "run_name", "attn_implementation", "chat_template"}
    assert {key: value for key, value in recipe.items() if key not in own} == SHARED


@every_published_run
def test_only_gemma_attends_eagerly_and_brings_a_template(name):
    recipe = read(name)
    gemma = name.startswith("gemma")
    assert recipe["attn_implementation"] == ("eager" if gemma else "flash_attention_2")
    assert recipe.get("chat_template") == ("gemma" if gemma else None)


@every_published_run
def test_published_keys_keep_their_meaning_under_todays_names(name):
    _, _, config = parse(name)
    assert (config.eval_strategy, config.eval_steps) == ("steps", 400)
    assert (config.lr_scheduler_type, config.get_warmup_steps(1000)) == ("cosine", 100)
    assert config.learning_rate == PUBLISHED[name].learning_rate
    assert config.preprocessing == "published"


# Learning rates of the authors' best DPO runs; their beta is 0.01 everywhere.
DPO_RATES = {
    "mistral-7b-base": 5e-7,
    "mistral-7b-instruct": 5e-7,
    "llama-3-8b-base": 5e-7,
    "llama-3-8b-instruct": 7e-7,
    "llama-3-8b-instruct-v2": 3e-7,
    "gemma-2-9b-it": 5e-7,
}
OF_THE_OBJECTIVE = {"beta", "gamma_beta_ratio", "length_normalized", "learning_rate", "output_dir", "run_name"}


def twin_name(setting: str, method: str) -> str:
    return setting.replace("-v2", f"-{method}-v2") if setting.endswith("-v2") else f"{setting}-{method}"


@pytest.mark.parametrize("setting", DPO_RATES)
def test_a_dpo_baseline_differs_from_its_simpo_run_in_the_objective_alone(setting):
    dpo, simpo = read(twin_name(setting, "dpo")), read(twin_name(setting, "simpo"))
    assert {key: value for key, value in dpo.items() if key not in OF_THE_OBJECTIVE} == {
        key: value for key, value in simpo.items() if key not in OF_THE_OBJECTIVE
    }
    assert (dpo["beta"], dpo["learning_rate"], "gamma_beta_ratio" in dpo) == (0.01, DPO_RATES[setting], False)


@pytest.mark.parametrize("setting", ["mistral-7b-base", "llama-3-8b-base"])
@pytest.mark.parametrize("method", ["dpo-normalized", "orpo"])
def test_a_further_baseline_differs_in_the_objective_alone_and_stays_in_its_authors_range(setting, method):
    baseline, simpo = read(f"{setting}-{method}"), read(f"{setting}-simpo")
    assert {key: value for key, value in baseline.items() if key not in OF_THE_OBJECTIVE} == {
        key: value for key, value in simpo.items() if key not in OF_THE_OBJECTIVE
    }
    *_, config = parse(f"{setting}-{method}")
    assert config.remarks() == []
    assert "Not a published run" in recipe_text(f"{setting}-{method}")


def test_the_supervised_run_has_the_published_settings():
    recipe = read("llama-3-8b-base-sft")
    expected = {
        "model_name_or_path": "meta-llama/Meta-Llama-3-8B",
        "torch_dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
        "chat_template": "llama-3",
        "dataset_mixer": {"HuggingFaceH4/ultrachat_200k": 1.0},
        "dataset_splits": ["train_sft", "test_sft"],
        "learning_rate": 2e-5,
        "max_seq_length": 2048,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
    }
    assert {key: recipe[key] for key in expected} == expected


@pytest.mark.parametrize(
    "launcher", ["deepspeed_zero3.yaml", "deepspeed_zero2.yaml", "fsdp.yaml", "fsdp2.yaml", "multi_gpu.yaml"]
)
@pytest.mark.parametrize("name", [*sorted(PUBLISHED), "llama-3-8b-base-sft"])
def test_a_published_run_takes_128_rows_a_step_with_every_launcher_for_several_gpus(name, launcher):
    recipe = read(name)
    processes = launcher_config(launcher).num_processes
    assert processes == 4
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * processes == 128


@every_adapter_recipe
def test_an_adapter_recipe_takes_128_pairs_a_step_on_its_one_gpu(name):
    model_args, _, config = parse(name)
    launcher = launcher_config(Path(launch_command(name)[-3]).name)
    assert model_args.use_peft
    assert model_args.load_in_4bit == name.endswith("qlora")
    assert launcher.num_processes == 1
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 128


@pytest.mark.parametrize("name", [name for name in ADAPTER_RECIPES if name.startswith("llama-3-")])  # others: docs/recipes.md
def test_the_memory_that_an_adapter_recipe_claims_is_the_sum_that_it_shows(name):
    lines = re.findall(r"^#   (.+?) +(?:[\d.]+ to |about +)?([\d.]+) GiB$", recipe_text(name), re.MULTILINE)
    *parts, (label, total) = [(label, float(figure)) for label, figure in lines]
    assert label == "sum"
    assert len(parts) >= 5
    assert total == pytest.approx(sum(figure for _, figure in parts), abs=1)
    for label, figure in parts:
        factors = re.match(r"([\d.]+) (billion|million) .*? x ([\d.]+) (bytes|bits)", label)
        if factors:
            count, unit, size, of = factors.groups()
            size_bytes = float(count) * {"billion": 1e9, "million": 1e6}[unit] * float(size) / {"bytes": 1, "bits": 8}[of]
            assert figure == pytest.approx(size_bytes / 2**30, abs=0.06)
    assert "estimated by arithmetic and not measured" in recipe_text(name)


@pytest.mark.parametrize("launcher", LAUNCHER_CONFIGS)
def test_accelerate_knows_every_key_of_a_launcher_config(launcher):
    config = launcher_config(launcher)
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")


def test_a_run_on_one_gpu_sees_one_gpu():
    # A single process that sees several trains with DataParallel and multiplies the batch.
    assert launcher_config("single_gpu.yaml").gpu_ids == "0"


def test_deepspeed_gathers_the_weights_that_it_saves():
    assert launcher_config("deepspeed_zero3.yaml").deepspeed_config["zero3_save_16bit_model"] is True


def test_fsdp_saves_an_optimizer_that_it_can_resume():
    # Sharded FSDP 1 checkpoints resume with an empty optimizer.
    config = launcher_config("fsdp.yaml").fsdp_config
    assert (config["fsdp_version"], config["fsdp_state_dict_type"]) == (1, "FULL_STATE_DICT")


def test_no_process_but_the_first_loads_a_model_that_is_going_to_be_sharded():
    for name in ("fsdp.yaml", "fsdp2.yaml", "multi_node.yaml"):
        assert launcher_config(name).fsdp_config["fsdp_cpu_ram_efficient_loading"] is True
    assert launcher_config("deepspeed_zero3.yaml").deepspeed_config["zero3_init_flag"] is True


def test_the_cpu_config_starts_several_processes():
    # With MULTI_CPU, and with `accelerate launch --cpu`, one starts and nothing is said.
    config = launcher_config("cpu.yaml")
    assert (config.distributed_type, config.num_processes, config.use_cpu) == ("MULTI_GPU", 2, True)


def test_the_templates_that_recipes_name_are_shipped():
    named = {read(name).get("chat_template") for name in RECIPES}
    assert named <= {None, *(path.stem for path in TEMPLATE_FOLDER.glob("*.jinja"))}
