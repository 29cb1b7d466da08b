"""Real trackers: wandb offline, MLflow on files, TensorBoard. Each run is one run of theirs, over all its attempts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import RECIPE
from tests.workspaces import read_jsonl, recipe_keys, save_workspace, write_recipe

pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

ROOT = Path(__file__).parents[2]
ALL = "--report_to=wandb,mlflow,tensorboard"
PROMPTS = ["river", "mountain"]
SHORT = [
    "--max_steps=6", "--save_steps=2", "--eval_steps=3", "--logging_steps=1", '--sample_prompts=["river","mountain"]',
    "--sample_max_new_tokens=4",
]  # fmt: skip
# A run whose fifth step begins, in the same script as any run; then what SABOTAGE does happens.
SCRIPT = """
import os, signal, subprocess, sys
from scripts.simpo_trainer import SimPOTrainer
from alignment.data.splits import PAIRS
from alignment.pipeline import Method, main
from scripts.simpo_config import SimPOConfig
original = SimPOTrainer.compute_loss
def compute_loss(self, *args, **kwargs):
    if self.state.global_step == 4 and os.environ.get("SABOTAGE"):
        exec(os.environ.pop("SABOTAGE"))
    return original(self, *args, **kwargs)
SimPOTrainer.compute_loss = compute_loss
for argv in [part.split() for part in " ".join(sys.argv[1:]).split(" , ")]:
    main(Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS), argv)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    save_workspace(folder, 16, 6, initializer_range=0.1)
    return write_recipe(folder, {**RECIPE, **recipe_keys(folder)})


def start(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        **variables,
    }
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def mlflow_runs(folder: Path) -> list[Path]:
    return [path.parent for path in (folder / "mlruns").glob("*/*/meta.yaml")]


def mlflow_records(run: Path, name: str) -> list[tuple[int, float]]:
    lines = (run / "metrics" / name).read_text().splitlines()
    return [(int(line.split()[2]), float(line.split()[1])) for line in lines]


def board(folder: Path) -> EventAccumulator:
    (logs,) = (folder / "run" / "runs").iterdir()
    events = EventAccumulator(str(logs))
    return events.Reload()


def wandb_runs(folder: Path) -> list[str]:
    return [path.name.rsplit("-", 1)[1] for path in sorted((folder / "wandb").glob("offline-run-*"))]


def records(folder: Path, key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in read_jsonl(folder / "run" / "metrics.jsonl") if key in record]


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    done = start(folder, str(recipe), f"--output_dir={folder / 'run'}", ALL, *SHORT)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_is_one_run_of_each_tracker_with_the_figures_from_after_training_in_it(unbroken):
    assert len(wandb_runs(unbroken)) == 1
    (run,) = mlflow_runs(unbroken)
    assert yaml.safe_load((run / "meta.yaml").read_text())["status"] == 3  # finished
    evaluations = records(unbroken, "eval_loss")
    assert [step for step, _ in evaluations] == [3, 6, 6]
    assert mlflow_records(run, "eval_loss") == evaluations
    assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in board(unbroken).Scalars("eval/loss")] == evaluations


def test_a_tracker_is_told_the_whole_recipe(unbroken):
    (run,) = mlflow_runs(unbroken)
    (recorded,) = run.rglob("recipe.yaml")
    told = yaml.safe_load(recorded.read_text())
    assert told == yaml.safe_load((unbroken / "run" / "recipe.yaml").read_text())
    assert {"model_name_or_path", "dataset_mixer", "chat_template", "lora_r", "beta"} <= told.keys()
    assert "recipe/text_summary" in board(unbroken).Tags()["tensors"]
    (log,) = unbroken.glob("wandb/offline-run-*/*.wandb")
    assert all(key.encode() in log.read_bytes() for key in ("dataset_mixer", "lora_target_modules"))


def replies_on_board(folder: Path) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in board(folder).Tensors("samples/text_summary")]


def test_a_tracker_is_told_the_replies_of_each_step(unbroken):
    rows = read_jsonl(unbroken / "run" / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 3, 3, 6, 6]
    shown = replies_on_board(unbroken)
    assert [step for step, _ in shown] == [0, 3, 6]
    assert all(f"**{prompt}**" in text for _, text in shown for prompt in PROMPTS)
    (run,) = mlflow_runs(unbroken)
    assert [row for step in (0, 3, 6) for path in run.rglob(f"step-{step}.jsonl") for row in read_jsonl(path)] == rows
    tables = [json.loads(path.read_text()) for path in unbroken.glob("wandb/offline-run-*/files/media/table/samples_*.json")]
    assert sorted(row for table in tables for row in table["data"]) == sorted(list(row.values()) for row in rows)
    assert tables[0]["columns"] == ["step", "prompt", "response", "tokens"]


def test_the_probe_is_drawn_beside_the_held_out_pairs(unbroken):
    wanted = records(unbroken, "probe_rewards/margins")
    assert [step for step, _ in wanted] == [3, 6, 6]
    shown = [(event.step, pytest.approx(event.value)) for event in board(unbroken).Scalars("eval/probe_rewards/margins")]
    assert shown == wanted
    (run,) = mlflow_runs(unbroken)
    assert mlflow_records(run, "eval_probe_rewards/margins") == wanted


def test_a_resumed_run_goes_on_in_the_same_runs_and_repeats_no_record(recipe, unbroken, tmp_path):
    words = [str(recipe), f"--output_dir={tmp_path / 'run'}", ALL, *SHORT, "--save_steps=3"]
    killed = start(tmp_path, *words, SABOTAGE="os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -9  # behind step 4, which is logged; the checkpoint is of step 3
    done = start(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert len(set(wandb_runs(tmp_path))) == 1
    (run,) = mlflow_runs(tmp_path)
    assert mlflow_records(run, "loss") == records(unbroken, "loss"), done.stdout + killed.stdout
    assert [event.step for event in board(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert replies_on_board(tmp_path) == replies_on_board(unbroken)


@pytest.mark.parametrize(
    ("tracker", "sabotage"),
    [
        ("wandb", "subprocess.run(['pkill', '-9', '-P', str(os.getpid())])"),
        ("mlflow", "import mlflow; mlflow.log_metrics = lambda *args, **kwargs: 1 / 0"),
        ("tensorboard", "import torch.utils.tensorboard as board; board.SummaryWriter.add_scalar = None"),
    ],
)
def test_a_tracker_that_is_lost_costs_one_warning_and_no_run(tracker, sabotage, recipe, unbroken, tmp_path):
    done = start(tmp_path, str(recipe), f"--output_dir={tmp_path / 'run'}", f"--report_to={tracker}", *SHORT, SABOTAGE=sabotage)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert done.stdout.count("gets no more records") == 1, done.stdout
    assert records(tmp_path, "loss") == records(unbroken, "loss")
    assert json.loads((tmp_path / "run" / "_run" / "status.json").read_text())["state"] == "finished"


def test_two_runs_of_one_process_are_two_runs_of_a_tracker(recipe, tmp_path):
    one, other = (f"{recipe} --output_dir={tmp_path / name} {ALL} --max_steps=2 --seed={name}" for name in ("1", "2"))
    done = start(tmp_path, *f"{one} , {other}".split())
    assert done.returncode == 0, done.stderr
    assert len(set(wandb_runs(tmp_path))) == 2
    runs = mlflow_runs(tmp_path)
    assert sorted((run / "params" / "seed").read_text() for run in runs) == ["1", "2"]
    assert all(len(mlflow_records(run, "train_loss")) == 1 for run in runs)


def test_what_cannot_record_is_refused_before_anything_is_loaded(recipe, tmp_path):
    words = [str(recipe), f"--output_dir={tmp_path / 'run'}"]
    lost = start(tmp_path, *words, "--report_to=mlflow", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert lost.returncode == 2
    assert "MLflow does not answer at http://127.0.0.1:9" in lost.stderr
    nobody = start(tmp_path, *words, "--report_to=wandb", WANDB_MODE="online", HOME=str(tmp_path), WANDB_API_KEY="")
    assert nobody.returncode == 2
    assert "wandb has no key" in nobody.stderr
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in lost.stderr + nobody.stderr
