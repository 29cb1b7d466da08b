"""A run's folder: one process writes into it, and a file in it says how far the run is."""

import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UserError

logger = logging.getLogger(__name__)

# transformers pushes nothing whose name begins so.
STATUS_FILE = "_run/status.json"
LOCK_FILE = "_run/lock"
LAUNCH_FILE = "_run/launch"
DATE_FILE = "_run/date"
PATIENCE_S = 10.0  # a run that was just told to stop may need a moment
SHARING_S = 60.0  # a network disk may show a new file late


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
