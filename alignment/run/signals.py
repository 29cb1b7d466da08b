"""SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and Ctrl-C: asked to stop, a run stops where nothing is lost."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import parent_process
from threading import Thread
from types import FrameType

from torch.utils.data import DataLoader

from ..errors import TrainingStopped

# The scheduler's end, SLURM's warnings before it (submitit's is USR2), Ctrl-C, a terminal that is closed.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
FOR_THE_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # not for a run that nohup, or a script's &, has made deaf to them


class RunInterrupted(TrainingStopped):
    """A signal ended the run before its end; the same command goes on from its last checkpoint."""


class StopSignals:
    """Takes the stopping signals while it is listening. At once, unless deferred; a second Ctrl-C is never deferred."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """In the main thread. The handlers of before are back afterwards. What came ignored stays ignored."""
        deaf = [number for number in FOR_THE_TERMINAL if signal.getsignal(number) == signal.SIG_IGN]
        before = {number: signal.signal(number, self.receive) for number in STOPPING if number not in deaf}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted: whoever works looks at `received` where it can stop."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received == signal.SIGINT == number
        self.received = signal.Signals(number)
        if again:
            os._exit(128 + number)
        if not self.is_deferred:
            raise RunInterrupted(f"stopped by {self.received.name}, before training began; nothing is lost by starting again.")


def outlast_signals(loader: DataLoader) -> DataLoader:
    """The same loader, whose workers do not die of what asks the run to stop."""
    starting = getattr(loader, "base_dataloader", loader)  # accelerate's loaders leave the workers to one inside
    starting.worker_init_fn = partial(start_loader_worker, starting.worker_init_fn)
    return loader


def start_loader_worker(seed: Callable[[int], None] | None, number: int) -> None:
    """The first thing that a data loader's worker does: from now on only its parent can stop it.

    A scheduler signals all processes. The run goes on to the end of its step and needs its workers, which end with it.
    """
    for stopping in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(stopping, signal.SIG_IGN)
    # A process that exits sends SIGTERM to the workers it has left, and waits for them: ignored, it would wait for ever.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=end_when_told, args=(parent_process().pid,), daemon=True).start()
    if seed is not None:
        seed(number)


def end_when_told(parent: int) -> None:
    """End this process at its parent's SIGTERM, and at nobody else's. A handler in Python is not told the sender."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
