"""A run, as SimPO leaves it."""

from pathlib import Path

import pytest

from alignment.pipeline import run
from tests.methods import METHODS
from tests.readers.test_transformers_4 import RECIPE
from tests.workspaces import recipe_of_run, save_workspace


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_workspace(folder, 2, 1, initializer_range=0.3)
    run(METHODS["simpo"], [recipe_of_run(folder, folder, RECIPE, {})])
    return folder / "run"
