"""Cells are run: one after another here, or all at once as jobs of a cluster."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tqdm import tqdm

from ..errors import UserError
from ..run.signals import RunInterrupted, StopSignals
from .cells import Cell
from .checks import launched_processes
from .matrix import Launch
from .outcomes import FAILED, Outcome, counts, is_held, outcome_of, outcome_of_attempt, share_done
from .process import RunProcess

POLL_S = 1.0
FOLLOW_S = 5.0  # jobs
STOPPING_S = 3600.0  # for a checkpoint, when this command is told to end
RESUBMISSIONS = 3  # of a job that something ended before its time


class Launcher(Protocol):
    """Starts cells, and says what became of them."""

    def run(self, cells: Sequence[Cell], tell: Callable[[Cell, Outcome | None], None]) -> None:
        """Run them to their ends. tell: called often, with a cell and its outcome, None while it runs.

        Raises RunInterrupted if this command is told to end.
        """


def launch_command(cell: Cell, launch: Launch, entry_points: Path) -> list[str]:
    """What starts a cell's run: `accelerate launch ... scripts/run_METHOD.py RECIPE`."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *launch_options(launch), *script(cell, entry_points)]


def shown_command(cell: Cell, launch: Launch, entry_points: Path) -> str:
    """The same, for a person who reads the recipe."""
    return " ".join(["accelerate launch", *launch_options(launch), *script(cell, entry_points)])


def launch_options(launch: Launch) -> list[str]:
    options = ["--config_file", str(launch.accelerate_config)]
    if launch.gpus_per_node == 0:
        return [*options, "--cpu", "--num_processes=1"]
    options += [] if launch.gpus_per_node is None else [f"--num_processes={launch.gpus_per_node}"]
    # Any free port: two jobs may share a machine.
    return [*options, *(["--main_process_port=0"] if launched_processes(launch) > 1 else [])]


def script(cell: Cell, entry_points: Path) -> list[str]:
    return [os.path.relpath(entry_points / f"run_{cell.method}.py"), str(cell.recipe_file)]


class LocalLauncher:
    """One cell after another, on this machine."""

    def __init__(self, launch: Launch, entry_points: Path, stop: StopSignals):
        self.launch, self.entry_points, self.stop = launch, entry_points, stop

    def run(self, cells: Sequence[Cell], tell: Callable[[Cell, Outcome | None], None]) -> None:
        for cell in cells:
            tell(cell, self.run_one(cell, tell))

    def run_one(self, cell: Cell, tell: Callable[[Cell, Outcome | None], None]) -> Outcome:
        self.outwait(cell, tell)
        if (outcome := outcome_of(cell)).is_settled:
            return outcome
        log_from = size(cell.log)
        process = RunProcess(launch_command(cell, self.launch, self.entry_points), cell.log)
        while (status := process.status()) is None:
            if self.stop.received:
                process.stop(STOPPING_S)
                self.leave()
            tell(cell, None)
            time.sleep(POLL_S)
        self.outwait(cell, tell)  # who was refused because another process is at work has not failed
        return outcome_of_attempt(cell, f"it ended with status {status}; see {cell.log}" if status else None, log_from)

    def outwait(self, cell: Cell, tell: Callable[[Cell, Outcome | None], None]) -> None:
        """Return when nobody writes into the run's folder: a run outlives a command that is killed."""
        while is_held(cell):
            if self.stop.received:
                self.leave()
            tell(cell, None)
            time.sleep(POLL_S)

    def leave(self) -> None:
        raise RunInterrupted(f"stopped by {self.stop.received.name}; the same command goes on.")


class ClusterLauncher:
    """All cells at once, as jobs; a job that is still there from an earlier command is followed, not submitted again."""

    def __init__(self, launch: Launch, entry_points: Path, stop: StopSignals, cluster: str = "slurm"):
        self.launch, self.entry_points, self.stop, self.cluster = launch, entry_points, stop, cluster
        self.jobs_of = import_cluster()
        self.parameters = job_parameters(launch)

    def check(self, folder: Path) -> None:
        """Raises UserError where submitit would refuse every job."""
        self.jobs_of.make_executor(folder, "check", self.parameters, self.cluster)

    def run(self, cells: Sequence[Cell], tell: Callable[[Cell, Outcome | None], None]) -> None:
        submissions = dict.fromkeys((cell.name for cell in cells), 0)
        jobs = {cell.name: self.jobs_of.last_job(jobs_folder(cell), self.cluster) for cell in cells}
        log_from = {cell.name: 0 for cell in cells}
        followed = {name for name, job in jobs.items() if job is not None and not job.done()}
        for cell in cells:
            if cell.name not in followed:
                log_from[cell.name], jobs[cell.name] = size(cell.log), self.submit(cell)
        running = list(cells)
        while running:
            if self.stop.received:
                names = ", ".join(cell.name for cell in running)
                raise RunInterrupted(
                    f"stopped by {self.stop.received.name}; the jobs of {names} go on, and the same command follows them."
                )
            for cell in tuple(running):
                job = jobs[cell.name]
                if not job.done():
                    tell(cell, None)
                    continue
                outcome = outcome_of_attempt(cell, self.jobs_of.failure(job), log_from[cell.name])
                if not outcome.is_settled and outcome.state != FAILED and submissions[cell.name] < RESUBMISSIONS:
                    submissions[cell.name] += 1
                    jobs[cell.name] = self.submit(cell)
                    continue
                tell(cell, outcome)
                running.remove(cell)
            time.sleep(FOLLOW_S if self.cluster == "slurm" else POLL_S)

    def submit(self, cell: Cell) -> Any:
        executor = self.jobs_of.make_executor(jobs_folder(cell), cell.name, self.parameters, self.cluster)
        delay = self.parameters.get("slurm_signal_delay_s", self.jobs_of.SIGNAL_DELAY_S)
        command = launch_command(cell, self.launch, self.entry_points)
        return self.jobs_of.submit(executor, command, cell.log, patience_s=0.8 * delay)


def size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def jobs_folder(cell: Cell) -> Path:
    return (cell.folder / "jobs").absolute()


def job_parameters(launch: Launch) -> dict[str, Any]:
    """In submitit's words."""
    gpus = {"gpus_per_node": launch.gpus_per_node} if launch.gpus_per_node else {}
    return {"timeout_min": round(60 * launch.hours), **gpus, **launch.more}


def import_cluster() -> ModuleType:
    """The file that imports submitit. Raises UserError where that is not installed."""
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # read at the import; USR2 otherwise
    try:
        from . import cluster
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise UserError("launch: on = 'slurm' needs submitit: pip install -c constraints.txt -e '.[cluster]'") from error
    return cluster


class Progress:
    """One line for the whole experiment."""

    def __init__(self, cells: Iterable[Cell], outcomes: Mapping[str, Outcome]):
        self.names = [cell.name for cell in cells]
        self.outcomes = outcomes
        self.running: dict[str, float] = {}
        layout = "{n:.1f} of {total} cells |{bar}| {elapsed}<{remaining}{postfix}"
        before = sum(name in outcomes for name in self.names)
        self.bar = tqdm(total=len(self.names), initial=before, bar_format=layout, dynamic_ncols=True)
        self.shown: Any = None
        self.refresh()

    def tell(self, cell: Cell, outcome: Outcome | None) -> None:
        """outcome: None while the cell is run."""
        if outcome is None:
            self.running[cell.name] = share_done(cell)
        else:
            self.running.pop(cell.name, None)
        self.refresh()

    def refresh(self) -> None:
        settled = [self.outcomes[name] for name in self.names if name in self.outcomes]
        what = ", ".join(filter(None, [counts(settled), " ".join(self.running)]))
        self.bar.n = len(settled) + sum(self.running.values())
        # In a file each turn would be a line: there only what begins and what ends is told.
        if (news := (what, self.bar.n) if self.bar.fp.isatty() else what) != self.shown:
            self.shown = news
            self.bar.set_postfix_str(what)
