"""The kernels that a GPU takes for the head, without one: in Triton's interpreter (make test-triton)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreted.triton_head import SHAPES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "tests.interpreted.triton_head"]
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
