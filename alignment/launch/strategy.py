"""How a run is spread over processes: what the libraries made of the launch, and the whole model at its end."""

import logging
import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate import Accelerator
from accelerate.utils import DistributedType, save_fsdp_model
from peft import PeftModel, peft_model
from peft.tuners import tuners_utils
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import TrainingStopped, UserError
from .launch import launcher_strategy, refuse_replacement

logger = logging.getLogger(__name__)

WHOLE_COPY = "DDP or one process"
SHARDS = "shards"  # folder in output_dir, if the whole model cannot be written


# ---- Before training ----


def take_strategy(trainer: Trainer) -> None:
    """Check what accelerate made of the launch, correct its numbers, and have the shards checked as soon as they exist."""
    accelerator = trainer.accelerator
    refuse_replacement(launcher_strategy(os.environ), trainer.args.strategy, strategy_of(accelerator))
    if accelerator.distributed_type == DistributedType.FSDP:
        reduce_in_float32(accelerator.state.fsdp_plugin)
        if accelerator.state.fsdp_plugin.fsdp_version == 1 and isinstance(trainer.model, PeftModel):
            keep_fsdp1_adapters()
    trainer.add_callback(ShardingCheck(trainer))


def strategy_of(accelerator: Accelerator) -> str:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return "ddp" if accelerator.num_processes > 1 else "single"


def layout(accelerator: Accelerator) -> str:
    """How a checkpoint is divided among files: what has to be equal for one launch to read another's."""
    strategy = strategy_of(accelerator)
    if strategy in ("single", "ddp"):
        return WHOLE_COPY
    if strategy.startswith("zero"):
        return strategy.replace("zero", "DeepSpeed ZeRO-")
    return f"{strategy.upper()} {accelerator.state.fsdp_plugin.state_dict_type.name}"


def reduce_in_float32(plugin: Any) -> None:
    """bf16 for the parameters that compute, and for nothing else.

    accelerate would also round gradients before they are summed over processes; under FSDP 2 the log-probabilities that the
    model returns, which then move in steps of 0.03; under FSDP 1 the rotary frequencies, which at token 2,000 is another
    position.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        others = {"output_dtype": None} if plugin.fsdp_version == 2 else {"buffer_dtype": torch.float32}
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, **others)


def keep_fsdp1_adapters() -> None:
    """Save and resume adapters under FSDP 1, where peft 0.21 loses them without a word.

    It looks for them under the names that FSDP gives to modules, finds none and saves an empty file; for the names of layers
    that are trained whole it gathers them, on the one process that saves, which waits for the others for ever; and when a
    checkpoint is loaded, every process but the first keeps the adapter it started with. So checkpoints hold the whole model
    instead.
    """
    wrapped_prefixes = tuners_utils._get_tuner_state_dict_key_prefixes

    def prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
        return {name.replace("_fsdp_wrapped_module.", "") for name in wrapped_prefixes(model, adapter_name)}

    adapter_state = peft_model.get_peft_model_state_dict

    def whole_adapter_state(model: nn.Module, state_dict: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        return adapter_state(model, state_dict, **options) | modules_to_save(state_dict, options["adapter_name"])

    tuners_utils._get_tuner_state_dict_key_prefixes = prefixes
    peft_model.get_peft_model_state_dict = whole_adapter_state
    ModulesToSaveWrapper.adapter_state_dict = lambda self, adapter_name, state_dict: {}
    transformers.trainer.get_fsdp_ckpt_kwargs = dict


def modules_to_save(state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Of a whole model's weights those of layers that are trained whole, named as in an adapter's file."""
    inner = f".modules_to_save.{adapter_name}."
    return {name.replace(inner, "."): weight for name, weight in state_dict.items() if inner in name}


class ShardingCheck(TrainerCallback):
    """Stops a run whose parameters are not divided as its strategy says; logs how they are."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        strategy = strategy_of(self.trainer.accelerator)
        if problem := sharding_problem(self.trainer, strategy):
            raise UserError(f"strategy {strategy}: {problem}")
        held = sum(local_size(parameter) for parameter in self.trainer.model.parameters())
        logger.info(
            "Strategy: %s, %d processes, %s; %.4g million parameters on this one.",
            strategy, args.world_size, args.device.type, held / 1e6,
        )  # fmt: skip


def sharding_problem(trainer: Trainer, strategy: str) -> str | None:
    """How the prepared model differs from what the strategy means; None if it does not."""
    if strategy == "ddp" and not isinstance(trainer.model_wrapped, DistributedDataParallel):
        return f"the model is wrapped in {type(trainer.model_wrapped).__name__}, and gradients would not be averaged"
    if strategy.startswith("zero") and strategy != f"zero{trainer.deepspeed.zero_optimization_stage()}":
        return f"DeepSpeed runs stage {trainer.deepspeed.zero_optimization_stage()}"
    if strategy == "fsdp1":
        units = FullyShardedDataParallel.fsdp_modules(trainer.model)
        kept_whole = [unit for unit in units if unit.sharding_strategy == ShardingStrategy.NO_SHARD]
        return "parameters are not sharded" if not units or (kept_whole and trainer.args.world_size > 1) else None
    whole = [name for name, parameter in trainer.model.named_parameters() if is_whole(parameter, strategy)]
    return f"{len(whole)} parameters are not sharded, {whole[0]} first" if whole else None


def is_whole(parameter: nn.Parameter, strategy: str) -> bool:
    """Whether a process holds all of a parameter that the strategy divides."""
    if strategy == "zero3":
        return not hasattr(parameter, "ds_tensor")
    # accelerate leaves 4-bit weights whole unless bnb_4bit_quant_storage is a floating type.
    return strategy == "fsdp2" and not isinstance(parameter, DTensor) and type(parameter).__name__ != "Params4bit"


def local_size(parameter: nn.Parameter) -> int:
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


# ---- The end ----


def save_whole_model(trainer: Trainer) -> None:
    """Weights in one piece in output_dir, loadable by from_pretrained, whatever the strategy. Called by every process.

    Raises TrainingStopped on all of them if that fails on one; the shards are then in output_dir, with the command that puts
    them together.
    """
    gather_when_saved(trainer)
    problem = None
    try:
        trainer.save_model(_internal_call=True)  # push_to_hub comes last, when card and figures are written
        if trainer.is_world_process_zero():
            problem = missing_weights(Path(trainer.args.output_dir))
    except (OSError, RuntimeError, ValueError, MemoryError, SafetensorError) as error:
        problem = str(error) or type(error).__name__
    failed = torch.tensor([problem is not None], device=trainer.args.device)
    if trainer.accelerator.reduce(failed.int(), reduction="sum") > 0:
        raise TrainingStopped(
            f"the trained model could not be saved in one piece: {problem or 'another process failed'}. {save_shards(trainer)}"
        )


def gather_when_saved(trainer: Trainer) -> None:
    """Launcher settings that leave a model in shards hold for checkpoints, not for the end."""
    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = True


def missing_weights(output_dir: Path) -> str | None:
    """What is wrong with the saved weights, as far as their headers tell."""
    for path in output_dir.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            if not weights.keys():
                return f"{path.name} is empty"
    return None if any(output_dir.glob("*.safetensors")) else "no weights were written"


def save_shards(trainer: Trainer) -> str:
    """Every process's part of the model, into output_dir/shards. Returns what to tell about it."""
    accelerator, output_dir = trainer.accelerator, Path(trainer.args.output_dir)
    folder, model = output_dir / SHARDS, accelerator.unwrap_model(trainer.model)
    divided = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if not divided or isinstance(model, PeftModel):
        return "The last checkpoint is as it was."
    try:
        command = write_shards(trainer, folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        shutil.rmtree(folder, ignore_errors=True)
        return f"Nor could its shards ({failures[0]}). The last checkpoint is as it was."
    return f"Its shards are in {folder}; with room for it, put them together: {shlex.join(map(str, command))}"


def write_shards(trainer: Trainer, folder: Path) -> list[Any]:
    """The model's parts, and beside `folder` what a model needs besides. Returns the command that puts them together."""
    accelerator, output_dir = trainer.accelerator, folder.parent
    if trainer.is_world_process_zero():
        trainer.save_beside(output_dir)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        trainer.deepspeed.save_checkpoint(str(folder))
        return [sys.executable, folder / "zero_to_fp32.py", folder, output_dir, "--safe_serialization"]
    plugin = accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    save_fsdp_model(plugin, accelerator, trainer.model, str(folder))
    return ["accelerate", "merge-weights", folder / "pytorch_model_fsdp_0", output_dir]
