"""How fast a run trains, counted in tokens that had to be computed: distinct ones, each shared prompt once."""

import time

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import get_peak_flops

from ..run.guards import peak_memory_gb
from .collate import TokenCounts


class Throughput:
    """Tokens and seconds since the last log. Seconds run from the first micro-batch of a step to the end of the step.

    step_flops: see `dense_flops`. is_packed: whether batches hold each distinct token once.
    """

    def __init__(self, step_flops: tuple[float, float] | None, device: torch.device, *, is_packed: bool):
        self.step_flops = step_flops
        self.is_packed = is_packed
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_flops = get_peak_flops(name, "bfloat16") if name else None
        self.device = device
        self.counts: list[TokenCounts] = []
        self.seconds = 0.0
        self.started = time.perf_counter()

    def start_step(self) -> None:
        self.started = time.perf_counter()

    def end_step(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def state(self) -> list[float]:
        """This process's distinct, padded and scored tokens, and seconds, since the last flush."""
        sums = [sum(getattr(count, name) for count in self.counts) for name in ("distinct", "padded", "scored")]
        return [*sums, self.seconds]

    def restore(self, state: list[float]) -> None:
        """Add what `state` gave to what has been counted since."""
        *sums, seconds = state
        self.counts.append(TokenCounts(*sums))
        self.seconds += seconds

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """Figures over all processes since the last flush, which must be called on all of them."""
        local = torch.tensor(self.state(), dtype=torch.float64, device=self.device)
        distinct, padded, scored, seconds = accelerator.reduce(local, reduction="sum").tolist()
        self.counts, self.seconds = [], 0.0
        if not distinct or not seconds:
            return {}
        per_second = distinct / seconds  # of one process, on average
        figures = {
            "tokens_per_second": per_second * accelerator.num_processes,
            "peak_memory_gb": peak_memory_gb(self.device),
        }
        if self.is_packed:
            figures["tokens_saved"] = 1 - distinct / padded
        if self.peak_flops and self.step_flops:
            body, head = self.step_flops
            figures["mfu"] = per_second * (body + head * scored / distinct) / self.peak_flops
        return figures


def dense_flops(model: PreTrainedModel, trainable_share: float) -> tuple[float, float] | None:
    """Floating-point operations of a training step per token in the layers, and per scored token in the head.

    Forward, gradient of activations, and gradient of the trained share of weights, for every matrix of the model; attention
    scores and recomputation are left out, so the utilization that follows is a lower bound. None for a mixture of experts,
    which uses some of its weights only, and for convolutions.
    """
    shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in model.parameters()]  # ds_shape under ZeRO-3
    if hasattr(model.config.get_text_config(), "num_experts_per_tok") or any(len(shape) > 2 for shape in shapes):
        return None
    # Of a module that an adapter saves whole, the original is idle.
    used = [module for name, module in model.named_modules() if "original_module" not in name]
    head = set(model.get_output_embeddings().modules())
    operations = 2 * (2 + trainable_share)
    return tuple(operations * sum(matrix_size(module) for module in used if (module in head) is side) for side in (False, True))


def matrix_size(module: nn.Module) -> int:
    """Weights of a linear layer, however they are stored; 0 for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.nx * module.nf if isinstance(module, Conv1D) else 0
