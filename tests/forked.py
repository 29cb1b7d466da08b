"""Whole runs in processes of their own at the price of a fork: the libraries are imported once, by a server.

A job is a command line, a number of processes, and perhaps a sabotage: a function of this file that is called in each
process before the run, with the process's rank and the job's arguments, and that breaks something later.
"""

import gc
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).parents[1]
TIME_LIMIT_S = 120


class Ended(NamedTuple):
    """How the processes of a job ended: exit statuses (minus the signal, where one killed it), and what they printed."""

    statuses: list[int]
    printed: str
    seconds: float

    @property
    def status(self) -> int:
        return next((status for status in self.statuses if status), 0)


class Server:
    """Runs jobs one after the other, each in fresh processes."""

    def __init__(self, folder: Path, **variables: str):
        self.folder = folder
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HOME": str(folder / "home"),
            "HF_DATASETS_CACHE": str(folder / "cache"),
            **variables,
        }
        with (folder / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(
        self, *argv: str, processes: int = 1, method: str = "simpo", sabotage: str | None = None, **arguments: Any
    ) -> Ended:
        job = {"argv": argv, "processes": processes, "method": method, "sabotage": sabotage, "arguments": arguments}
        print(json.dumps({**job, "log": str(self.folder / "job.log")}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "server.log").read_text()
        return Ended(**json.loads(answer), printed=(self.folder / "job.log").read_text(errors="replace"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


# ---- The server ----


def serve(answers: TextIO) -> None:
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        port = free_port()
        children = [start(job, rank, port) for rank in range(job["processes"])]
        statuses = outlive(children)
        print(json.dumps({"statuses": statuses, "seconds": time.perf_counter() - started}), file=answers, flush=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def outlive(children: list[int]) -> list[int]:
    """Exit statuses; once one has failed the others get 15 seconds, after all TIME_LIMIT_S they are killed."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + TIME_LIMIT_S
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child]:
                    deadline = min(deadline, time.monotonic() + 15)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]


def start(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if rank == 0 else 0))
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["processes"] > 1:
            count = str(job["processes"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if job["sabotage"]:
            globals()[job["sabotage"]](rank, **job["arguments"])
        main_of(job["method"], job["argv"])
        status = 0
    except SystemExit as exit_:
        status = exit_.code or 0
    finally:
        if error := sys.exception():
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing of the server's own is run twice


# ---- Sabotages ----

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def file_events(folder: str, act) -> None:
    """Call act(number) in front of every change that Python makes to a file in `folder`."""
    number = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal number
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod")
        if event == "open":
            changes = isinstance(arguments[2], int) and bool(arguments[2] & WRITING)
        if changes and str(arguments[0]).startswith(folder):
            number += 1
            act(number)

    sys.addaudithook(hook)


def count_file_events(rank: int, folder: str, into: str) -> None:
    def act(number: int) -> None:
        with open(into, "w") as file:  # noqa: PTH123
            file.write(str(number))

    file_events(folder, act)


def kill_at_file_event(rank: int, folder: str, number: int) -> None:
    file_events(folder, lambda event: os.kill(os.getpid(), signal.SIGKILL) if event == number else None)


def signal_in(rank: int, place: str, number: int, ranks: list[int], delays: list[float], names: list[str]) -> None:
    """At the number-th call of a place, `names` come after `delays` seconds, if this rank is one of `ranks`."""
    owner, name = places()[place]
    original, calls = getattr(owner, name), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and rank in ranks:
            send(names, delays)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def lose_output_in(rank: int, place: str, number: int, names: list[str]) -> None:
    """At the number-th call of a place, whoever reads stdout and stderr goes away; `names` come with it."""

    def lose() -> None:
        reader, writer = os.pipe()
        for descriptor in (1, 2):
            os.dup2(writer, descriptor)
        os.close(reader)
        send(names, [0.0] * len(names))

    at_call(place, number, lose)


def deaf_in(rank: int, place: str, number: int, names: list[str]) -> None:
    """A run that was started deaf to some signals, as by nohup, which then come."""
    for name in names:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    at_call(place, number, lambda: send(names, [0.0] * len(names)))


def under_umask(rank: int, mask: int) -> None:
    os.umask(mask)


def at_call(place: str, number: int, do: Callable[[], None]) -> None:
    owner, name = places()[place]
    original, calls = getattr(owner, name), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            do()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def send(names: list[str], delays: list[float]) -> None:
    """In the background, if a signal has to wait; then also to the data loader's workers, as from a scheduler."""
    if not any(delays):
        for name in names:
            os.kill(os.getpid(), signal.Signals[name])
        return
    everybody = [*(worker.pid for worker in multiprocessing.active_children()), os.getpid()]
    if os.fork() == 0:
        for name, delay in zip(names, delays, strict=True):
            time.sleep(delay)
            for process in everybody:
                os.kill(process, signal.Signals[name])
        os._exit(0)


def full_disk_in(rank: int, place: str, limit: int) -> None:
    """While a place is called, writing more than `limit` bytes into a file fails."""
    owner, name = places()[place]
    original = getattr(owner, name)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def patched(*args: Any, **kwargs: Any) -> Any:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return original(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    setattr(owner, name, patched)


def little_room(rank: int, free: int) -> None:
    import shutil

    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


def die_in(rank: int, place: str, number: int, ranks: list[int]) -> None:
    signal_in(rank, place, number, ranks, [0.0], ["SIGKILL"])


def tear_row(rank: int, number: int) -> None:
    """In the middle of the number-th row that a stage of the on-policy data appends, the process is killed."""
    from on_policy_data_gen import stages

    original, calls = stages.append, 0

    def torn(descriptor: int, row: dict) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.write(descriptor, json.dumps(row).encode()[:40])
            os.kill(os.getpid(), signal.SIGKILL)
        original(descriptor, row)

    stages.append = torn


def places() -> dict[str, tuple[Any, str]]:
    """Functions that a run passes through: owner and name."""
    import alignment.pipeline
    import alignment.run.durable
    import alignment.run.hub
    import alignment.watch.samples
    from alignment.preference import reference
    from alignment.preference.trainer import PairTrainer
    from on_policy_data_gen import joining, pair_data, responses

    return {
        "joining": (joining, "write_rows"),
        "a pass's end": (responses, "finish"),
        "making the data set": (pair_data, "save_splits"),
        "preparation": (alignment.pipeline, "tokenized_splits"),
        "scoring": (PairTrainer, "concatenated_forward"),  # before the first step, then also in training
        "keeping scores": (reference, "save_step_zero"),
        "training": (PairTrainer, "compute_loss"),
        "evaluation": (PairTrainer, "prediction_step"),
        "saving": (alignment.run.durable, "seal"),
        "sampling": (alignment.watch.samples, "replies"),
        "optimizer": (PairTrainer, "_save_optimizer_and_scheduler"),
        "writing": (PairTrainer, "_save_rng_state"),
        "figures": (PairTrainer, "save_metrics"),
        "the end": (alignment.pipeline, "save"),
        "pushing": (alignment.pipeline, "push_run"),
        "uploading": (alignment.run.hub, "awaited"),
    }


def main_of(method: str, argv: list[str]) -> None:
    """A training method by its name, or an entry point by its path."""
    if method.endswith(".py"):
        sys.argv = [method, *argv]
        runpy.run_path(str(ROOT / method), run_name="__main__")
        return
    from alignment.pipeline import main
    from tests.methods import METHODS

    main(METHODS[method], argv)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where libraries may print what they like
    # Imported on the way of a run.
    import deepspeed  # noqa: F401

    places()
    gc.freeze()  # the children need not look through it
    serve(answers)
