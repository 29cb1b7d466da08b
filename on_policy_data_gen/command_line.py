"""What the entry points share: arguments in, one message and an exit status out."""

import logging
import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import datasets
import huggingface_hub.constants
import transformers
from accelerate import PartialState

from alignment.launch.launch import leave_launch, start_process_group
from alignment.recipe.parser import H4ArgumentParser
from alignment.run.failures import told
from alignment.run.output import log_to_stdout, outlast_readers

# Processes wait for the slowest, whatever it has to do, and a launcher ends them all where one fails.
PATIENCE = timedelta(days=7)
AGAIN = "What is finished is kept; the same command goes on."


def run_command(kinds: Sequence[type], work: Callable[..., None], argv: Sequence[str] | None = None) -> None:
    """Call work(one object of each kind); exit with 2 for a user's mistake, 1 where it had to stop, 75 where it was stopped."""
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    outlast_readers()
    with told(AGAIN):
        parser = H4ArgumentParser(kinds)
        settings = parser.parse(argv)
        start_processes(use_cpu=any(getattr(part, "use_cpu", False) for part in settings))
        set_up_logging()
        for notice in parser.notices:
            logging.getLogger(__name__).info(notice)
        work(*settings)
    leave_launch()


def start_processes(*, use_cpu: bool) -> None:
    """Join the launch's processes, if there are several."""
    start_process_group(PATIENCE.total_seconds(), os.environ, use_cpu=use_cpu)
    PartialState(cpu=use_cpu, **({"timeout": PATIENCE} if "LOCAL_RANK" in os.environ else {}))


def set_up_logging() -> None:
    log_to_stdout()
    is_main = PartialState().is_main_process
    for name in ("alignment", "eval", "on_policy_data_gen", "scripts", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if is_main else logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    if not is_main:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
