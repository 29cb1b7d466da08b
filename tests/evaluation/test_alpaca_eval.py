"""alpaca-eval takes the file: loaded, joined with the reference, judged, counted; offline, and by a judge that is no model.

    make test-evaluation EXTRAS=dev,eval

It imports pkg_resources, which setuptools no longer has, and lives in an environment of its own; ALPACA_EVAL names the python.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from accelerate import PartialState

from eval.answering import evaluate
from eval.settings import EvaluationArguments
from on_policy_data_gen.configs import PolicyArguments

PartialState()
INSTRUCTIONS = ["the river {x}\n\n ", "“Ätna”\u2028 and \\n", "  1984", "kettle"]
# What judges here: the longer output wins.
JUDGE = """
longer:
  prompt_template: "longer/prompt.txt"
  fn_completions: longer
  completions_kwargs: {}
  completion_parser_kwargs:
    outputs_to_match:
      1: '^a'
      2: '^b'
  batch_size: 1
"""
JUDGING = """
import json, socket, sys
def connect(*arguments):
    raise AssertionError("the network was asked")
socket.socket.connect = connect
import alpaca_eval
from alpaca_eval import utils
from alpaca_eval.annotators import base
made, reference, judge = sys.argv[1:]
def longer(prompts, **settings):
    sides = [prompt.split("=====") for prompt in prompts]
    said = ["a" if len(first) > len(second) else "b" for first, second in sides]
    return {"completions": said, "price_per_example": [0.0] * len(said), "time_per_example": [0.0] * len(said)}
base.get_fn_completions = lambda name: longer
loaded = utils.load_or_convert_to_dataframe(made)
board, annotations = alpaca_eval.evaluate(
    model_outputs=made, reference_outputs=reference, annotators_config=judge, fn_metric="get_winrate", sort_by="win_rate",
    precomputed_leaderboard=None, is_return_instead_of_print=True, output_path=None, caching_path=None,
    is_cache_leaderboard=False,
)
print(json.dumps({
    "instructions": list(loaded["instruction"]), "columns": list(loaded.columns),
    "model": utils.get_generator_name(None, loaded),
    "judged": {row["instruction"]: row["output_2"] for row in annotations},
    "board": {key: float(board.loc["my-run", key]) for key in ("n_total", "win_rate")},
}))
"""


@pytest.fixture(scope="module")
def files(run_folder, tmp_path_factory) -> tuple[Path, Path]:
    """The answers of a run, and the reference that had the prompts."""
    folder = tmp_path_factory.mktemp("alpaca_eval")
    made, reference = folder / "my-run.json", folder / "alpaca_eval_gpt4_baseline.json"
    rows = [
        {"dataset": "koala", "instruction": text, "output": "x" * (1000 * (number % 2)), "generator": "gpt4_1106_preview"}
        for number, text in enumerate(INSTRUCTIONS)
    ]
    reference.write_text(json.dumps(rows), encoding="utf-8")
    policy = PolicyArguments(model=str(run_folder), max_tokens=20, use_cpu=True)
    evaluate(policy, EvaluationArguments(benchmark="alpacaeval2", prompts=str(reference), output=str(made)))
    return made, reference


@pytest.fixture(scope="module")
def said(files) -> dict:
    """What alpaca-eval makes of them."""
    python = os.environ.get("ALPACA_EVAL")
    assert python, "ALPACA_EVAL names no interpreter; `make test-evaluation` makes one"
    judge = files[0].parent / "longer"
    judge.mkdir()
    (judge / "configs.yaml").write_text(JUDGE)
    (judge / "prompt.txt").write_text("{output_1}====={output_2}")
    command = [python, "-c", JUDGING, *map(str, files), str(judge)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_its_loader_reads_every_instruction_as_the_reference_has_it(said):
    assert said["instructions"] == INSTRUCTIONS
    assert said["columns"] == ["instruction", "output", "generator", "dataset"]
    assert said["model"] == "my-run"


def test_it_judges_each_output_beside_its_reference(said, files):
    outputs = {row["instruction"]: row["output"] for row in json.loads(files[0].read_text(encoding="utf-8"))}
    assert all(outputs.values())
    assert said["judged"] == outputs
    assert said["board"] == {"n_total": 4, "win_rate": 50.0}  # longer than nothing, shorter than a thousand letters
