"""What a run prints, to a terminal or a pipe that may go away before it."""

import io
import logging
import sys
from contextlib import suppress


class UnbrokenFile(io.FileIO):
    """A file descriptor that is written to for whoever still reads: where nobody does, what is written is dropped."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:  # a closed pipe or terminal, a full disk; the records are in the run's folder
            return len(data)


def outlast_readers() -> None:
    """Let neither stdout nor stderr end this process. A stream that somebody has put in their place is left alone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        with suppress(OSError):
            stream.flush()
        raw = UnbrokenFile(stream.fileno(), "w", closefd=False)
        text = io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)
        setattr(sys, name, text)


def log_to_stdout() -> None:
    """Let every logger's records be lines on stdout, where nobody has set up logging before."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
