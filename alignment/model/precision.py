"""The type that weights are saved in, and the model that is then evaluated: the rounded one.

Training keeps float32 master weights, also of a checkpoint in bfloat16; what is left at its end has the checkpoint's type.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

HALF = ("float16", "bfloat16", "float32")
STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float32"}


def checkpoint_dtype(came: dict[str, Any], name: str | None = None, revision: str | None = None) -> str | None:
    """The type of a checkpoint's weights, by its config or, where that is silent, by most of its tensors; None: unknown.

    came: its config.json. name: folder or Hub name of the weights.
    """
    parts = [came, *(part for part in came.values() if isinstance(part, dict))]
    stated = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    if (dtype := next((value for value in stated if value in HALF), None)) is not None or not name:
        return dtype
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    path = cached_file(name, SAFE_WEIGHTS_NAME, **options)
    if path is None and (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)) is not None:
        path = next(iter(sorted(Path(index).parent.glob("*.safetensors"))), None)
    if path is None:
        return None
    with safe_open(path, framework="pt") as file:
        kinds = Counter(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
    return STORED.get(kinds.most_common(1)[0][0])


def keeps_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's own code wants a tensor in float32, whatever the others are in."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return any(part in name for part in kept)


def in_dtype(state: dict[str, Tensor], dtype: torch.dtype, model: PreTrainedModel) -> dict[str, Tensor]:
    """Floating tensors in `dtype`; what was one tensor under two names stays one."""
    done: dict[tuple[int, torch.Size], Tensor] = {}

    def cast(name: str) -> Tensor:
        tensor = state.pop(name)  # a gathered model is not held twice
        if not tensor.is_floating_point() or keeps_float32(model, name):
            return tensor
        key = (tensor.data_ptr(), tensor.shape)
        if key not in done:
            done[key] = tensor.to(dtype)
        return done[key]

    return {name: cast(name) for name in list(state)}


class Rounded:
    """Parameters that hold, in their own type, the values that `dtype` can; and what they held before, to take back.

    Of each process its own part, whatever the strategy. Gradients are gone when training is over: theirs is the room.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, dtype: torch.dtype, whole: PreTrainedModel):
        self.before: list[tuple[Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            held = held_part(parameter)
            if held.is_floating_point() and held.dtype != dtype and not keeps_float32(whole, name):
                self.before.append((held, held.clone()))
                held.copy_(held.to(dtype))

    @torch.no_grad()
    def undo(self) -> None:
        for held, value in self.before:
            held.copy_(value)
        self.before.clear()


def held_part(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter, to be changed in place."""
    if isinstance(parameter.data, DTensor):
        return parameter.data.to_local()
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data
