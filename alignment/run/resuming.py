"""Which checkpoint a run goes on from, and what it must have in common with the run that made it."""

import hmac
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .checkpoints import (
    MANIFEST,
    RECIPE_FILE,
    Checkpoint,
    Damaged,
    free_name,
    numbered,
    read_manifest,
    set_aside,
    signing_key,
    undo_replacement,
    verify,
)
from .run_folder import read_status

logger = logging.getLogger(__name__)

AFRESH = ("never", "false", "False")
AUTOMATIC = (None, "auto", "true", "True")
# What a run ends with, beside what every run writes anew. An adapter left beside a whole model would be loaded on top of it.
END_FILES = (
    "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "shards", "*_results.json",
    "eval_pairs.jsonl", "probe_pairs.jsonl", "samples.jsonl", "warnings.jsonl", "curves.png", "_run/status.json",
    "_run/reference", "_run/step_0", "_run/division.json",
)  # fmt: skip
# Keys that leave the trained weights alone; anything else that differs makes another run.
HARMLESS = (
    "logging_", "log_", "save_", "on_save_failure", "hub_", "push_to_hub", "report_to", "run_name", "disable_tqdm",
    "output_dir", "resume_from_checkpoint", "trust_checkpoint", "prepare_only", "dry_run", "show_row", "gpu_memory",
    "tokens_per_second", "speed_of", "gpu_price", "preprocessing_num_workers",
    "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "eval_", "do_", "per_device_eval_batch_size", "ddp_timeout", "skip_nonfinite",
    "score_step_0", "train_probe", "sample_",
    # The same steps, in sums of another order: what a run that ran out of memory is told to change must not end it.
    "max_tokens_per_micro_batch", "recompute_layers",
)  # fmt: skip
# How a step's rows are divided. Another number of processes divides them otherwise; the product is compared instead.
DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "total_train_batch_size", "num_processes")


# ---- Choosing ----


def checkpoint_to_resume(output_dir: Path, choice: str | None, *, trust: bool = False) -> Checkpoint | None:
    """The checkpoint that a run goes on from, or None for a fresh start, which sets aside what it finds.

    choice: null or "auto", the newest whole checkpoint in output_dir; "never"; or a checkpoint's path.
    trust: take a path that has no manifest, and load what executes code whoever wrote it.
    Raises UserError if the checkpoint cannot be trusted to be whole, or to be safe.
    """
    if choice in AFRESH:
        for path in numbered(output_dir).values():
            logger.info("%s set aside as %s.", path.name, set_aside(path))
        if (place := set_aside_end(output_dir)) is not None:
            logger.info("What the run before ended with is set aside in %s.", place)
        return None
    checkpoint = newest_whole(output_dir) if choice in AUTOMATIC else named_checkpoint(Path(choice), trust)
    if checkpoint is not None and not trust:
        refuse_foreign_code(checkpoint.path)
    return checkpoint


def choice_of_attempt(choice: str | None, output_dir: Path, restarts: int) -> str | None:
    """What resume_from_checkpoint means to a run that its launcher has restarted: not to lose what the first attempt saved."""
    return None if restarts and numbered(output_dir) else choice


def named_checkpoint(path: Path, trust: bool) -> Checkpoint:
    if trust and not (path / MANIFEST).exists():
        state = path / "trainer_state.json"
        try:
            return Checkpoint(path, {"step": json.loads(state.read_text(encoding="utf-8"))["global_step"]})
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"resume_from_checkpoint = {str(path)!r}: {state.name} cannot be read ({error})") from error
    try:
        return resumable(path)
    except Damaged as reason:
        way_out = " One that was made elsewhere is taken with --trust_checkpoint." if path.is_dir() and not trust else ""
        raise UserError(f"resume_from_checkpoint = {str(path)!r}: no whole checkpoint is there; {reason}.{way_out}") from reason


def newest_whole(output_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; a warning for each one that had to be skipped.

    Raises UserError if there are checkpoints and none can be resumed: starting from nothing would cost the run silently.
    """
    undo_replacement(output_dir)
    skipped = []
    for _, path in sorted(numbered(output_dir).items(), reverse=True):
        try:
            checkpoint = resumable(path)
        except Damaged as reason:
            logger.warning("Skipped %s: %s.", path, reason)
            skipped.append(f"  {path.name}: {reason}")
        else:
            return checkpoint
    if skipped:
        raise UserError(
            "\n".join(
                [
                    f"no checkpoint in {output_dir} can be resumed:",
                    *skipped,
                    "Start afresh with --resume_from_checkpoint=never.",
                ]
            )
        )
    return None


def resumable(path: Path) -> Checkpoint:
    """A verified checkpoint. Raises Damaged also if a run cannot go on from it."""
    checkpoint = verify(path)
    if not checkpoint.manifest["resumable"]:
        raise Damaged("it holds weights only (save_only_model)")
    return checkpoint


def set_aside_end(output_dir: Path) -> Path | None:
    """Move what a run ended with, so that it does not mix with the end of the next. Returns its new place, if there was any."""
    files = [path for pattern in END_FILES for path in sorted(output_dir.glob(pattern))]
    if not files:
        return None
    folder = free_name(output_dir, "end")
    folder.mkdir()
    for path in files:
        path.rename(folder / path.name)
    return folder


def holds_end(output_dir: Path) -> bool:
    """Whether the folder holds the end of a run."""
    status = read_status(output_dir)
    return bool(status and status["state"] == "finished") and any(output_dir.glob("*.safetensors"))


def outlook(output_dir: Path, choice: str | None, recipe: dict[str, Any], processes: int, rows_per_step: int) -> str:
    """What a run would make of its folder, in words, without touching it; a checkpoint's bytes are not read.

    Raises UserError where another recipe's run is there, or nothing that can be resumed.
    """
    found = numbered(output_dir)
    if choice in AFRESH:
        return "starts afresh; the run that is there is set aside" if found or holds_end(output_dir) else "starts afresh"
    if holds_end(output_dir):
        refuse_other_recipe(Checkpoint(output_dir, read_status(output_dir)), recipe, processes, rows_per_step)
        return "holds the end of this run: nothing is left to do"
    paths = [found[step] for step in sorted(found, reverse=True)] if choice in AUTOMATIC else [Path(choice)]
    for path in paths:
        try:
            facts = json.loads(read_manifest(path)["body"])
        except Damaged:
            continue
        refuse_other_recipe(Checkpoint(path, facts), recipe, processes, rows_per_step)
        return f"goes on from {path}, step {facts['step']:,}"
    if paths:
        raise UserError(
            f"resume_from_checkpoint = {choice!r}: no whole checkpoint is at {paths[0]}; name another, or start afresh with "
            "--resume_from_checkpoint=never"
        )
    return "starts there"


# ---- Refusing ----


def refuse_foreign_code(folder: Path) -> None:
    """Raises UserError if loading the checkpoint would run pickled code and nobody on this machine signed it."""
    loaded_as_code = [
        path.relative_to(folder).as_posix()
        for pattern in ("latest", "global_step*/*.pt", "**/.metadata", "**/*.pkl")  # "latest" names DeepSpeed any folder
        for path in folder.glob(pattern)
    ]
    if not loaded_as_code:
        return
    manifest, key = read_manifest(folder), signing_key()
    if key and manifest.get("signature"):
        expected = hmac.new(key, manifest["body"].encode(), "sha256").hexdigest()
        if hmac.compare_digest(expected, manifest["signature"]):
            return
    raise UserError(
        f"{folder}: loading {loaded_as_code[0]} would run whatever code it holds, and it was not written by you on this "
        "machine (under this HF_HOME). If you know who wrote it, say so with --trust_checkpoint."
    )


def refuse_other_recipe(checkpoint: Checkpoint, recipe: dict[str, Any], processes: int, rows_per_step: int) -> None:
    """Raises UserError, naming every key that differs, if the checkpoint is of another recipe."""
    recorded, before = checkpoint.path / RECIPE_FILE, checkpoint.manifest
    differing = []
    if recorded.is_file():
        passed = HARMLESS if before.get("processes", processes) == processes else (*HARMLESS, *DIVISION)
        differing = recipe_differences(yaml.safe_load(recorded.read_text(encoding="utf-8")), recipe, passed)
    if before.get("rows_per_step", rows_per_step) != rows_per_step:
        differing.append(
            f"  rows per step: {before['rows_per_step']} on {before['processes']} processes then, {rows_per_step} on "
            f"{processes} now (--total_train_batch_size={before['rows_per_step']} keeps it)"
        )
    if differing:
        raise UserError("\n".join([f"{checkpoint.path} was made by another recipe:", *differing, ways_out(checkpoint)]))


def refuse_other_data(checkpoint: Checkpoint, data: str) -> None:
    """Raises UserError if the tokens that are trained on have changed since."""
    if checkpoint.manifest.get("data", data) != data:
        raise UserError(
            f"{checkpoint.path} was made with other data: the recipe names the same sources, but the training rows or their "
            f"tokens have changed since.\n{ways_out(checkpoint)}"
        )


def refuse_other_base(checkpoint: Checkpoint, base: str | None) -> None:
    """Raises UserError if the frozen weights below an adapter have changed since."""
    before = checkpoint.manifest.get("base", base)
    if before != base:
        raise UserError(
            f"{checkpoint.path} is an adapter that was trained on other weights: model_name_or_path names the same model, but "
            f"what is there has changed since ({before} then, {base} now).\n{ways_out(checkpoint)}"
        )


def ways_out(checkpoint: Checkpoint) -> str:
    return (
        "Choose another --output_dir, start afresh with --resume_from_checkpoint=never, or restore what was there; "
        f"--model_name_or_path={checkpoint.path} with another --output_dir starts a new run from its weights."
    )


def recipe_differences(before: dict[str, Any], now: dict[str, Any], harmless: Iterable[str] = HARMLESS) -> list[str]:
    return [
        f"  {key}: {before[key]!r} then, {now[key]!r} now"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key] and not key.startswith(tuple(harmless))
    ]


def refuse_other_layout(checkpoint: Checkpoint, strategy: str, processes: int) -> None:
    """Raises UserError if this launch cannot read what the other wrote; a warning if it can, but not bit for bit."""
    path = checkpoint.path
    strategy_then = checkpoint.manifest.get("strategy", strategy)
    processes_then = checkpoint.manifest.get("processes", processes)
    if strategy_then != strategy:
        raise UserError(
            f"{path} was saved under {strategy_then}, and this run is under {strategy}, which cannot read it. Launch with the "
            f"accelerate config of then, or start a new run from its weights: --model_name_or_path={path} in another "
            "--output_dir."
        )
    if processes_then == processes:
        return
    if strategy.startswith("DeepSpeed"):
        raise UserError(
            f"{path} was saved by {processes_then} processes, and this run has {processes}: DeepSpeed cannot divide its "
            f"optimizer state anew. Launch with --num_processes={processes_then}."
        )
    logger.warning(
        "Saved by %d processes, resumed by %d: the same rows make up each step, but they are divided otherwise, so that sums "
        "round differently and random numbers (dropout) are others; the rest of the run is no longer bit for bit the same.",
        processes_then,
        processes,
    )
