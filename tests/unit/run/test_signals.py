"""A signal stops a run where nothing is lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import psutil
import pytest
import torch

from alignment.errors import TrainingStopped, UserError
from alignment.run.signals import FOR_THE_TERMINAL, STOPPING, RunInterrupted, StopSignals, outlast_signals

TERM, USR1, USR2, INT, HUP = STOPPING
each_signal = pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        signal.raise_signal(number)


def test_the_ends_that_schedulers_and_users_ask_for_are_listened_to():
    assert [number.name for number in STOPPING] == ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"]


@each_signal
def test_a_signal_ends_what_is_not_deferred_at_once_and_is_named(number):
    stop = StopSignals()
    with stop.listening(), pytest.raises(RunInterrupted, match=f"stopped by {number.name}, before training began"):
        send(number)
    assert stop.received == number


@each_signal
def test_a_deferred_signal_is_only_noted(number):
    stop = StopSignals()
    with stop.listening(), stop.deferred():
        assert stop.received is None
        send(number)
        assert stop.received == number


def test_after_what_was_deferred_a_signal_ends_at_once_again():
    stop = StopSignals()
    with stop.listening():
        with stop.deferred():
            send(TERM)
        with pytest.raises(RunInterrupted, match="SIGUSR1"):
            send(USR1)


def test_an_error_in_what_is_deferred_ends_the_deferral():
    stop = StopSignals()
    with stop.listening():
        with pytest.raises(ValueError, match="a bug"), stop.deferred():
            raise ValueError("a bug")
        with pytest.raises(RunInterrupted):
            send(TERM)


@each_signal
def test_the_handlers_of_before_are_back_afterwards(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with pytest.raises(RunInterrupted), StopSignals().listening():
            send(number)
        send(number)
    finally:
        signal.signal(number, before)
    assert seen == [number]


@each_signal
def test_other_signals_are_left_alone(number):
    others = set(signal.valid_signals()) - set(STOPPING)
    before = {other: signal.getsignal(other) for other in others}
    with StopSignals().listening():
        assert {other: signal.getsignal(other) for other in others} == before


@pytest.mark.parametrize("number", FOR_THE_TERMINAL)
def test_a_signal_of_the_terminal_that_came_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        stop = StopSignals()
        with stop.listening():
            send(number)
            assert signal.getsignal(number) == signal.SIG_IGN
        assert stop.received is None
    finally:
        signal.signal(number, before)


def test_what_a_scheduler_sends_is_listened_to_even_if_it_came_ignored():
    before = signal.signal(TERM, signal.SIG_IGN)
    try:
        with StopSignals().listening(), pytest.raises(RunInterrupted, match="SIGTERM"):
            send(TERM)
    finally:
        signal.signal(TERM, before)


def test_an_interruption_is_no_mistake_of_the_users():
    assert issubclass(RunInterrupted, TrainingStopped)
    assert not issubclass(RunInterrupted, UserError)


def exit_code(function: Callable[[], None]) -> int:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(20)
    code = process.exitcode
    process.kill()
    return code


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([INT, INT], 130),
        ([TERM, INT, INT], 130),
        ([INT], 7),
        ([TERM, TERM, TERM], 7),
        ([TERM, INT], 7),
        ([USR1, TERM], 7),
        ([USR2, USR1], 7),
    ],
    ids=lambda value: "+".join(number.name for number in value) if isinstance(value, list) else None,
)
def test_only_a_second_ctrl_c_ends_what_is_deferred(numbers, code):
    """A scheduler may repeat itself; who presses Ctrl-C twice does not want to wait."""

    def stubborn() -> None:
        stop = StopSignals()
        with stop.listening(), stop.deferred():
            send(*numbers)
            os._exit(7)

    assert exit_code(stubborn) == code


def test_a_signal_from_outside_is_noted_between_two_steps():
    stop = StopSignals()
    with stop.listening(), stop.deferred():
        sender = os.fork()
        if sender == 0:
            os.kill(os.getppid(), TERM)
            os._exit(0)
        end = time.monotonic() + 10
        while stop.received is None and time.monotonic() < end:
            time.sleep(0.001)
        os.waitpid(sender, 0)
    assert stop.received == TERM


class Slow(torch.utils.data.Dataset):
    """Rows that take their time."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        time.sleep(0.05)
        return index


@each_signal
def test_a_loaders_workers_outlive_what_stops_the_run(number):
    batches = iter(outlast_signals(torch.utils.data.DataLoader(Slow(), num_workers=2)))
    seen, workers = [next(batches).item()], multiprocessing.active_children()
    for worker in workers:
        subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    assert seen + [batch.item() for batch in batches] == list(range(8))
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


def test_a_process_that_exits_does_not_wait_for_the_workers_it_has_left():
    script = """
        from tests.unit.run.test_signals import Slow, outlast_signals, torch
        loader = outlast_signals(torch.utils.data.DataLoader(Slow(), num_workers=2, persistent_workers=True))
        batches = iter(loader)
        next(batches)
    """
    subprocess.run([sys.executable, "-c", dedent(script)], cwd=Path(__file__).parents[3], check=True, timeout=60)


def test_workers_end_with_a_process_that_was_killed():
    def killed(pids: multiprocessing.Queue) -> None:
        batches = iter(outlast_signals(torch.utils.data.DataLoader(Slow(), num_workers=2)))
        next(batches)
        pids.put([worker.pid for worker in multiprocessing.active_children()])
        time.sleep(60)

    pids = multiprocessing.get_context("fork").Queue()
    process = multiprocessing.get_context("fork").Process(target=killed, args=(pids,))
    process.start()
    workers = pids.get(timeout=20)
    process.kill()
    end = time.monotonic() + 20  # they look after their parent every 5 seconds
    while any(map(lives, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(lives, workers))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
