"""Layers compiled by torch, as docs/performance.md says how to: a published recipe gives the published trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.golden.traces import DATA, assert_follows

ROOT = Path(__file__).parents[2]
COMPILED = [
    "--cpu",
    "--num_processes=1",
    "--dynamo_backend=inductor",
    "--dynamo_use_dynamic",
    "--dynamo_use_regional_compilation",
]


def test_a_published_recipe_whose_layers_are_compiled_gives_the_published_trace(tmp_path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=1",
        *COMPILED,
        str(ROOT / "scripts/run_simpo.py"),
    ]
    done = subprocess.run(
        [*command, "recipes/sigmoid-header.yaml", f"--output_dir={tmp_path / 'run'}"],
        cwd=DATA,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recompile_limit" not in done.stdout + done.stderr
    assert any((tmp_path / "inductor").rglob("*.cpp")), "nothing was compiled"
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert_follows([json.loads(line) for line in lines], "sigmoid-header")
