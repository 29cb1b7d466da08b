"""Cells as jobs of a cluster, through submitit: chosen because it submits, requeues and follows jobs, and writes no service.

The only file that imports it (extra `cluster`). A job's process imports this file, so it needs no more than that.
"""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit

from ..errors import UserError
from .process import RunProcess

PREEMPT_SIGNAL = "SUBMITIT_PREEMPT_SIGNAL"  # submitit's own name; it takes USR2 where nobody says
TIMEOUTS = "slurm_max_num_timeout"  # how often a job that ran out of time goes on, of submitit's constructor
SIGNAL_DELAY_S = 300  # before the end of a job's time; submitit's 90 are little for a checkpoint
# What an executor of submitit raises for parameters that it does not know, or cannot use.
REFUSALS = (NameError, ValueError, TypeError, AssertionError, RuntimeError)


class CellJob:
    """A run as a job: submitit's Checkpointable, which CommandFunction is not, so that a job out of time is requeued."""

    def __init__(self, command: Sequence[str], log: Path, patience_s: float):
        self.command, self.log, self.patience_s = list(command), log, patience_s
        self.process: RunProcess | None = None

    def __call__(self) -> None:
        """Raises RuntimeError where the run does not end well; submitit keeps it as the job's exception."""
        self.process = RunProcess(self.command, self.log)
        if status := self.process.wait():
            raise RuntimeError(f"the run ended with status {status}; see {self.log}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit before the job's time is up or its place is taken: the run saves, and the same goes on later."""
        if self.process is not None:
            self.process.stop(self.patience_s, signal.Signals[f"SIG{preempt_signal()}"])
        return submitit.helpers.DelayedSubmission(CellJob(self.command, self.log, self.patience_s))


def preempt_signal() -> str:
    return submitit.JobEnvironment.USR_SIG


def make_executor(folder: Path, name: str, parameters: Mapping[str, Any], cluster: str) -> submitit.AutoExecutor:
    """Raises UserError for parameters that submitit refuses, or where there is no such cluster."""
    parameters = dict(parameters)
    constructor = {TIMEOUTS: parameters.pop(TIMEOUTS)} if TIMEOUTS in parameters else {}
    # The job's own Python reads the variable again, and not every cluster hands on the environment of who submits.
    setup = [f"export {PREEMPT_SIGNAL}={preempt_signal()}", *parameters.pop("slurm_setup", [])]
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, **constructor)
        executor.update_parameters(name=name, slurm_setup=setup, **{"slurm_signal_delay_s": SIGNAL_DELAY_S} | parameters)
    except REFUSALS as error:
        raise UserError(f"launch: submitit {submitit.__version__} refuses it: {' '.join(str(error).split())[:600]}") from error
    return executor


def submit(executor: submitit.AutoExecutor, command: Sequence[str], log: Path, patience_s: float) -> submitit.Job:
    return executor.submit(CellJob(command, log, patience_s))


def last_job(folder: Path, cluster: str) -> submitit.Job | None:
    """The job that was submitted from a folder last, whoever did; None if there is none.

    A job whose submission was cut off before its file was there ends by itself: it waits for that file a minute.
    """
    submitted = sorted(folder.glob("*_submitted.pkl"), key=lambda path: path.stat().st_mtime)
    if not submitted:
        return None
    kind = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
    return kind(folder, submitted[-1].name.removesuffix("_submitted.pkl"))


def failure(job: submitit.Job) -> str | None:
    """Why a job that is done did not end well, in one line. Its state does not tell: FINISHED is said of failures too."""
    error = job.exception()
    if error is None:
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and set(line.strip()) != {"-"}]
    raised = [line for line in lines if line.startswith(("RuntimeError: ", "submitit.", "Job "))]
    return (raised or lines)[-1].removeprefix("RuntimeError: ")
