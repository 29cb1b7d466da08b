"""For tests only: FSDP on CPU processes. accelerate shards on GPUs only, and makes plain DDP of FSDP on a CPU."""

from unittest import mock

import torch
from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, dataclasses
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, _init_utils


def allow() -> None:
    """From now on a launcher's FSDP settings count on CPU processes too, through gloo."""
    let_accelerate_shard()
    let_fsdp1_broadcast_from_the_first_process()
    keep_fsdp1_states_where_they_are()


def let_accelerate_shard() -> None:
    build_partial, build_state = state.PartialState.__init__, state.AcceleratorState.__init__

    def partial(self, cpu: bool = False, **options) -> None:
        build_partial(self, cpu=True, **options)
        shared = state.PartialState._shared_state
        if shared["distributed_type"] == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU  # backend and device stay gloo and cpu
        shared["device"] = torch.device("cpu")  # cpu:0, accelerate's choice, is another device to FSDP

    def accelerator_state(self, *arguments, **options) -> None:
        state.PartialState(cpu=True)
        build_state(self, *arguments, **options)

    state.PartialState.__init__ = partial
    state.AcceleratorState.__init__ = accelerator_state


def let_fsdp1_broadcast_from_the_first_process() -> None:
    """sync_module_states, which loading on one process needs, asks for a GPU in accelerate and again in torch."""
    build_plugin = FullyShardedDataParallelPlugin.__post_init__

    def plugin(self) -> None:
        with (
            mock.patch.object(dataclasses, "is_cuda_available", return_value=True),
            mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
        ):
            build_plugin(self)

    FullyShardedDataParallelPlugin.__post_init__ = plugin
    _init_utils._check_module_states_for_sync_module_states = lambda states: None


def keep_fsdp1_states_where_they_are() -> None:
    """On a CPU the offloaded copy of a state is the state itself, which FSDP then frees: a segmentation fault."""
    for config in (FullStateDictConfig, FullOptimStateDictConfig):
        config.offload_to_cpu = property(lambda self: False, lambda self, value: None)
