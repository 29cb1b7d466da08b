"""A run's folder: one process writes into it, and a file in it says how far the run is."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import UserError

# transformers pushes nothing whose name begins so.
STATUS_FILE = "_run/status.json"
LOCK_FILE = "_run/lock"
PATIENCE_S = 10.0  # a run that was just told to stop may need a moment


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
        if made and [other for other in made[-1].rglob("*") if not other.is_dir()] == [path]:
            shutil.rmtree(made[-1])
        lock.release()


def writer(output_dir: Path) -> str:
    status = read_status(output_dir)
    return f"process {status['pid']} on {status['host']}" if status else "it has not written its status yet"


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
    draft.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
    draft.replace(output_dir / STATUS_FILE)


def read_status(output_dir: Path) -> dict[str, Any] | None:
    """What write_status wrote last, or None."""
    try:
        return json.loads((output_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
