"""A run and the launcher that starts it, as one process that can be stopped without loss.

A scheduler signals every process. Launchers die of it and would take the run along while it saves; here they are deaf, and
whoever waits for a run hands the signal on to the processes that train.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Seconds that torch's launcher gives processes that were told to end, by whoever else can reach it; 30 where nobody says.
SHUTDOWN_S = "600"
POLL_S = 0.2


class RunProcess:
    """The launcher of a run, in a session of its own: Ctrl-C in this terminal is for whoever waits, not for the run."""

    def __init__(self, command: Sequence[str], log: Path):
        """Start it; what it prints is appended to log."""
        environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_S, **os.environ}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=turn_deaf,  # inherited: by the launcher, and by the run until it listens itself
            )

    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.poll()

    def wait(self) -> int:
        """Its exit status, once it has ended. Popen's own wait would hold a lock that the handler of a signal may need."""
        while (status := self.status()) is None:
            time.sleep(POLL_S)
        return status

    def stop(self, patience_s: float, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask the run to save and end, and return when it has; kill what is left after `patience_s` seconds.

        May be called by the handler of a signal, wherever it struck: nothing here needs Popen's lock.
        """
        for run in workers(self.process.pid):
            # One that does not listen yet has nothing to lose; it would outlive the signal.
            send(run, number if listens(run.pid, number) else signal.SIGKILL)
        end = time.monotonic() + patience_s
        while is_running(self.process.pid):
            if time.monotonic() > end:
                for process in family(self.process.pid):
                    send(process, signal.SIGKILL)
            time.sleep(POLL_S)


def turn_deaf() -> None:
    for number in SCHEDULERS:
        signal.signal(number, signal.SIG_IGN)


def workers(launcher: int) -> list[psutil.Process]:
    """The processes that a launcher has started: those that train."""
    try:
        return psutil.Process(launcher).children()
    except psutil.NoSuchProcess:
        return []


def family(pid: int) -> list[psutil.Process]:
    try:
        first = psutil.Process(pid)
        return [*first.children(recursive=True), first]
    except psutil.NoSuchProcess:
        return []


def send(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):  # it ended meanwhile
        process.send_signal(number)


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for the signal, as Linux tells; elsewhere it is taken to have one."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return True
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
