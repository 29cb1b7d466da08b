"""Work that one process does while the others wait for it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)
T = TypeVar("T")


def decided_by_main(decide: Callable[[], T]) -> T:
    """What the main process decides, on all of them; an error on it ends the others through the launcher."""
    return broadcast_object_list([decide() if PartialState().is_main_process else None])[0]


@contextmanager
def one_process_at_a_time(lock_file: Path, work: str) -> Iterator[None]:
    """One process does `work`, the others wait and then find its files. The lock of a dead one is free.

    A lock and no collective, which would time out while somebody works for an hour.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.info("Another process is %s; waiting for it.", work)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
