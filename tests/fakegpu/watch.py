"""What is counted on the fake GPU: kernels, and what makes the host wait."""

import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from tests.fakegpu.device import GPU

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


class Watch(TorchDispatchMode):
    """Counts kernels and, by kind and place, what makes the host wait for the GPU; answers for numbers that do not exist.

    selected: how many places a mask is said to select.
    """

    def __init__(self, selected: int = 1) -> None:
        super().__init__()
        self.selected = selected
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def wait(self, kind: str) -> None:
        self.waits[f"{kind} at {place_of_call()}"] += 1

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        packet = operation.overloadpacket
        if packet in (aten.is_pinned, aten._pin_memory):
            return pinned(packet, args[0])
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = any(x.device.type == GPU for x in tensors)
        if packet in (aten._to_copy, aten.copy_) and is_blocking_copy(packet, args, kwargs):
            self.wait("copy")
        if packet is aten._local_scalar_dense and isinstance(args[0], FakeTensor):
            if on_gpu:
                self.wait("item")
            return made_up(args[0])
        if isinstance(args[0] if args else None, FakeTensor) and (kind := sizes_from_numbers(packet, args)) is not None:
            if on_gpu:
                self.wait(kind)
            return some_of_them(packet, args, self.selected)
        result = operation(*args, **kwargs)
        if launches(operation) and any(x.device.type == GPU for x in (*tensors, *tree_leaves(result)) if isinstance(x, Tensor)):
            self.launches[packet.__name__] += 1
        return result


def place_of_call() -> str:
    """The line that is waiting: the innermost one outside of torch and of this folder. Autograd's thread has none."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "/site-packages/torch/" not in path and Path(path).parent != Path(__file__).parent and not path.startswith("<"):
            return f"{path.rsplit('/site-packages/', 1)[-1].removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


def made_up(scalar: Tensor) -> bool | float | int:
    """No mask hides anything, every sum is one."""
    return False if scalar.dtype == torch.bool else 1.0 if scalar.is_floating_point() else 1


def as_list(tensor: Tensor) -> Any:
    """`tolist`, which is one copy, not one for each number."""
    tensor.cpu()
    with unset_fake_temporarily():
        return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()


def sizes_from_numbers(packet: Any, args: tuple) -> str | None:
    """What an operation is called if the size of its result is on the device, or the result itself goes to the host."""
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        is_mask = any(x is not None and x.dtype == torch.bool for x in args[1])
        return "boolean index" if is_mask else None
    return packet.__name__ if packet in (aten.nonzero, aten.masked_select, aten.equal) else None


def some_of_them(packet: Any, args: tuple, selected: int) -> Any:
    """What such an operation gives if a mask selects so many."""
    tensor = args[0]
    if packet is aten.nonzero:
        return tensor.new_empty((selected, tensor.ndim), dtype=torch.int64)
    if packet is aten.index:
        return tensor.new_empty((selected, *tensor.shape[sum(x.ndim for x in args[1] if x is not None) :]))
    if packet is aten.index_put:
        return torch.empty_like(tensor)
    return {aten.equal: True, aten.masked_select: tensor.new_empty(selected)}.get(packet, tensor)


def is_blocking_copy(packet: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the host waits until numbers have gone from one device to another."""
    target, source = (kwargs.get("device") or args[0].device, args[0]) if packet is aten._to_copy else (args[0].device, args[1])
    pair = {torch.device(target).type, source.device.type}
    non_blocking = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
    if pair != {"cpu", GPU} or (packet is aten.copy_ and source.ndim == 0):  # a scalar of the host is an argument
        return False
    return not (non_blocking and (source.device.type == GPU or source in PINNED))


PINNED = WeakIdKeyDictionary()


def pinned(packet: Any, tensor: Tensor) -> bool | Tensor:
    """Pinning, which asks for a GPU: a copy that is remembered."""
    if packet is aten.is_pinned:
        return tensor in PINNED
    copy = torch.empty_like(tensor)
    PINNED[copy] = True
    return copy


ALLOCATING = ("empty", "new_empty", "detach", "alias", "lift", "_unsafe_view", "_reshape_alias", "sym_", "is_", "device")


@cache
def launches(operation: Any) -> bool:
    """Whether an operation runs a kernel: it is no view and does more than allocate."""
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns)
    return not is_view and not operation.overloadpacket.__name__.startswith(ALLOCATING)
