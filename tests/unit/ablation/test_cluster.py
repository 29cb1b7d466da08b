"""Cells as jobs: requeued when their time is up, failures seen as such, jobs of an earlier command followed."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import alignment.ablation
from alignment.ablation import running
from alignment.ablation.cells import Cell
from alignment.ablation.matrix import Launch
from alignment.ablation.outcomes import FAILED, FINISHED, outcome_of
from alignment.ablation.running import ClusterLauncher, import_cluster
from alignment.errors import UserError
from alignment.run.signals import RunInterrupted, StopSignals
from tests.unit.ablation import slurm, stand_in

STEPS = 60  # 3 seconds


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Jobs of stand-ins for runs, looked after often."""
    commands = {"well": [str(STEPS)], "badly": ["3", "3"], "brief": ["2"]}

    def command(cell: Cell, launch: Launch, entry_points: Path) -> list[str]:
        return [sys.executable, stand_in.__file__, "launch", str(cell.run), *commands[cell.name.split("-")[0]]]

    monkeypatch.setattr(running, "launch_command", command)
    monkeypatch.setattr(running, "FOLLOW_S", 0.1)
    monkeypatch.setattr(running, "POLL_S", 0.1)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """The folder of the stand-in's jobs."""
    slurm.install(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv(slurm.STATE, str(tmp_path / "jobs"))
    return tmp_path / "jobs"


def cell(folder: Path, name: str) -> Cell:
    made = Cell(name, {}, "simpo", {}, (), folder / name)
    made.folder.mkdir()
    return made


def launcher(on: str, stop: StopSignals | None = None, **more) -> ClusterLauncher:
    launch = Launch(on="slurm", hours=0.5, more=more)
    return ClusterLauncher(launch, Path(), stop or StopSignals(), cluster=on)


def run(cells: list[Cell], on: str, **more) -> dict:
    outcomes = {}
    launcher(on, **more).run(cells, lambda cell, outcome: outcomes.update({cell.name: outcome}))
    return outcomes


def begun_at(cell: Cell) -> list[int]:
    return [int(line.split()[-1]) for line in cell.log.read_text().splitlines() if line.startswith("begins")]


@pytest.mark.parametrize("on", ["local", "slurm"])
def test_a_job_that_fails_is_seen_to_fail_and_the_others_go_on(on, tmp_path, cluster):
    cells = [cell(tmp_path, name) for name in ("badly", "brief")]
    outcomes = run(cells, on)
    assert outcomes["brief"].state == FINISHED
    assert outcomes["badly"].state == FAILED
    assert outcomes["badly"].reason == "it broke"
    jobs = import_cluster()
    job = jobs.last_job(running.jobs_folder(cells[0]), on)
    assert job.exception() is not None
    assert "the run ended with status 1; see" in jobs.failure(job)


def test_submitit_calls_a_job_finished_that_has_failed(tmp_path):
    """What makes reading the exception necessary."""
    jobs = import_cluster()
    made = cell(tmp_path, "badly")
    executor = jobs.make_executor(running.jobs_folder(made), "badly", {"timeout_min": 1}, "local")
    job = jobs.submit(executor, running.launch_command(made, Launch(), Path()), made.log, patience_s=5)
    assert job.exception() is not None
    assert job.state == "FINISHED"


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_a_job_whose_time_is_up_saves_is_requeued_and_goes_on(name, tmp_path, cluster):
    """The signal goes to every process of the job's step, the launcher and the run among them."""
    made = cell(tmp_path, "well")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as thread:
        patch.setattr(import_cluster().submitit.JobEnvironment, "USR_SIG", name)
        done = thread.submit(run, [made], "slurm")
        slurm.wait_for(lambda: (made.run / "steps").exists() and (made.run / "steps").read_text() >= "2")
        subprocess.run(["scancel", "1", "--signal", name], check=True)
        outcomes = done.result(timeout=60)
    assert outcomes["well"].state == FINISHED
    first, second = begun_at(made)
    assert first == 0
    assert 0 < second < STEPS
    assert f"stopped by SIG{name} after step {second}" in made.log.read_text()
    script = (cluster / "1.sh").read_text()
    assert f"#SBATCH --signal={name}@" in script
    assert f"export SUBMITIT_PREEMPT_SIGNAL={name}" in script

    assert len(list(cluster.glob("*.sh"))) == 1  # the same job


def test_submitits_local_jobs_are_requeued_too(tmp_path):
    made, jobs = cell(tmp_path, "well"), import_cluster()
    executor = jobs.make_executor(running.jobs_folder(made), "well", {"timeout_min": 30}, "local")
    job = jobs.submit(executor, running.launch_command(made, Launch(), Path()), made.log, patience_s=20)
    slurm.wait_for(lambda: (made.run / "steps").exists())
    (task,) = (child.pid for child in psutil.Process(job._process.pid).children())
    os.kill(task, signal.Signals[f"SIG{jobs.preempt_signal()}"])
    assert job.exception() is None
    assert outcome_of(made).state == FINISHED
    saved = begun_at(made)[-1]
    name = f"SIG{jobs.preempt_signal()}"
    lines = ["begins behind step 0", f"stopped by {name} after step {saved}", f"begins behind step {saved}"]
    assert made.log.read_text().splitlines() == lines


def test_a_run_that_a_scheduler_ends_before_its_time_is_submitted_again(tmp_path, cluster):
    """SIGTERM alone, of a preemption: submitit does nothing about it, and the run has saved and ended."""
    made = cell(tmp_path, "well")
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(run, [made], "slurm")
        slurm.wait_for(lambda: (made.run / "steps").exists())
        subprocess.run(["scancel", "1", "--signal", "TERM"], check=True)
        assert done.result(timeout=60)["well"].state == FINISHED
    assert len(begun_at(made)) == 2
    assert len(list(cluster.glob("*.sh"))) == 2


def test_a_command_that_ends_leaves_its_jobs_and_the_next_one_follows_them(tmp_path, cluster):
    made, stop = cell(tmp_path, "well"), StopSignals()

    def tell(cell, outcome) -> None:
        stop.received = signal.SIGTERM

    with pytest.raises(RunInterrupted, match="the jobs of well go on, and the same command follows them"):
        launcher("slurm", stop).run([made], tell)
    assert run([made], "slurm")["well"].state == FINISHED
    assert begun_at(made) == [0]
    assert len(list(cluster.glob("*.sh"))) == 1


def test_what_submitit_does_not_know_is_refused_before_any_job(tmp_path, cluster):
    with pytest.raises(UserError, match=r"submitit .* refuses it: .*slurm_partitoin"):
        launcher("slurm", slurm_partitoin="gpu").check(tmp_path / "check")
    with pytest.raises(UserError, match=r"refuses it: .*gpus"):
        launcher("slurm", gpus=4).check(tmp_path / "check")
    assert list(cluster.glob("*.sh")) == []


def test_a_machine_without_slurm_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="srun"):
        launcher("slurm").check(tmp_path / "check")


def test_keys_of_the_launch_reach_sbatch(tmp_path, cluster):
    made = cell(tmp_path, "brief")
    run([made], "slurm", slurm_partition="gpu", cpus_per_task=3, slurm_setup=["module load cuda"])
    script = (cluster / "1.sh").read_text()
    for line in ("--partition=gpu", "--cpus-per-task=3", "--time=30", "--job-name=brief", "--signal=USR1@300"):
        assert f"#SBATCH {line}\n" in script
    assert script.index("export SUBMITIT_PREEMPT_SIGNAL=USR1") < script.index("module load cuda") < script.index("srun")


def test_a_missing_submitit_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "alignment.ablation.cluster", raising=False)
    monkeypatch.delattr(alignment.ablation, "cluster", raising=False)
    with pytest.raises(UserError, match=r"needs submitit: pip install .*\[cluster\]"):
        import_cluster()
