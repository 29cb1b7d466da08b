"""Which checkpoint a run goes on from: the newest whole one in its folder, if it was made by the same recipe."""

import json
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import UserError

RECIPE_FILE = "recipe.yaml"
# Keys that leave the trained weights alone; anything else that differs makes another run.
HARMLESS = (
    "logging_", "log_", "save_", "hub_", "push_to_hub", "report_to", "run_name", "disable_tqdm", "output_dir",
    "resume_from_checkpoint", "preprocessing_num_workers", "dataset_num_proc", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor", "eval_", "do_",
    "per_device_eval_batch_size",
)  # fmt: skip


def checkpoint_to_resume(output_dir: Path, choice: str | None, recipe: dict[str, Any]) -> Path | None:
    """The checkpoint that this run continues, or None for a fresh start.

    choice: null or "auto", the newest whole checkpoint in output_dir; "never"; or a checkpoint's path.
    Raises UserError if that checkpoint was made by another recipe, naming the keys that differ.
    """
    if choice in ("never", "false", "False"):
        return None
    if choice not in (None, "auto", "true", "True"):
        if not is_whole(Path(choice)):
            raise UserError(f"resume_from_checkpoint = {choice!r}: no whole checkpoint is there")
        return Path(choice)
    checkpoint = newest_checkpoint(output_dir)
    if checkpoint is not None:
        refuse_other_recipe(checkpoint, recipe)
    return checkpoint


def newest_checkpoint(output_dir: Path) -> Path | None:
    steps = {int(path.name.split("-")[1]): path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_whole(path)}
    return steps[max(steps)] if steps else None


# What resuming needs, one of each line: of one process, of FSDP, of DeepSpeed.
PARTS = (
    ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model_fsdp_*", "latest"),
    ("optimizer.pt", "optimizer.bin", "optimizer_*", "latest"),
    ("scheduler.pt", "latest"),
    ("rng_state*.pth",),
)


def is_whole(path: Path) -> bool:
    """Whether the folder is a checkpoint with every part that resuming needs, and a readable state."""
    if not path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit():
        return False
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return all(any(any(path.glob(pattern)) for pattern in patterns) for patterns in PARTS)


def refuse_other_recipe(checkpoint: Path, recipe: dict[str, Any]) -> None:
    recorded = checkpoint / RECIPE_FILE
    if not recorded.is_file():
        raise UserError(
            f"{checkpoint} was not made by this suite (it holds no {RECIPE_FILE}); choose another --output_dir, "
            f"or take it on trust with --resume_from_checkpoint={checkpoint}"
        )
    before = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    differing = [
        f"  {key}: {before[key]!r} then, {recipe[key]!r} now"
        for key in sorted(before.keys() & recipe.keys())
        if before[key] != recipe[key] and not key.startswith(HARMLESS)
    ]
    if differing:
        raise UserError(
            "\n".join(
                [
                    f"{checkpoint} was made by another recipe:",
                    *differing,
                    "Choose another --output_dir, start afresh with --resume_from_checkpoint=never, or restore these values.",
                ]
            )
        )
