"""Stand-ins for Slurm's commands: `install(folder)` writes sbatch, srun, sacct, scontrol and scancel.

As Slurm does: a job's script is run in the background, a requeued job runs it again under its number, and a signal goes to
every process of the step.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

STATE = "STAND_IN_SLURM"  # the folder of jobs


def install(folder: Path) -> None:
    """Commands in folder/bin, jobs in folder/jobs. The caller puts both into the environment."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)


def jobs() -> Path:
    return Path(os.environ[STATE])


def sbatch(script: str) -> None:
    number = len(list(jobs().glob("*.sh"))) + 1
    copy = jobs() / f"{number}.sh"
    copy.write_text(Path(script).read_text())
    output = (jobs() / f"{number}.out").open("ab")
    command = [sys.executable, __file__, "carry_out", str(number)]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    print(f"Submitted batch job {number}")


def carry_out(number: str) -> None:
    state, requeue = jobs() / f"{number}.state", jobs() / f"{number}.requeue"
    # Not every cluster hands on the environment of who submits.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SUBMITIT")}
    while True:
        state.write_text("RUNNING")
        done = subprocess.run(["bash", str(jobs() / f"{number}.sh")], env={**environment, "SLURM_JOB_ID": number})
        if not requeue.exists():
            break
        requeue.unlink()
    state.write_text("COMPLETED" if done.returncode == 0 else "FAILED")


def srun(*words: str) -> None:
    files = {}
    words = list(words)
    while words[0].startswith("--"):
        option = words.pop(0)
        if option in ("--output", "--error"):
            files[option] = words.pop(0).replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
    (jobs() / f"{os.environ['SLURM_JOB_ID']}.step").write_text(str(os.getpid()))
    environment = {**os.environ, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1"}
    with Path(files["--output"]).open("ab") as output, Path(files["--error"]).open("ab") as error:
        sys.exit(subprocess.run(words, env=environment, stdout=output, stderr=error).returncode & 0xFF)


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")
    for state in jobs().glob("*.state"):
        print(f"{state.stem}|{state.read_text()}|here")


def scontrol(action: str, number: str) -> None:
    assert action == "requeue"
    (jobs() / f"{number}.requeue").touch()


def scancel(number: str, option: str, name: str) -> None:
    assert option == "--signal"
    step = psutil.Process(int((jobs() / f"{number}.step").read_text()))
    for process in step.children(recursive=True):
        process.send_signal(signal.Signals[name if name.startswith("SIG") else f"SIG{name}"])


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
