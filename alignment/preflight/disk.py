"""What a run writes: its checkpoints, and the model at its end, in bytes, against the room that is there."""

import shutil
from pathlib import Path
from typing import NamedTuple

from ..model.loading import weights_source
from ..model.precision import checkpoint_dtype
from ..preference.memory import STATE_BYTES
from ..recipe.configs import ModelArguments, RunArguments
from ..recipe.values import text
from .model import Skeleton

MOMENTS = 8.0  # bytes of AdamW's two float32 moments for an element
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}


class Disk(NamedTuple):
    """Bytes. kept: checkpoints that lie there at once, the one that is being written included."""

    checkpoint: float
    kept: int
    end: float
    end_dtype: str
    free: int

    @property
    def most(self) -> float:
        return self.checkpoint * self.kept + self.end


def disk_of(args: RunArguments, model_args: ModelArguments, skeleton: Skeleton, strategy: str, checkpoints: int) -> Disk:
    """checkpoints: how many the run writes in all, of which save_total_limit are kept, and the best one."""
    element = 4 if strategy.startswith("zero") else skeleton.dtype.itemsize
    optimizer = str(text(args.optim))
    states = STATE_BYTES.get(optimizer, MOMENTS if element == 4 else 2 * element)
    # DeepSpeed writes the model in the precision that it computes in, and float32 masters beside it.
    weights = 2 + 4 if strategy.startswith("zero") and args.bf16 | args.fp16 else element
    checkpoint = skeleton.trained * (weights + (0 if args.save_only_model else states))
    limit = checkpoints if args.save_total_limit is None else args.save_total_limit + bool(args.metric_for_best_model)
    kept = min(checkpoints, limit + 1)  # the oldest goes when the newest is whole
    dtype = end_dtype(args, model_args, skeleton)
    return Disk(checkpoint, kept, skeleton.trained * WIDTH[dtype], dtype, free_bytes(Path(args.output_dir)))


def end_dtype(args: RunArguments, model_args: ModelArguments, skeleton: Skeleton) -> str:
    """An adapter keeps the type that it is trained in, float32; a whole model has the one that its checkpoint has."""
    if model_args.use_peft:
        return "float32"
    source = weights_source(model_args)
    folder = source.name if Path(source.name).is_dir() else None  # a Hub's weights would be fetched to look at them
    came = checkpoint_dtype(skeleton.config.to_dict(), folder)
    return args.save_dtype or came or str(skeleton.dtype).removeprefix("torch.")


def free_bytes(folder: Path) -> int:
    """On the disk where the folder is, or would be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
