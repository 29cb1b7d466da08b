"""What the tests of several processes share: a model, pairs, launches of two processes, the same runs in one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from alignment.pipeline import run
from tests.methods import METHODS
from tests.workspaces import recipe_keys, save_adapter, save_model, save_workspace, write_recipe

ROOT = Path(__file__).parents[2]
BETA = 2.5
HELD_OUT = 7  # two processes score 2 pairs each at a time: the last batch is uneven
RECIPE = {
    "preprocessing": "exact",
    "use_cpu": True,
    "beta": BETA,
    "sft_weight": 0.1,
    "max_length": 160,
    "max_prompt_length": 80,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,  # with the default, 1e-8, a gradient that is nothing but rounding makes a whole step
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "total_train_batch_size": 8,
    "eval_strategy": "epoch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_workspace(folder, 16, HELD_OUT, initializer_range=0.1)
    save_adapter(folder / "model", folder / "sft")
    save_model(folder / "mixture", kind="mixtral", initializer_range=0.1)
    return write_recipe(folder, {**recipe_keys(folder), **RECIPE})


class Launched(NamedTuple):
    """What a launch left: a folder with one run of each job, what each process saw of each, and how the launch ended."""

    folder: Path
    facts: list[dict[str, dict[str, Any]]]
    status: int
    printed: str


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """ninja, which DeepSpeed compiles with, is beside the interpreter. What it compiles is kept for the session."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cache = {"HF_DATASETS_CACHE": str(folder / "cache"), "TORCH_EXTENSIONS_DIR": str(folder.parent / "extensions")}
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **cache, **variables}


def launcher_config(name: str, folder: Path, **changes: Any) -> str:
    """A shipped launcher config for two CPU processes in float32; `changes` on top."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / name).read_text(encoding="utf-8"))
    config |= {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", **changes}
    path = folder / name
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def launch(config: str, folder: Path, jobs: dict[str, dict[str, Any]], *, time_limit: float = 400) -> Launched:
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port=0"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.worker", str(folder / "jobs.json")],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=time_limit,
    )
    facts = [json.loads(path.read_text()) for path in sorted(folder.glob("facts-*.json"))]
    return Launched(folder, facts, done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="session")
def one_process(recipe, tmp_path_factory) -> Callable[..., Path]:
    """Runs a command line in this process, once a session; its run folder. In options, {folder} is the recipe's."""
    folders: dict[tuple[str, ...], Path] = {}

    def run_folder(*options: str, method: str = "simpo") -> Path:
        key = (method, *options)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("one")
            run(METHODS[method], [str(recipe), f"--output_dir={folders[key]}", *in_place(options, recipe)])
        return folders[key]

    return run_folder


def in_place(options: Sequence[str], recipe: Path) -> list[str]:
    return [option.format(folder=recipe.parent) for option in options]


def records(folder: Path, key: str) -> list[dict[str, Any]]:
    """Of a run's log, those with a key."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def scored_pairs(folder: Path, *, before: bool = False) -> list[dict[str, Any]]:
    """The held-out pairs' rows at the end, or before the first step."""
    lines = (folder / "eval_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if (row["step"] == 0) == before]
