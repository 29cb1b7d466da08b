"""A run's folder: one process writes into it, and a file in it says how far the run is."""

import glob
import json
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.constants
from filelock import FileLock, Timeout

from ..errors import Problem, UserError

logger = logging.getLogger(__name__)

# transformers pushes nothing whose name begins so.
STATUS_FILE = "_run/status.json"
LOCK_FILE = "_run/lock"
LAUNCH_FILE = "_run/launch"
DATE_FILE = "_run/date"
PATIENCE_S = 10.0  # a run that was just told to stop may need a moment
SHARING_S = 60.0  # a network disk may show a new file late
# What a run writes into its folder, and would write over.
WRITTEN = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*config.json", "README.md", "recipe.yaml",
    "environment.json", "metrics.jsonl", "eval_pairs.jsonl", "probe_pairs.jsonl", "samples.jsonl", "warnings.jsonl",
    "nonfinite_rows.jsonl", "curves.png",
    "*_results.json", "trainer_state.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "chat_template.jinja", "additional_chat_templates", "training_args.bin", "checkpoint-*", "base", "shards",
)  # fmt: skip


# ---- Before a run ----


def folder_problems(values: SimpleNamespace) -> list[Problem]:
    """Where a run would write over somebody's files, or could not write at all."""
    output_dir = Path(values.output_dir or "trainer_output")
    if values.prepare_only:
        return cache_problems(values)
    advice = no_name(output_dir) or inputs_there(output_dir, values) or foreign_files(output_dir)
    problems = [Problem("output_dir", str(output_dir), advice)] if advice else []
    if not problems and (unwritable_here := unwritable(output_dir)):
        problems = [Problem("output_dir", str(output_dir), unwritable_here, is_local=True)]
    return [*problems, *cache_problems(values)]


def no_name(folder: Path) -> str | None:
    """What no file system takes for one: too long, a NUL in it, a link to itself."""
    try:
        folder.lstat()
        folder.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError) as error:
        return f"cannot be a folder ({getattr(error, 'strerror', None) or error}); choose another"
    return None


def inputs_there(output_dir: Path, values: SimpleNamespace) -> str | None:
    """The run would be written over what it is started from."""
    inputs = {
        "model_name_or_path": [values.model_name_or_path, adapter_base(values.model_name_or_path)],
        "tokenizer_name_or_path": [values.tokenizer_name_or_path],
        # A pattern in the run's folder would match the run's own records.
        "dataset_mixer": [str(Path(name).parent) if glob.has_magic(name) else name for name in values.dataset_mixer or {}],
    }
    for key, paths in inputs.items():
        for path in filter(None, paths):
            if output_dir.exists() and Path(path).exists() and Path(path).samefile(output_dir):
                return f"is a folder of {key}, which the run would write over; choose another"
    return None


def adapter_base(policy: str | None) -> str | None:
    try:
        config = json.loads(Path(policy or "", "adapter_config.json").read_text(encoding="utf-8"))
        return config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None  # no adapter, or one that is complained about where it is loaded


def foreign_files(output_dir: Path) -> str | None:
    """A run writes over files of a run, and over no others."""
    if not output_dir.is_dir() or (output_dir / STATUS_FILE).parent.is_dir():
        return None
    files = sorted({path.name for pattern in WRITTEN for path in output_dir.glob(pattern)})
    if not files:
        return None
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{', '.join(files[:3])}{more} in it are no run's, and would be written over; choose another, or move them"


def unwritable(folder: Path) -> str | None:
    """Without making it. A folder that is missing is made below the first that exists."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return None
    return f"{above} {'cannot be written' if above.is_dir() else 'is a file'}; choose another"


def cache_problems(values: SimpleNamespace) -> list[Problem]:
    """The folders that the libraries keep their copies in."""
    caches = {"HF_DATASETS_CACHE": Path(datasets.config.HF_DATASETS_CACHE)}
    if not Path(values.model_name_or_path or "").exists():
        caches["HF_HUB_CACHE"] = Path(huggingface_hub.constants.HF_HUB_CACHE)
    return [
        Problem(name, str(folder), f"cannot be written ({reason}); export {name} or HF_HOME, a folder that can")
        for name, folder in caches.items()
        if (reason := why_unwritable(folder)) is not None
    ]


def why_unwritable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def umask() -> int:
    """What this user's new files keep from others. It can only be read by setting it."""
    os.umask(mask := os.umask(0o077))
    return mask


# ---- One writer, one status ----


@contextmanager
def only_writer(output_dir: Path) -> Iterator[None]:
    """Hold the folder for one run; the lock of a process that died is free. A folder still empty at the end goes again.

    Raises UserError if another process holds it.
    """
    path = output_dir / LOCK_FILE
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        raise UserError(
            f"output_dir = {str(output_dir)!r}: another run is writing there ({writer(output_dir)}). Stop it, or choose "
            "another --output_dir."
        ) from None
    except OSError as error:
        raise UserError(f"output_dir = {str(output_dir)!r}: cannot be written ({error.strerror}); choose another") from error
    try:
        yield
    finally:
        if made and {other for other in made[-1].rglob("*") if not other.is_dir()} <= {
            path,
            output_dir / LAUNCH_FILE,
            output_dir / DATE_FILE,
        }:
            shutil.rmtree(made[-1])
        lock.release()


def writer(output_dir: Path) -> str:
    status = read_status(output_dir)
    return f"process {status['pid']} on {status['host']}" if status else "it has not written its status yet"


def mark_launch(output_dir: Path) -> str:
    """Leave a mark that `find_launch` looks for. By the process that holds the folder."""
    mark = secrets.token_hex(8)
    (output_dir / LAUNCH_FILE).write_text(mark, encoding="utf-8")
    return mark


def find_launch(output_dir: Path, mark: str) -> None:
    """Raises UserError if this process sees another folder than the one that was marked: checkpoints would lack its part."""
    path, end = output_dir / LAUNCH_FILE, time.monotonic() + SHARING_S
    while not path.is_file() or path.read_text(encoding="utf-8") != mark:
        if time.monotonic() > end:
            raise UserError(
                f"output_dir = {str(output_dir)!r}: on {socket.gethostname()} this is not the folder that the first process "
                "writes to. Give one on a disk that all machines share, as a whole path."
            )
        time.sleep(0.1)


def run_date(output_dir: Path, begun: Path | None) -> str:
    """The day on which a run began, which its chat template may read: today, or as `begun` says, the folder it goes on from."""
    recorded = None if begun is None else begun / DATE_FILE
    date = recorded.read_text(encoding="utf-8") if recorded is not None and recorded.is_file() else today()
    (output_dir / DATE_FILE).write_text(date, encoding="utf-8")
    return date


def today() -> str:
    return time.strftime("%Y-%m-%d")


def write_status(output_dir: Path, state: str, **facts: Any) -> None:
    """Replace the status in one move. state: preparing, training, ending, finished, interrupted or failed."""
    status = {
        "state": state,
        **facts,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    draft = output_dir / f"{STATUS_FILE}.new"
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(status, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(output_dir / STATUS_FILE)
    except OSError as error:  # a full disk: no reason to end a run, or to hide why it ends
        logger.warning("%s could not be written (%s); the state is %s.", output_dir / STATUS_FILE, error.strerror, state)


def read_status(output_dir: Path) -> dict[str, Any] | None:
    """What write_status wrote last; None if there is none, or a torn one."""
    try:
        return json.loads((output_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
