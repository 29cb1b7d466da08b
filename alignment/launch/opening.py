"""The seconds in which the libraries are imported: nothing but this file and Python is there yet."""

import logging
import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, NoReturn

STOPPED = 75  # as of any run that a signal ends and the same command begins again


class Silenced(NamedTuple):
    """A line that a library logs about itself, to other people than those who start a run."""

    logger: str
    beginning: str
    reason: str


SILENCED = (
    Silenced(
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
        "a package that no recipe needs: 4-bit weights are trained without it; peft imports bitsandbytes in every run",
    ),
    Silenced(
        "DeepSpeed",
        "Setting accelerator to CPU",
        "accelerate asks DeepSpeed in every run; the suite's own line says on which device the run is",
    ),
)


# Beginnings of deprecations (FutureWarning) that one library raises about another, and why they are not for the user.
DEPRECATIONS = {
    "`is_gradient_checkpointing` is deprecated": "peft asks a model by this name whenever an adapter is made or read",
}


@contextmanager
def opening() -> Iterator[None]:
    """Around the imports of an entry point: Ctrl-C ends them in one line, and SILENCED is not printed, then or later.

    Nor are DEPRECATIONS.
    """
    for line in SILENCED:
        logging.getLogger(line.logger).addFilter(lambda record, line=line: not str(record.msg).startswith(line.beginning))
    for beginning in DEPRECATIONS:
        warnings.filterwarnings("ignore", re.escape(beginning), FutureWarning)
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # of a script's &, or nohup
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """At once: an exception would have to find its way through half-imported libraries, some of which take it for their own."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"\nerror: stopped by SIGINT, before anything was begun.\n")
    os._exit(STOPPED)
