"""What a launch asks for, and whether the libraries will do it, before anything is loaded.

accelerate replaces what it cannot do without a word: FSDP on a CPU becomes DDP, `accelerate launch --cpu` starts one process
however many were asked for. A run that would not be what it was asked to be stops here.
"""

import atexit
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed
from accelerate import PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from torch.utils.cpp_extension import get_default_build_root
from transformers import TrainingArguments

from ..errors import UserError

logger = logging.getLogger(__name__)

STRATEGIES = ("single", "ddp", "zero2", "zero3", "fsdp1", "fsdp2")
LAUNCHERS = {
    "single": "single_gpu.yaml, or cpu.yaml --cpu --num_processes=1",
    "ddp": "multi_gpu.yaml, or cpu.yaml",
    "zero2": "deepspeed_zero2.yaml",
    "zero3": "deepspeed_zero3.yaml",
    "fsdp1": "fsdp.yaml",
    "fsdp2": "fsdp2.yaml",
}
LAUNCH_COMMANDS = ("accelerate.commands.launch", "accelerate/commands/launch.py", "accelerate-launch")
COMPILING_SECONDS = 300  # an operator of DeepSpeed takes one or two minutes


def start_process_group(timeout: float, environment: Mapping[str, str], *, use_cpu: bool) -> None:
    """Join this launch's CPU processes, so that waiting for one that hangs ends after `timeout` seconds.

    On GPUs TrainingArguments does it, with ddp_timeout; on a CPU it forgets the timeout, and a stopped process held the others
    until they were killed by hand.
    """
    on_cpu = use_cpu or is_true("ACCELERATE_USE_CPU", environment)
    if on_cpu and "LOCAL_RANK" in environment and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def leave_launch() -> None:
    """The end of a process that did what it was to do; returns only where it is the only one.

    Python would take gloo's threads down with it, which now and then abort the process, and with it a launch that succeeded.
    """
    state = PartialState()
    state.destroy_process_group()
    if state.num_processes == 1:
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def check_launch(args: TrainingArguments, environment: Mapping[str, str]) -> None:
    """Raises UserError if this launch is not what the launcher or the recipe (strategy, num_processes) asks for."""
    processes = args.distributed_state.num_processes
    launched = int(environment.get("WORLD_SIZE", "1"))
    if processes != launched:
        raise UserError(f"{launched} processes were launched and each takes itself for the only one: on a CPU add --use_cpu")
    wanted = {"num_processes": args.num_processes, "the launcher's num_processes": launcher_processes(environment)}
    for place, number in wanted.items():
        if number not in (None, processes):
            raise UserError(
                f"{place} = {number}: {processes} started. Give the launcher --num_processes={number}; on a CPU with "
                "--config_file accelerate_configs/cpu.yaml, because `--cpu` and MULTI_CPU start one process without a word"
            )
    got = foreseen(args.distributed_state.distributed_type, processes, environment)
    refuse_replacement(launcher_strategy(environment), args.strategy, got)
    state_dict = environment.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    if got == "fsdp1" and state_dict != "FULL_STATE_DICT":
        raise UserError(
            f"fsdp_state_dict_type = {state_dict}: FSDP 1 would resume with an empty optimizer, without a word; set it "
            "to FULL_STATE_DICT in the launch config, or launch with accelerate_configs/fsdp2.yaml"
        )


def launcher_strategy(environment: Mapping[str, str]) -> str | None:
    """zero2, fsdp1, ...: what the launcher's variables ask for; None where they leave it at plain processes."""
    if is_true("ACCELERATE_USE_DEEPSPEED", environment):
        return f"zero{zero_stage(environment)}"
    if is_true("ACCELERATE_USE_FSDP", environment):
        return f"fsdp{environment.get('FSDP_VERSION', '1')}"
    return None


def zero_stage(environment: Mapping[str, str]) -> int:
    config_file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if config_file == "none":
        return int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return json.loads(Path(config_file).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)


def launcher_processes(environment: Mapping[str, str]) -> int | None:
    """How many processes the `accelerate launch` that started this one was asked for; None without it, or if it did not say.

    Where it starts several, WORLD_SIZE says how many. Where it starts one, only its own command line tells.
    """
    if "WORLD_SIZE" in environment:
        return None
    try:
        launcher = psutil.Process().parent()
        command = [] if launcher is None else launcher.cmdline()  # None for a container's first process
    except psutil.Error:
        return None
    starts = [number + 1 for number, word in enumerate(command) if word.endswith(LAUNCH_COMMANDS)]
    starts += [number + 2 for number, word in enumerate(command) if Path(word).name == "accelerate"]
    if not starts:
        return None
    asked, _ = launch_command_parser().parse_known_args(command[min(starts) :])
    if asked.num_processes is not None:
        return asked.num_processes
    config_file = asked.config_file or (default_config_file if Path(default_config_file).is_file() else None)
    return load_config_from_file(config_file).num_processes if config_file else None


def foreseen(distributed_type: DistributedType, processes: int, environment: Mapping[str, str]) -> str:
    """The strategy that accelerate is going to make of this launch, by its own rules."""
    asked = launcher_strategy(environment)
    if asked is not None and asked.startswith("zero") and not is_true("ACCELERATE_USE_CPU", environment):
        return asked
    on_gpus = distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)
    if asked is not None and asked.startswith("fsdp") and on_gpus:
        return asked
    return "ddp" if processes > 1 else "single"


def refuse_replacement(by_launcher: str | None, by_recipe: str | None, got: str) -> None:
    if by_launcher not in (None, got):
        reason = (
            "ACCELERATE_USE_CPU is set; unset it, and give --use_cpu"
            if by_launcher.startswith("zero")
            else "accelerate shards with FSDP on GPUs only; on a CPU launch with accelerate_configs/cpu.yaml"
        )
        raise UserError(f"the launcher asks for {by_launcher} and the run would silently be {got}: {reason}")
    if by_recipe not in (None, got):
        raise UserError(
            f"strategy = {by_recipe}: this launch is {got}; launch with --config_file accelerate_configs/{LAUNCHERS[by_recipe]}"
        )


def receives_weights(environment: Mapping[str, str]) -> bool:
    """Whether FSDP is going to fill this process's model with the first one's weights, so that it need not read them."""
    promised = is_true("ACCELERATE_USE_FSDP", environment) and is_true("FSDP_CPU_RAM_EFFICIENT_LOADING", environment)
    return promised and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0


def is_true(name: str, environment: Mapping[str, str]) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")


def outwait_compilers(environment: Mapping[str, str]) -> None:
    """Return when no lock is left of a process that compiles an operator of DeepSpeed: released, or too old to be held.

    DeepSpeed compiles when an operator is first used: on a CPU always, on GPUs if the optimizer is offloaded. The lock is a
    file that a killed process leaves behind, and every later launch would wait for it to go away.
    """
    if not (launcher_strategy(environment) or "").startswith("zero"):
        return
    root = Path(environment.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.rglob("lock"):
        logger.info("%s: waiting for the process that compiles this; %d s at most.", lock.parent, COMPILING_SECONDS)
        with suppress(FileNotFoundError):  # released
            while time.time() - lock.stat().st_mtime < COMPILING_SECONDS:
                time.sleep(1)
            lock.unlink()
