"""What a run leaves beside its model: the resolved recipe, versions, every logged record."""

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..model.adapters import provenance
from ..recipe.configs import Run
from .checkpoints import RECIPE_FILE

logger = logging.getLogger(__name__)

RECORDED_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "safetensors")


class RunRecords(TrainerCallback):
    """Appends every logged record to metrics.jsonl, as it is logged. A full disk costs records, and not the run."""

    is_complete = True

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        # As of the checkpoint: what an interrupted attempt logged after it will be logged again.
        path = Path(args.output_dir, "metrics.jsonl")
        write_jsonl(path, [{"step": record["step"], **record} for record in state.log_history])

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir, "metrics.jsonl")
        whole = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, whole)  # no half of a record
            if self.is_complete:
                logger.warning("%s cannot be written (%s) and lacks records from here on.", path, error.strerror)
            self.is_complete = False


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def replace_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """As `write_jsonl`, in one move: whoever is killed in it leaves the old file."""
    draft = path.with_name(f"{path.name}.new")
    write_jsonl(draft, records)
    draft.replace(path)


def write_run_folder(run_: Run, **more: Any) -> None:
    """What is known before training: the resolved recipe, package versions and commit. more: for environment.json."""
    run_.output_dir.mkdir(parents=True, exist_ok=True)
    (run_.output_dir / RECIPE_FILE).write_text(run_.recipe, encoding="utf-8")
    environment = {
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
        "commit": commit(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "device": str(run_.training_args.device),
        "objective": run_.training_args.objective.record(),
        **provenance(run_.model_args),
        **more,
    }
    (run_.output_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The suite's git commit, with "+changes" where the working tree differs from it; None outside a checkout."""
    folder = Path(__file__).parent
    head = git(folder, "rev-parse", "HEAD")
    return head and head + ("+changes" if git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
