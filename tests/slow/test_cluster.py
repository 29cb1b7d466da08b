"""A whole experiment through submitit and stand-ins for Slurm's commands: two processes a cell, real training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from alignment.run.run_folder import read_status
from tests.slow.test_ablation import RECIPE, ROOT
from tests.unit.ablation import slurm
from tests.workspaces import read_jsonl, recipe_keys, save_workspace, write_recipe

MATRIX = {
    "base": "recipe.yaml",
    "method": "simpo",
    "axes": {"rank": {"r4": {"lora_r": 4}, "r2": {"lora_r": 2}}},
    "launch": {"on": "slurm", "accelerate_config": "accelerate_configs/cpu.yaml", "hours": 1, "slurm_signal_delay_s": 60},
}


def start(folder: Path, printed: str) -> subprocess.Popen:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"), slurm.STATE: str(folder / "jobs"),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    environment.pop("SUBMITIT_PREEMPT_SIGNAL", None)
    command = [sys.executable, "scripts/run_ablation.py", str(folder / "matrix.yaml"), f"--output_dir={folder / 'out'}"]
    output = (folder / printed).open("w")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def test_jobs_outlive_their_command_are_requeued_at_the_signal_and_finish(tmp_path, monkeypatch):
    slurm.install(tmp_path)
    save_workspace(tmp_path, 24, 24, initializer_range=0.1)
    recipe = {**RECIPE, "num_train_epochs": 40, "save_steps": 20, "per_device_train_batch_size": 2, "total_train_batch_size": 4}
    write_recipe(tmp_path, {**recipe, **recipe_keys(tmp_path)})
    (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(MATRIX, sort_keys=False))
    runs = [tmp_path / "out" / "cells" / name / "run" for name in ("r4", "r2")]

    command = start(tmp_path, "first.txt")
    slurm.wait_for(lambda: all(list(run.glob("checkpoint-*")) for run in runs), seconds=300)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    monkeypatch.setenv(slurm.STATE, str(tmp_path / "jobs"))
    slurm.scancel("1", "--signal", "USR1")
    slurm.wait_for(lambda: "stopped by SIGUSR1" in (runs[0].parent / "log.txt").read_text(), seconds=60)

    again = start(tmp_path, "again.txt")
    assert again.wait(timeout=400) == 0, (tmp_path / "again.txt").read_text()
    assert [state.read_text() for state in sorted((tmp_path / "jobs").glob("*.state"))] == ["COMPLETED"] * 2  # no third job
    assert [read_status(run)["state"] for run in runs] == ["finished"] * 2
    assert "Resuming from" in (runs[0].parent / "log.txt").read_text()
    assert "Resuming from" not in (runs[1].parent / "log.txt").read_text()
    for run in runs:
        steps = [record["step"] for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]
        assert steps == list(range(1, 241))
    assert "rank: " in (tmp_path / "out" / "ablation.md").read_text()
