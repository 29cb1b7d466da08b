"""A run and its launcher: stopped without loss, whoever is asked to stop them."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from alignment.ablation.process import RunProcess, is_running, listens, workers
from tests.unit.ablation import stand_in

LAUNCH = [sys.executable, stand_in.__file__, "launch"]


def begun(folder: Path, steps: int = 400) -> RunProcess:
    """A run that has taken some steps."""
    process = RunProcess([*LAUNCH, str(folder / "run"), str(steps)], folder / "log.txt")
    wait_for(folder / "run" / "steps")
    return process


def wait_for(file: Path) -> None:
    end = time.monotonic() + 20
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_launcher_outlives_what_a_scheduler_sends_to_every_process(number, tmp_path):
    process = begun(tmp_path)
    (run,) = workers(process.process.pid)
    for each in (process.process.pid, run.pid):
        os.kill(each, number)
    assert process.wait() == 1  # that of a launcher whose run exits with 75; minus the signal, if it had died
    assert f"stopped by {number.name}" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_run_that_is_stopped_saves_and_goes_on_where_it_was(number, tmp_path):
    process = begun(tmp_path)
    process.stop(20, number)
    assert process.status() == 1
    saved = int((tmp_path / "run" / "steps").read_text())
    again = RunProcess([*LAUNCH, str(tmp_path / "run"), str(saved + 2)], tmp_path / "log.txt")
    assert again.wait() == 0
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines == ["begins behind step 0", f"stopped by {number.name} after step {saved}", f"begins behind step {saved}"]


def test_a_run_that_does_not_listen_yet_is_ended_at_once(tmp_path):
    slow = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)']).returncode)"
    process = RunProcess([sys.executable, "-c", slow], tmp_path / "log.txt")
    end = time.monotonic() + 20
    while not workers(process.process.pid) and time.monotonic() < end:
        time.sleep(0.02)
    begin = time.monotonic()
    process.stop(30)
    assert process.status() != 0
    assert time.monotonic() - begin < 10


def test_a_run_that_does_not_end_is_killed_when_patience_is_over(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); print('listens', flush=True); time.sleep(60)"
    launch = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}], check=True)"
    process = RunProcess([sys.executable, "-c", launch], tmp_path / "log.txt")
    wait_for(tmp_path / "log.txt")
    (run,) = workers(process.process.pid)
    process.stop(0.5)
    assert process.status() not in (None, 0)  # killed, or by then gone over its killed run
    assert not is_running(run.pid)


def test_a_process_listens_where_it_has_a_handler():
    assert listens(os.getpid(), signal.SIGINT)
    assert not listens(os.getpid(), signal.SIGUSR2)
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert listens(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
