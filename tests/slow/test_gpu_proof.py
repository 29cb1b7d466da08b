"""The proof that one GPU is asked for, small and without one: it runs to its end, and keeps what there was."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_section_ends_well_and_stands_on_the_page(tmp_path):
    command = [sys.executable, "benchmarks/gpu_proof.py", "--cpu", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    results = json.loads((tmp_path / "proof.json").read_text())
    names = ["kernels", "llama, tiny", "whole steps, tiny"]
    assert [(result["name"], result["status"]) for result in results] == [(name, 0) for name in names], results
    assert done.returncode == 0
    page = (tmp_path / "proof.md").read_text()
    assert "| llama, tiny | done |" in page
    assert "| contender | seconds_per_pair | peak_gb | published / it |" in page
    assert "\n| packed@2000t | " in page
    assert "| max_tokens | recompute_layers | step | loss |" in page
    assert "\n| 400 | " in page
    assert (tmp_path / "llama-tiny.log").stat().st_size > 0
