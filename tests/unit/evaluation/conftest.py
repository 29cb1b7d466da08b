"""A tiny model on disk, and questions of each benchmark in the words that it knows."""

import json
from pathlib import Path

import pytest
from accelerate import PartialState

from tests.workspaces import save_model

PartialState()

QUESTIONS = {
    "alpacaeval2": [{"instruction": f"river {number} kettle", "dataset": "koala"} for number in range(4)],
    "arenahard": [{"uid": f"u{number}", "category": "hard_prompt", "prompt": f"mountain {number}"} for number in range(3)],
    "mt-bench": [
        {"question_id": 80 + number, "category": category, "turns": [f"lanterns {number}", f"and then {number}"]}
        for number, category in enumerate(("writing", "math", "stem", "knitting"))
    ],
}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "my-run"
    save_model(folder, initializer_range=0.1)
    return folder


@pytest.fixture(scope="session")
def question_files(tmp_path_factory) -> dict[str, Path]:
    folder, files = tmp_path_factory.mktemp("questions"), {}
    for name, rows in QUESTIONS.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return files
