"""What a launcher starts for the tests: several runs, one after the other, in the same processes.

A job is a command line and, where it needs them, variables of the environment and a sabotage. Each process writes what it saw
of each run to facts-RANK.json beside the jobs.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import load_file

import alignment.model.adapters
import alignment.preference.trainer
from alignment.errors import TrainingStopped, UserError
from alignment.launch.strategy import ShardingCheck, local_size, strategy_of
from alignment.model import head
from alignment.model.layers import recomputable_layers
from alignment.pipeline import run
from alignment.preference import fitting
from alignment.preference.trainer import PairTrainer
from scripts.simpo_trainer import SimPOTrainer
from tests.distributed import cpu_fsdp
from tests.distributed.gradients import gradients_counted
from tests.methods import METHODS


def shard_small_parameters() -> None:
    """ZeRO-3 would never part with tensors as small as a test model's."""
    build = DeepSpeedPlugin.__post_init__

    def plugin(self) -> None:
        build(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = plugin


def observed(facts: dict[str, Any], owner: Any, name: str, see: Callable[..., dict[str, Any]]) -> Any:
    """owner.name, noting what `see` makes of its result and arguments."""
    original = getattr(owner, name)

    def observer(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        facts.update(see(result, *arguments))
        return result

    return mock.patch.object(owner, name, observer)


def loaded(model: torch.nn.Module, path: str) -> dict[str, Any]:
    """How many of the checkpoint's matrices this process has read, and how many numbers it holds."""
    weights = {name: tensor for name, tensor in load_file(Path(path) / "model.safetensors").items() if tensor.ndim == 2}
    parameters = dict(model.named_parameters())
    read = [name for name in weights.keys() & parameters.keys() if torch.equal(parameters[name], weights[name])]
    return {"read": len(read), "held": sum(local_size(p) for p in model.parameters())}


def scored(scores: Any, *_: Any) -> dict[str, Any]:
    return {"logps": str(scores.chosen_mean_logp.dtype)}


def prepared(_: None, check: ShardingCheck, *__: Any) -> dict[str, Any]:
    model = check.trainer.model
    return {
        "held_in_training": sum(local_size(parameter) for parameter in model.parameters()),
        "moments_resumed": len(innermost(check.trainer.optimizer).state),
    }


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def frequencies(model: torch.nn.Module) -> list[str]:
    """Types of the rotary frequencies, once FSDP has set the types of its buffers."""
    return sorted({str(buffer.dtype) for name, buffer in model.named_buffers() if name.endswith("inv_freq")})


def rewind(source: str, target: str, step: int) -> None:
    """Make of a finished run's folder what a run that was killed behind its checkpoint of `step` leaves."""
    if os.environ["RANK"] == "0":
        shutil.copytree(source, target)
        for path in Path(target).iterdir():
            if path.name in ("model.safetensors", "adapter_model.safetensors", "status.json"):
                path.unlink()
            if path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
    torch.distributed.barrier()


def master_dtypes(trainer: SimPOTrainer) -> list[str]:
    """Of the numbers that the optimizer's steps are added to."""
    optimizer = trainer.optimizer.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # DeepSpeed, stages 3 and 2
        if hasattr(optimizer, name):
            return sorted({str(tensor.dtype) for tensor in getattr(optimizer, name)})
    return sorted({str(parameter.dtype) for group in optimizer.param_groups for parameter in group["params"]})


GPU_HEAD_CHUNK = 16  # tokens of an adapted head


@contextmanager
def gpu_head(facts: dict[str, Any]) -> Iterator[None]:
    """TRL's head, as on a GPU, through its torch path; adapted heads in chunks so small that processes have unequally many."""
    facts["scored"] = []
    spied = observed(facts, head, "head_logps", lambda result, *_: facts["scored"].append(len(result[0])) or {})
    with (
        mock.patch.object(head, "has_fused_kernel", return_value=True),
        mock.patch.object(head, "CUDA_VOCABULARY", 100),  # of 512 words
        mock.patch.object(head, "ADAPTED_TOKENS", GPU_HEAD_CHUNK),
        spied,
    ):
        yield


KEPT, RECOMPUTED = 1000, 100  # bytes of a token in a layer that is kept, and in one that is recomputed


class TwoLayers:
    """A model of memory by hand."""

    def largest(self, available: float, recomputed: int) -> int:
        return int(available / (recomputed * RECOMPUTED + (2 - recomputed) * KEPT))

    def peak(self, tokens: int, recompute_layers: int) -> Any:
        return SimpleNamespace(optimizer=0)


@contextmanager
def on_gpus(facts: dict[str, Any], rooms: list[int]) -> Iterator[None]:
    """As on GPUs of so many bytes, of which only the first process can make an estimate."""
    rank = int(os.environ["RANK"])
    facts["trials"] = 0

    def estimate(plan: Any) -> TwoLayers:
        if rank != 0:
            raise ValueError("no memory on this machine for a child process")
        return TwoLayers()

    def tried(*_: Any) -> dict[str, Any]:
        return {"trials": facts["trials"] + 1}

    with (
        mock.patch.object(fitting, "is_gpu", return_value=True),
        mock.patch.object(fitting, "estimate", estimate),
        mock.patch.object(fitting, "room_bytes", return_value=rooms[rank]),
        mock.patch.object(fitting, "start_measuring"),
        mock.patch.object(fitting, "most_bytes", return_value=0),
        observed(facts, fitting.FittedSteps, "try_out", tried),
    ):
        yield


def carry_out(job: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if "rewind" in job:
        rewind(**job["rewind"])
    sabotage = SABOTAGES[job.get("sabotage")]
    with (
        mock.patch.dict(os.environ, job.get("environment", {})),
        gradients_counted(facts),
        gpu_head(facts) if job.get("gpu_head") else nullcontext(),
        on_gpus(facts, job["rooms"]) if "rooms" in job else nullcontext(),
        observed(facts, alignment.preference.trainer, "load_policy", loaded),
        observed(facts, alignment.model.adapters, "load_policy", loaded),
        observed(facts, PairTrainer, "concatenated_forward", lambda scores, *_: scored(scores)),
        observed(facts, ShardingCheck, "on_train_begin", prepared),
        sabotage(),
    ):
        try:
            trainer = run(METHODS[job.get("method", "simpo")], job["argv"])
        except (TrainingStopped, UserError) as error:
            return {**facts, "stopped": str(error)}
    return {
        **facts,
        "strategy": strategy_of(trainer.accelerator),
        "processes": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "frequencies": frequencies(trainer.model),
        "master": master_dtypes(trainer),
        "recomputed": sum(layer.gradient_checkpointing for layer in recomputable_layers(trainer.model)),
        "division": trainer.division,
        "parameters": trainer.parameters,
    }


# ---- Sabotages ----


def disk_full_at_the_end() -> Any:
    """Only the first process writes, and it cannot."""

    def save(trainer: SimPOTrainer, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if trainer.args.should_save:
            raise OSError(28, "No space left on device")

    return mock.patch.object(SimPOTrainer, "_save", save)


def no_room_for_shards_either() -> Any:
    """The file that a shard is written to is a full device."""
    stack = ExitStack()
    stack.enter_context(disk_full_at_the_end())

    def write_bytes(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    stack.enter_context(mock.patch("torch.distributed.checkpoint.filesystem._write_files_from_queue", write_bytes))
    stack.enter_context(mock.patch("deepspeed.runtime.engine.DeepSpeedEngine.save_checkpoint", write_bytes))
    return stack


def stopped_in_training() -> Any:
    """The second process stands still in its second step."""
    step = SimPOTrainer.training_step

    def training_step(trainer: SimPOTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        if trainer.state.global_step == 1 and trainer.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(trainer, *arguments, **options)

    return mock.patch.object(SimPOTrainer, "training_step", training_step)


SABOTAGES = {
    None: lambda: mock.patch.dict(os.environ),
    "disk full at the end": disk_full_at_the_end,
    "no room for shards either": no_room_for_shards_either,
    "stopped in training": stopped_in_training,
}


def main(jobs: Path) -> None:
    if "ACCELERATE_USE_FSDP" in os.environ:
        cpu_fsdp.allow()
    shard_small_parameters()
    facts = {name: carry_out(job) for name, job in json.loads(jobs.read_text()).items()}
    (jobs.parent / f"facts-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that is taken down with them


if __name__ == "__main__":
    main(Path(sys.argv[1]))
