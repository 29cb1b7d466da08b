"""The decoder's layers: which of them are computed again in the backward pass, and whether their small operations are fused."""

import importlib.util

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.training_args import OptimizerNames

from ..recipe.ranges import LIGER_LOSSES
from .config_files import whole_model


def recomputable_layers(model: PreTrainedModel | PeftModel) -> list[GradientCheckpointingLayer]:
    """Layers that gradient checkpointing can compute again, in their order; none where a model's are of another kind.

    Those that text passes: the layers of a tower for images come before them, and get no gradient.
    """
    policy = whole_model(model)
    text = policy if policy.config.get_text_config() is policy.config else policy.get_decoder()
    return [module for module in text.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_first(model: PreTrainedModel | PeftModel, count: int) -> int:
    """Let the first `count` layers be computed again in the backward pass, and no other; the numbers are the same.

    For a model whose gradient checkpointing is on. Returns how many layers there are to choose from.
    """
    layers = recomputable_layers(model)
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count
    return len(layers)


def use_fused_kernels(args: TrainingArguments) -> None:
    """On a GPU, let the Trainer take Liger's kernels for the layers, where they are installed, and the fused AdamW.

    The same equations, fewer kernels: a third less time for a step's layers. Liger's losses stay off: they would compute
    logits, and know nothing of pairs.
    """
    on_gpu = args.device.type == "cuda"
    args.use_liger_kernel = uses_liger(args.use_liger_kernel, on_gpu=on_gpu)
    args.optim = optimizer_used(args.optim, on_gpu=on_gpu)
    if args.use_liger_kernel:
        args.liger_kernel_config = {
            **(args.liger_kernel_config or {}),
            **dict.fromkeys(LIGER_LOSSES, False),
        }


def uses_liger(asked: bool | None, *, on_gpu: bool) -> bool:
    """As the recipe says; where it says nothing, on a GPU where the package is installed."""
    return on_gpu and importlib.util.find_spec("liger_kernel") is not None if asked is None else asked


def optimizer_used(asked: str, *, on_gpu: bool) -> str:
    return OptimizerNames.ADAMW_TORCH_FUSED if on_gpu and asked == OptimizerNames.ADAMW_TORCH else asked
