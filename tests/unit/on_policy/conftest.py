"""A tiny policy on disk, the prompts of a few rows, and the requests that they become."""

from pathlib import Path

import pytest
from accelerate import PartialState

from alignment.data.prompts import Prompt, prompt_of
from on_policy_data_gen.configs import PolicyArguments
from on_policy_data_gen.sampling import Request, make_requests
from tests import builders
from tests.workspaces import save_model

PartialState()


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_model(folder, initializer_range=0.1)
    return folder


@pytest.fixture
def policy_args(policy_folder):
    def arguments(**settings) -> PolicyArguments:
        return PolicyArguments(**{"model": str(policy_folder), "max_tokens": 10, "use_cpu": True, **settings})

    return arguments


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return [prompt_of(row["chosen"]) for row in builders.pairs(7)]


@pytest.fixture
def requests(prompts, tokenizer) -> list[Request]:
    return make_requests(prompts, tokenizer, max_tokens=10, window=None, date="2026-01-02")
