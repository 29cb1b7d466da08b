"""The kernels that a GPU takes for the head, without one: in Triton's interpreter.

Triton, 286 MB, comes with a torch for GPUs and not with one for CPUs. The interpreter of 3.6, torch 2.11's, is older than
NumPy 2.4 and cannot read its numbers.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests.triton_head import SHAPES

ROOT = Path(__file__).parents[3]
is_there = importlib.util.find_spec("triton") is not None and Version(version("triton")) >= Version("3.9")
pytestmark = pytest.mark.skipif(not is_there, reason="pip install 'triton>=3.9'")


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "tests.triton_head"]
    variables = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SHAPES)
def test_trls_kernels_give_float64s_scores_and_gradients(name, errors):
    is_half = SHAPES[name].dtype == "bfloat16"
    assert errors[name]["logps"] < (0.05 if is_half else 2e-5)
    assert errors[name]["mean_logits"] < (0.02 if is_half else 2e-6)
    assert errors[name]["gradients"] < (0.01 if is_half else 2e-6)
