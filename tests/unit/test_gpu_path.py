"""The way of a GPU, watched without one: what its kernels demand, how many a layer launches, and when the host waits.

All of it runs once, in a process of its own (tests/gpu_path.py), because torch cannot be taken back from the fake GPU.
"""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_path import ARCHITECTURES, AXES, KINDS, LAUNCHES, LOGGED, PAIRWISE, STEPS, mutants

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 400  # it takes 52 s of one core
LOG_WAITS = 5  # the loss, the gradient norm, the means, and the speed's copy there and back


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, Any]]:
    """What came of every case, by name."""
    command = [sys.executable, "-m", "tests.gpu_path"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr[-5000:]
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {record.pop("name"): record for record in records}


def figures(seen: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    assert "error" not in seen[name], seen[name]["trace"]
    return seen[name]


@pytest.mark.parametrize("case", [*PAIRWISE, *ARCHITECTURES], ids=str)
def test_a_micro_batch_meets_what_kernels_demand_and_waits_for_nothing(case, seen):
    waits = figures(seen, f"micro-batch: {case}")["waits"]
    if case.layout == "padded" and case.attention.startswith("fl"):  # transformers looks for the padding itself
        waits = [wait for wait in waits if " at transformers/" not in wait]
    assert not waits


@pytest.mark.parametrize("kind", KINDS)
def test_any_two_settings_of_a_micro_batch_meet(kind):
    axes = [(name, value) for name, values in AXES.items() for value in values]
    pairs = {pair for pair in combinations(axes, 2) if pair[0][0] != pair[1][0]}
    never = {(("attention", "flash_attention_2"), ("precision", "float32"))}
    if kind == "gemma2":
        never |= {pair for pair in pairs if ("attention", "sdpa") in pair}
    met = {
        pair
        for case in PAIRWISE
        if case.kind == kind
        for pair in combinations([(name, getattr(case, name)) for name in AXES], 2)
    }
    assert met == pairs - never


@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_a_layer_launches_no_more_kernels_than_it_did(case, seen):
    found = figures(seen, f"per layer: {case}")
    assert found["launches"] <= LAUNCHES[case], found["kernels"]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_twice_however_many_micro_batches_it_has(name, seen):
    found = figures(seen, f"steps: {name}")
    assert len(found["steps"]) == 2 * LOGGED
    for waits in found["steps"][1:]:  # the first one moves what it will need
        assert sum(waits.values()) <= 2, waits


@pytest.mark.parametrize("name", STEPS)
def test_a_log_waits_once_for_each_source_not_for_each_figure(name, seen):
    first, second, *_ = figures(seen, f"steps: {name}")["logs"]
    assert sum(first.values()) <= LOG_WAITS, first
    assert first == second


@pytest.mark.parametrize("name", mutants())
def test_the_watch_sees_what_a_gpu_would_refuse_or_wait_for(name, seen):
    assert seen[f"mutant: {name}"].get("error") or seen[f"mutant: {name}"]["waits"]
