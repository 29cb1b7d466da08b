"""How often FSDP reduces gradients, and whether a process keeps whole ones. By torch's own names, which are private."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FlatParameter, FSDPModule, FullyShardedDataParallel, _runtime_utils
from torch.distributed.fsdp._fully_shard import _fsdp_param_group


@contextmanager
def gradients_counted(facts: dict[str, Any]) -> Iterator[None]:
    """Micro-batches that were trained on, gradients that were reduced, and whole ones that a micro-batch left."""
    facts |= {"micro_batches": 0, "reductions": 0, "whole_gradients": 0}
    backward = Accelerator.backward

    def counted(reduce: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        facts["reductions"] += 1
        return reduce(*arguments, **options)

    def backward_and_look(accelerator: Accelerator, *arguments: Any, **options: Any) -> None:
        backward(accelerator, *arguments, **options)
        facts["micro_batches"] += 1
        facts["units"] = sum(map(trained_units, accelerator._models))
        facts["whole_gradients"] += sum(map(whole_gradients, accelerator._models))

    of_units = ((_fsdp_param_group, "foreach_reduce"), (_runtime_utils, "_reduce_grad"))  # FSDP 2, FSDP 1
    with ExitStack() as patches:
        for owner, name in of_units:
            patches.enter_context(mock.patch.object(owner, name, partial(counted, getattr(owner, name))))
        patches.enter_context(mock.patch.object(Accelerator, "backward", backward_and_look))
        yield


def sharded_units(model: torch.nn.Module) -> list[list[Any]]:
    """Of each unit that FSDP gathers and reduces at once, what it knows of its parameters: of FSDP 2 a list, of FSDP 1 one."""
    units: dict[int, list[Any]] = {}  # FSDP 2 gives one to several modules
    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
            units[id(group)] = group.fsdp_params
        if isinstance(module, FullyShardedDataParallel) and module._flat_param is not None:
            units[id(module)] = [module._flat_param]
    return list(units.values())


def trained_units(model: torch.nn.Module) -> int:
    return sum(any(getattr(p, "sharded_param", p).requires_grad for p in unit) for unit in sharded_units(model))


def whole_gradients(model: torch.nn.Module) -> int:
    """Gradients of more than this process's share that it still holds."""
    return sum(map(holds_whole_gradient, [parameter for unit in sharded_units(model) for parameter in unit]))


def holds_whole_gradient(parameter: Any) -> bool:
    if isinstance(parameter, FlatParameter):
        return parameter.grad is not None and parameter.grad.numel() > parameter._local_shard.numel()
    return parameter.unsharded_accumulated_grad is not None or parameter.unsharded_param.grad is not None
