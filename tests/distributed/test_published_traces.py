"""The published traces on two processes (gloo): steps of a fixed count of pairs, and steps divided by tokens.

Each process takes one of a step's two published micro-batches, over whose tokens published SFT and ORPO losses average; divided
by tokens, every pair keeps the weight that it has there. DPO's and ORPO's fixed counts stand in test_strategies.py.
"""

import json

import pytest

from tests.distributed.conftest import Launched, launch, launcher_config
from tests.distributed.test_strategies import golden_job
from tests.golden.traces import assert_follows

DIVISIONS = {"fixed": [], "by tokens": ["--max_tokens_per_micro_batch=192"]}  # which divides 20 of the 24 micro-batches
SIMPO = ["sigmoid-header", "smoothing-sft-zephyr"]
RUNS = [*((name, "fixed") for name in SIMPO), *((name, "by tokens") for name in (*SIMPO, "dpo-header", "orpo-header"))]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Launched:
    folder = tmp_path_factory.mktemp("golden")
    jobs = {}
    for name, division in RUNS:
        job = golden_job(name, folder / f"{name} {division}")
        jobs[f"{name} {division}"] = {**job, "argv": [*job["argv"], *DIVISIONS[division]]}
    result = launch(launcher_config("cpu.yaml", folder), folder, jobs)
    assert result.status == 0, result.printed
    return result


@pytest.mark.parametrize(("name", "division"), RUNS)
def test_a_published_recipe_on_two_processes_gives_the_published_trace(name, division, launched):
    assert [facts[f"{name} {division}"]["processes"] for facts in launched.facts] == [2, 2]
    lines = (launched.folder / f"{name} {division}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert_follows([json.loads(line) for line in lines], name)
