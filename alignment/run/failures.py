"""How a run that fails says so: once, whatever the number of processes, and last, in the launcher's own summary."""

import errno
import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ..errors import TrainingStopped, UserError
from .signals import RunInterrupted

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What usually fails, fails on all processes. The first one speaks, and its launcher ends the others while they wait.
PATIENCE_S = 5.0
TEARDOWN_S = 60.0


@contextmanager
def told(again: str) -> Iterator[None]:
    """Around all that an entry point other than a run's does: what ends it is one message and an exit status.

    2 for a user's mistake, 1 where work had to stop, 75 for Ctrl-C. again: what the same command would do then, a sentence.
    """
    try:
        yield
    except UserError as error:
        sys.exit(report(error, status=2))
    except KeyboardInterrupt:
        sys.exit(report(RunInterrupted(f"stopped by SIGINT. {again}"), status=75))
    except RunInterrupted as error:
        sys.exit(report(error, status=75))
    except TrainingStopped as error:
        sys.exit(report(error, status=1))
    except OSError as error:
        if error.errno not in DISK_FULL:
            record_crash(error)
            raise
        sys.exit(report(TrainingStopped(f"{error}. With room: {again}"), status=1))
    except Exception as error:
        record_crash(error)
        raise


def report(error: Exception, status: int) -> int:
    """Say what a user has to know, without a traceback; returns `status`, to exit with."""
    if not isinstance(error, RunInterrupted):  # whoever sent that signal gives a few seconds to end
        others = (os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK"))
        wait_for_the_first(*others)
    print(f"\nerror: {error}", file=sys.stderr, flush=True)
    record(f"error: {error}")
    end_in_bounded_time()
    return status


def record_crash(error: Exception) -> None:
    """Hand an error that nobody foresaw to the launcher, which shows the traceback of the process that failed first."""
    # A lost connection is how the end of another process looks from here; that one knows the reason.
    wait_for_the_first(isinstance(error, DistError) or "gloo" in str(error).lower())
    get_error_handler().record_exception(error)
    end_in_bounded_time()


def wait_for_the_first(is_other: bool, is_other_on_node: bool = False) -> None:
    if processes() > 1:
        time.sleep(PATIENCE_S * (is_other + is_other_on_node))


def record(message: str) -> None:
    """Leave the message where torch's launcher looks for the reason of a failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}), encoding="utf-8")


def end_in_bounded_time() -> None:
    """Exit hard if the interpreter cannot end, because a collective is pending that no other process will join."""
    if processes() > 1:
        faulthandler.dump_traceback_later(TEARDOWN_S, exit=True)


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
