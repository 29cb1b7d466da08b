"""wandb, MLflow, TensorBoard and their like: asked at the start whether they work, told everything, and unable to end a run."""

import difflib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
    get_available_reporting_integrations,
)

from ..errors import Problem
from .hub import in_background

logger = logging.getLogger(__name__)

MEMORY = "_run/trackers.json"
WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml"}  # where they are not called as the tracker is
TRACKIO_ONLY = {"project": "huggingface", "trackio_space_id": None, "trackio_bucket_id": None, "trackio_static_space_id": None}
CLOSING_S = 120.0  # how long the last records may take; they are in metrics.jsonl in any case
# MLflow asks a server that is gone for minutes, at every record, unless it is told otherwise.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


# ---- Before a run ----


def named_trackers(report_to: Any) -> list[str]:
    """As report_to may be given: null, a name, several."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [] if names == ["none"] else get_available_reporting_integrations() if names == ["all"] else names


def without_disabled(names: list[str]) -> list[str]:
    """wandb goes where WANDB_DISABLED says so, which transformers no longer reads."""
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return [name for name in names if not (disabled and name == "wandb")]


def tracker_problems(values: SimpleNamespace) -> list[Problem]:
    """What keeps a named tracker from recording this run, as far as it can be told before the run."""
    names = named_trackers(values.report_to)
    asked = [] if values.prepare_only else without_disabled(names)
    advice = [(reason, name in INTEGRATION_TO_CALLBACK) for name in asked for reason in reasons_against(name, values)]
    if "none" in names:
        advice = [("none stands alone; remove it, or the names beside it", False)]
    problems = [Problem("report_to", values.report_to, reason, is_local) for reason, is_local in advice]
    if "trackio" not in names:
        told = {"wandb": "export WANDB_PROJECT=... for wandb", "mlflow": "export MLFLOW_EXPERIMENT_NAME=... for MLflow"}
        ways = ", ".join(way for name, way in told.items() if name in names)
        for key, default in TRACKIO_ONLY.items():
            if getattr(values, key) != default:
                problems.append(Problem(key, getattr(values, key), f"is read by trackio alone; {ways or 'remove it'}"))
    return problems


def reasons_against(name: str, values: SimpleNamespace) -> Iterable[str]:
    if name not in INTEGRATION_TO_CALLBACK:
        close = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1, cutoff=0.6)
        meant = f"did you mean {close[0]!r}?" if close else f"choose none, or of {', '.join(INTEGRATION_TO_CALLBACK)}"
        return [f"there is no tracker called {name!r} ({meant})"]
    if name not in get_available_reporting_integrations():
        return [f"{name} is not installed: pip install {PACKAGES.get(name, name)}"]
    if values.dry_run:  # keys and servers are those of the machine that trains
        return []
    reason = REASONS[name](values) if name in REASONS else None
    return [reason] if reason else []


def against_wandb(values: SimpleNamespace) -> str | None:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in WANDB_MODES:
        close = difflib.get_close_matches(mode, WANDB_MODES, n=1) or ["offline"]
        return f"WANDB_MODE={mode} in the environment is none of {', '.join(WANDB_MODES[:4])} (did you mean {close[0]!r}?)"
    if mode not in ("online", "shared", "run"):
        return None
    import wandb  # a second to import, and only where a recipe names it

    if wandb.api.api_key:
        return None
    return "wandb has no key: `wandb login`, export WANDB_API_KEY=..., or export WANDB_MODE=offline"


def against_mlflow(values: SimpleNamespace) -> str | None:
    import mlflow  # two seconds to import

    be_patient()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or mlflow.get_tracking_uri()
    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except (mlflow.MlflowException, OSError, ImportError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        return f"MLflow does not answer at {uri} ({why}); correct MLFLOW_TRACKING_URI, or start it"
    return None


def against_tensorboard(values: SimpleNamespace) -> str | None:
    folder = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if folder is None:
        return None  # below output_dir, which is looked at anyway
    try:
        Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
        writable = os.access(Path(folder).expanduser(), os.W_OK)
    except OSError:
        writable = False
    return None if writable else f"TENSORBOARD_LOGGING_DIR={folder} cannot be written; export another"


REASONS: dict[str, Callable[[SimpleNamespace], str | None]] = {
    "wandb": against_wandb,
    "mlflow": against_mlflow,
    "tensorboard": against_tensorboard,
}


def be_patient() -> None:
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)


# ---- During a run ----


class Tracker(TrainerCallback):
    """A tracker's callback, which may fail: then it is told nothing more, and the run goes on. `close` ends the tracker's run.

    recipe: YAML of everything that the run was given. memory: the file that outlasts an attempt. earlier: the tracker's run
    that an attempt before has begun. repeated: records that it has from there, and that come again.
    """

    def __init__(self, inner: TrainerCallback, recipe: str, memory: Path, earlier: str | None, repeated: Counter[Any]):
        self.inner = inner
        self.recipe = recipe
        self.memory = memory
        self.earlier = earlier
        self.repeated = repeated
        self.is_lost = False
        self.end: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return type(self.inner).__name__.removesuffix("Callback")

    def tell(self, do: Callable[[], Any]) -> None:
        if self.is_lost:
            return
        try:
            do()
        except Exception as error:
            self.is_lost = True
            why = " ".join(str(error).split())[:300] or type(error).__name__
            logger.warning("%s gets no more records: %s. The run goes on; metrics.jsonl has all of them.", self.name, why)
            logger.debug("What the tracker raised.", exc_info=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def begin() -> None:
            with taking_up(self.inner, self.earlier):
                self.inner.on_train_begin(args, state, control, **kwargs)
            if state.is_world_process_zero:
                self.hand_over_recipe()
                remember(self.memory, run_of(self.inner))

        self.tell(begin)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        record = key_of({"step": state.global_step, **(logs or {})})
        if self.repeated[record] > 0:
            self.repeated[record] -= 1
            return
        logs = None if logs is None else {beside_held_out(name): value for name, value in logs.items()}
        self.tell(lambda: self.inner.on_log(args, state, control, logs=logs, **kwargs))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Later: what is logged after training belongs to the same run."""
        self.end = (args, kwargs)

    def hand_over_recipe(self) -> None:
        """transformers tells a tracker its own arguments, and nothing of data, template or adapter."""
        if isinstance(self.inner, WandbCallback):
            self.inner._wandb.config.update({"recipe": yaml.safe_load(self.recipe)}, allow_val_change=True)
        elif isinstance(self.inner, MLflowCallback):
            self.inner._ml_flow.log_text(self.recipe, "recipe.yaml")
        elif isinstance(self.inner, TensorBoardCallback) and self.inner.tb_writer is not None:
            self.inner.tb_writer.add_text("recipe", f"```yaml\n{self.recipe}```")

    def hand_over_replies(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Rows of step, prompt, response and tokens, as a table or a text."""
        columns = list(rows[0])
        cells = [[spelt(row[column]) for column in columns] for row in rows]
        if isinstance(self.inner, WandbCallback):
            table = self.inner._wandb.Table(columns=columns, data=cells)
            self.inner._wandb.log({"samples": table, "train/global_step": step})
        elif isinstance(self.inner, MLflowCallback):
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            self.inner._ml_flow.log_text(lines, f"samples/step-{step}.jsonl")
        elif isinstance(self.inner, TensorBoardCallback) and self.inner.tb_writer is not None:
            texts = (f"**{prompt}**\n\n{response}" for _, prompt, response, _ in cells)
            self.inner.tb_writer.add_text("samples", "\n\n---\n\n".join(texts), step)

    def close(self) -> None:
        if self.end is not None:
            args, kwargs = self.end
            self.tell(lambda: self.inner.on_train_end(*args, **kwargs))
        if isinstance(self.inner, WandbCallback) and self.inner._initialized:
            self.tell(self.inner._wandb.finish)
        if isinstance(self.inner, MLflowCallback) and self.inner._initialized and self.inner._ml_flow.active_run():
            self.tell(self.inner._ml_flow.end_run)


def beside_held_out(name: str) -> str:
    """A probe's figure where trackers draw the held-out one: they sort by the beginning of a name, and know eval_ alone."""
    return f"eval_{name}" if name.startswith("probe_") else name


def spelt(value: Any) -> str | int:
    return value if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False)


def forwarded(event: str) -> Callable[..., None]:
    def tell(self: Tracker, *args: Any, **kwargs: Any) -> None:
        self.tell(lambda: getattr(self.inner, event)(*args, **kwargs))

    return tell


for name in dir(TrainerCallback):
    if name.startswith("on_") and name not in vars(Tracker):
        setattr(Tracker, name, forwarded(name))


def watch_trackers(trainer: Trainer, recipe: str, *, resumed_log: list[dict[str, Any]] | None) -> None:
    """Wrap the trackers of a trainer. resumed_log: what a resumed checkpoint knows to be logged; None at a fresh start."""
    be_patient()
    memory = Path(trainer.args.output_dir, MEMORY)
    known = recall(memory) if resumed_log is not None else {}
    callbacks = trainer.callback_handler.callbacks
    for number, callback in enumerate(callbacks):
        if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            earlier = known.get(kind_of(callback))
            told = records_after(Path(trainer.args.output_dir, "metrics.jsonl"), resumed_log or []) if earlier else Counter()
            callbacks[number] = Tracker(callback, recipe, memory, earlier, told)


def tell_replies(trainer: Trainer, step: int, rows: list[dict[str, Any]]) -> None:
    """Replies to fixed prompts at a step: see `Tracker.hand_over_replies`. By the main process."""
    for tracker in trackers_of(trainer):
        tracker.tell(lambda tracker=tracker: tracker.hand_over_replies(step, rows))


def trackers_of(trainer: Trainer) -> list[Tracker]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Tracker)]


def close_trackers(trainer: Trainer) -> None:
    """Let every tracker end its run. What does not answer is left."""
    for tracker in trackers_of(trainer):
        closing = in_background(tracker.close)
        wait([closing], timeout=CLOSING_S)
        if not closing.done():
            logger.warning("%s did not end its run in %g seconds; it is left alone.", tracker.name, CLOSING_S)


# ---- The run of a tracker, over the attempts of a run ----


def kind_of(callback: TrainerCallback) -> str:
    return next(name for name, kind in INTEGRATION_TO_CALLBACK.items() if type(callback) is kind)


def run_of(callback: TrainerCallback) -> dict[str, str]:
    """What a later attempt needs to go on in the same run of the tracker."""
    if isinstance(callback, WandbCallback) and callback._wandb.run is not None:
        return {"wandb": callback._wandb.run.id}
    if isinstance(callback, MLflowCallback) and callback._ml_flow.active_run() is not None:
        return {"mlflow": callback._ml_flow.active_run().info.run_id}
    if isinstance(callback, TensorBoardCallback) and callback.logging_dir is not None:
        return {"tensorboard": callback.logging_dir}
    return {}


@contextmanager
def taking_up(callback: TrainerCallback, run: str | None) -> Iterator[None]:
    """Inside, the tracker goes on with that run instead of beginning one. wandb and MLflow are told by the environment."""
    variables: dict[str, str] = {}
    if run is not None and isinstance(callback, WandbCallback):
        variables = {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"}
    elif run is not None and isinstance(callback, MLflowCallback):
        variables = {"MLFLOW_RUN_ID": run}
    elif run is not None and isinstance(callback, TensorBoardCallback):
        callback.logging_dir = callback.logging_dir or run
    own = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ |= own
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)  # MLflow takes its own away


def remember(memory: Path, run: dict[str, str]) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps(recall(memory) | run) + "\n", encoding="utf-8")


def recall(memory: Path) -> dict[str, str]:
    try:
        return json.loads(memory.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def records_after(metrics: Path, log: list[dict[str, Any]]) -> Counter[Any]:
    """The records that an attempt logged behind the checkpoint that is resumed, and that will come again."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return Counter(key_of(json.loads(line)) for line in lines) - Counter(map(key_of, log))


def key_of(record: dict[str, Any]) -> tuple[int, frozenset[str]]:
    return record["step"], frozenset(record) - {"step"}
