"""Checkpoints that can be trusted: each described by a manifest, whole or absent, resumed only by the run it belongs to."""

import hashlib
import hmac
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UserError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RECIPE_FILE = "recipe.yaml"
STAGING = "_run/staging"  # where a checkpoint is written: a name that no pattern of transformers takes for one, or pushes
REPLACED = "replaced-"
SET_ASIDE = "_run/earlier"  # where a fresh start puts what it finds: checkpoints, and the end of another run
# What a run ends with, beside what every run writes anew. An adapter left beside a whole model would be loaded on top of it.
END_FILES = (
    "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "shards", "*_results.json",
    "eval_pairs.jsonl", "curves.png", "_run/status.json",
)  # fmt: skip
# Keys that leave the trained weights alone; anything else that differs makes another run.
HARMLESS = (
    "logging_", "log_", "save_", "on_save_failure", "hub_", "push_to_hub", "report_to", "run_name", "disable_tqdm",
    "output_dir", "resume_from_checkpoint", "trust_checkpoint", "prepare_only", "preprocessing_num_workers",
    "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "eval_", "do_", "per_device_eval_batch_size", "ddp_timeout", "skip_nonfinite",
)  # fmt: skip
# How a step's rows are divided. Another number of processes divides them otherwise; the product is compared instead.
DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps", "total_train_batch_size", "num_processes")
# What a Trainer would load if it lay in a checkpoint, whether its manifest names it or not.
LOADABLE = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".distcp", ".metadata", ".json", ".py", "latest")


class Damaged(Exception):
    """A folder is not the whole checkpoint that it should be; the message says why."""


class Identity(NamedTuple):
    """Which run a checkpoint belongs to, and what can go on from it."""

    run_id: str
    recipe: str  # YAML of every field, without secrets
    data: str  # SHA-256 of the tokens that are trained on
    base: str | None  # of an adapter: which weights it is trained on
    strategy: str  # see alignment.launch.strategy.layout
    processes: int
    rows_per_step: int


class Checkpoint(NamedTuple):
    """A folder whose manifest has been verified, and that manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


# ---- Writing ----


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Put every file of `folder` on disk, then a manifest that describes them all: size, SHA-256, and `facts`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = on_threads(synced_digest, paths)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    body = json.dumps({**facts, "files": files}, indent=1)
    key = signing_key()
    signature = hmac.new(key, body.encode(), "sha256").hexdigest() if key else None
    manifest = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "signature": signature, "body": body}
    (folder / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def on_threads(digest: Callable[[Path], str], paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        return list(pool.map(digest, paths))


def synced_digest(path: Path) -> str:
    sync(path)
    return digest_of(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: Path, target: Path) -> None:
    """Rename a sealed folder into place. What the same run had there is replaced, anything else set aside."""
    if target.exists():
        before = read_facts(target)
        if before and before.get("run_id") == read_facts(staged).get("run_id"):
            target.rename(staged.with_name(f"{REPLACED}{target.name}"))
        else:
            set_aside(target)
    staged.rename(target)
    sync(target.parent)
    shutil.rmtree(staged.parent)


def undo_replacement(output_dir: Path) -> None:
    """Put back what `publish` had moved out of the way when it was killed between its two renames."""
    for replaced in (output_dir / STAGING).glob(f"{REPLACED}*"):
        target = output_dir / replaced.name.removeprefix(REPLACED)
        if not target.exists():
            replaced.rename(target)


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint to where no run finds or deletes it. Returns its new place."""
    return checkpoint.rename(free_name(checkpoint.parent, checkpoint.name))


def free_name(output_dir: Path, name: str) -> Path:
    """A path among what is set aside that nothing has yet."""
    folder = output_dir / SET_ASIDE
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.suffix[1:]) for path in folder.glob(f"{name}.*")]
    return folder / f"{name}.{1 + max(taken, default=0)}"


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


def prune(output_dir: Path, keep: int | None, run_id: str | None, best: str | None) -> None:
    """Delete a run's oldest checkpoints, by step, until `keep` are left; never the newest, the best, or another's."""
    if not keep:
        return
    described = ((path, read_facts(path)) for _, path in sorted(numbered(output_dir).items()))
    mine = [path for path, facts in described if facts and facts.get("run_id") == run_id]
    for path in mine[:-keep]:
        if best is None or path.name != Path(best).name:  # by name: the folder may have been moved
            # Out of sight first: a deletion cut short must not leave a checkpoint that looks damaged.
            doomed = output_dir / STAGING / f"old-{path.name}"
            doomed.parent.mkdir(parents=True, exist_ok=True)
            path.rename(doomed)
            shutil.rmtree(doomed.parent)


def numbered(output_dir: Path) -> dict[int, Path]:
    """step -> folder, of every folder named as a checkpoint is."""
    named = (
        (path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), path) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    )
    return {int(number): path for number, path in named if number.isdecimal() and path.is_dir()}


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def signing_key() -> bytes | None:
    """This user's secret on this machine, made when first needed; None where it can be neither read nor kept."""
    path = Path(huggingface_hub.constants.HF_HOME, "simpo_checkpoint_key")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
            draft.touch(mode=0o600, exist_ok=False)
            draft.write_bytes(secrets.token_bytes(32))
            try:
                os.link(draft, path)  # another process may have been faster: its key stays
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        return path.read_bytes()
    except OSError as error:
        logger.warning(
            "Checkpoints are not signed (%s): resuming DeepSpeed or sharded ones will need --trust_checkpoint.", error
        )
        return None


# ---- Reading ----


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it was written. Raises Damaged if there is none or it is not intact."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        body = manifest["body"]
        intact = hashlib.sha256(body.encode()).hexdigest() == manifest["sha256"]
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"its {MANIFEST} cannot be read ({error})") from error
    if not intact:
        raise Damaged(f"its {MANIFEST} was changed")
    return manifest


def read_facts(folder: Path) -> dict[str, Any]:
    """What a manifest says about its checkpoint; nothing, where there is no intact manifest."""
    try:
        return json.loads(read_manifest(folder)["body"])
    except Damaged:
        return {}


def verify(folder: Path) -> Checkpoint:
    """Read every byte of a checkpoint. Raises Damaged, with the first file that is not as its manifest says."""
    facts = json.loads(read_manifest(folder)["body"])
    files: dict[str, dict[str, Any]] = facts.pop("files")
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != file["size"]:
            raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {file['size']}")
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise Damaged(f"{path.relative_to(folder)} is a link")
    present = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in sorted(set(present) - files.keys() - {MANIFEST}):
        if name.endswith(LOADABLE):
            raise Damaged(f"{name} is not in its manifest")
    for (name, file), digest in zip(files.items(), on_threads(digest_of, [folder / name for name in files]), strict=True):
        if digest != file["sha256"]:
            raise Damaged(f"{name} was changed (its SHA-256 differs)")
    return Checkpoint(folder, facts)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


# ---- Choosing ----

AFRESH = ("never", "false", "False")
AUTOMATIC = (None, "auto", "true", "True")


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
