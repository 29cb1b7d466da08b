"""A GPU without one: fake tensors on a device of torch's PrivateUse1 kind, which a build for CPUs lets Python make up.

Shapes, types, devices and strides are those of a GPU, numbers there are none. Torch cannot be taken back from it, so
`set_up` belongs in a process of its own: see tests/gpu_path.py.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

GPU = "gpu"
HALVES = (torch.bfloat16, torch.float16)


@cache
def set_up() -> torch.device:
    """From now on there is such a device, for fake tensors only. For the rest of the process."""
    backend_registration._setup_privateuseone_for_python_backend(rename=GPU)
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # torch.tensor(..., device=GPU)
    FakeTensor.is_cuda = property(lambda self: self.device.type == GPU)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.gpu.get_amp_supported_dtype = lambda: list(HALVES)
    torch.gpu.get_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    torch.gpu.set_rng_state = lambda *_, **__: None
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        setattr(torch, name, partial(asked_of_the_gpu, getattr(torch, name)))
    keep_autocast_rules()
    return torch.device(GPU, 0)


def asked_of_the_gpu(ask: Callable[..., Any], device_type: str | None = None) -> Any:
    """What is asked about cuda by its name."""
    return ask() if device_type is None else ask(GPU if device_type == "cuda" else device_type)


# Operations of a decoder's layers that autocast computes in half precision on CUDA, where PrivateUse1 has no rules.
HALVED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")
LIBRARIES: list[torch.library.Library] = []  # a rule is gone with its library


def keep_autocast_rules() -> None:
    """Autocast on this device as on CUDA."""
    rules, rest = (torch.library.Library(name, "IMPL", "AutocastPrivateUse1") for name in ("aten", "_"))
    rest.fallback(torch.library.fallthrough_kernel)
    for name in HALVED:
        rules.impl(name, partial(in_half_precision, getattr(torch.ops.aten, name).default))
    LIBRARIES.extend((rules, rest))


def in_half_precision(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(GPU)

    def cast(value: Any) -> Any:
        is_wide = isinstance(value, Tensor) and value.device.type == GPU and value.dtype in (torch.float32, *HALVES)
        return value.to(dtype) if is_wide else value

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return operation(*tree_map(cast, args), **tree_map(cast, kwargs))


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """The model there, in place. `Module.to` would have to swap real tensors with fake ones."""
    there: dict[int, Tensor] = {}  # tied weights stay one
    for module in model.modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and id(tensor) not in there:
                copy = torch.empty_like(tensor, device=device)
                is_weight = isinstance(tensor, nn.Parameter)
                there[id(tensor)] = nn.Parameter(copy, requires_grad=tensor.requires_grad) if is_weight else copy
            kept = module._parameters if name in module._parameters else module._buffers
            kept[name] = tensor if tensor is None else there[id(tensor)]
    return model


def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with real numbers: what a collator or a layout computes before anything goes to a GPU."""

    def real(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return real
