"""What tests that break whole runs share: a recipe for two epochs of LoRA, and the server that forks runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forked import Server
from tests.workspaces import recipe_keys, save_workspace, write_recipe

RECIPE = {
    "preprocessing": "exact",
    "use_cpu": True,
    "beta": 2.5,
    "sft_weight": 0.1,
    "max_length": 160,
    "max_prompt_length": 80,
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "total_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "logging_steps": 3,  # no multiple of save_steps: sums have to survive
    "save_steps": 2,
    "use_peft": True,
    "lora_r": 4,
    "lora_target_modules": ["all-linear"],
    "lora_dropout": 0.1,
    "disable_dropout": False,  # random numbers have to survive too
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_workspace(folder, 16, 6, initializer_range=0.1)
    return write_recipe(folder, {**RECIPE, **recipe_keys(folder)})


@pytest.fixture(scope="module")
def unbroken(server, recipe, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run with these options that nothing happens to; each is run once."""
    folders: dict[tuple[str, ...], Path] = {}

    def of(*options: str) -> Path:
        if options not in folders:
            folders[options] = tmp_path_factory.mktemp("unbroken")
            ended = server.run(str(recipe), f"--output_dir={folders[options]}", *options)
            assert ended.status == 0, ended.printed
        return folders[options]

    return of
