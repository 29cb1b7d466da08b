"""An experiment of two objectives and two ranks, killed in the middle and finished by the same command."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.workspaces import recipe_keys, save_workspace, write_recipe

ROOT = Path(__file__).parents[2]
RECIPE = {
    "preprocessing": "exact",
    "use_cpu": True,
    "beta": 2.5,
    "gamma_beta_ratio": 0.5,
    "max_length": 160,
    "max_prompt_length": 80,
    "learning_rate": 1e-3,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 12,
    "do_eval": True,
    "logging_steps": 1,
    "save_steps": 1,
    "use_peft": True,
    "lora_target_modules": ["all-linear"],
    "lora_dropout": 0.0,
    "report_to": "none",
    "disable_tqdm": True,
}
MATRIX = {
    "base": "recipe.yaml",
    "axes": {
        "objective": {"simpo": {"method": "simpo"}, "dpo": {"method": "dpo", "beta": 0.1}},
        "rank": {"r4": {"lora_r": 4, "lora_alpha": 8}, "r2": {"lora_r": 2, "lora_alpha": 4}},
        "seed": [42],
    },
    "fallback": {"orpo": {"method": "orpo", "beta": 0.1}},
    "launch": {"on": "local", "accelerate_config": "accelerate_configs/cpu.yaml", "gpus_per_node": 0},
}
CELLS = ["simpo-r4-s42", "simpo-r2-s42", "dpo-r4-s42", "dpo-r2-s42"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A workspace with a base recipe and a matrix; nothing has been run."""
    folder = tmp_path_factory.mktemp("ablation")
    save_workspace(folder, 24, 24, initializer_range=0.1)
    write_recipe(folder, {**RECIPE, **recipe_keys(folder)})
    (folder / "matrix.yaml").write_text(yaml.safe_dump(MATRIX, sort_keys=False))
    return folder


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, "scripts/run_ablation.py", str(folder / "matrix.yaml"), f"--output_dir={folder / 'out'}"]
    output = (folder / "printed.txt").open("w")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def finish(folder: Path) -> tuple[int, str]:
    """Exit status and what was printed."""
    return start(folder).wait(timeout=400), (folder / "printed.txt").read_text()


def run_of(folder: Path, cell: str) -> Path:
    return folder / "out" / "cells" / cell / "run"


def state(folder: Path, cell: str) -> str | None:
    path = run_of(folder, cell) / "_run" / "status.json"
    return json.loads(path.read_text())["state"] if path.exists() else None


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Of every file below: its SHA-256, and when it was last written."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def kill_all(process: subprocess.Popen) -> None:
    """As a machine dies: the command, the launcher and the run at once."""
    victims = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in victims:
        victim.suspend()  # none of them sees another one die
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    process.wait()


def test_an_experiment_that_is_killed_goes_on_and_leaves_finished_cells_alone(folder):
    process = start(folder)
    end = time.monotonic() + 300
    second = run_of(folder, CELLS[1])
    while not list(second.glob("checkpoint-*")):  # the second cell is in the middle of its training
        assert process.poll() is None, (folder / "printed.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    kill_all(process)
    assert [state(folder, cell) for cell in CELLS] == ["finished", "training", None, None]
    finished = contents(folder / "out" / "cells" / CELLS[0])

    status, printed = finish(folder)
    assert status == 0, printed
    assert "matrix: 4 cells (1 finished, 1 broken, 2 not begun); 2 of the fallback, where they are needed" in printed
    assert [state(folder, cell) for cell in CELLS] == ["finished"] * 4
    assert contents(folder / "out" / "cells" / CELLS[0]) == finished
    log = (second.parent / "log.txt").read_text()
    assert "Resuming from" in log[log.rindex("Objective:") :]
    assert state(folder, "orpo-r4-s42") is None  # nothing was unstable

    page = (folder / "out" / "ablation.md").read_text()
    for decision in ("objective at r4", "objective at r2", "rank at simpo", "rank at dpo"):
        assert f"\n## {decision}: " in page
        assert f"{decision}: " in printed
    assert (
        page.count("Rule: Change from the first named only if") == page.count("Rule: Take the lower rank if it is as good") == 2
    )
    for cell in CELLS:
        rows = [json.loads(line) for line in (run_of(folder, cell) / "eval_pairs.jsonl").read_text().splitlines()]
        right = sum(row["chosen_reward"] > row["rejected_reward"] for row in rows if row["step"] > 0)
        assert f"{right} of 24" in next(line for line in page.splitlines() if line.startswith(f"| {cell} |"))
    assert "<svg" in (folder / "out" / "ablation.html").read_text()
