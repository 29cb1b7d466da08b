"""Checkpoints that can be trusted: each described by a manifest, whole or absent, kept or deleted by the run it belongs to."""

import hashlib
import hmac
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..model.loading import MERGED_FROM
from ..report.review.reading import read_json, read_yaml

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RECIPE_FILE = "recipe.yaml"
STAGING = "_run/staging"  # where a checkpoint is written: a name that no pattern of transformers takes for one, or pushes
REPLACED = "replaced-"
SET_ASIDE = "_run/earlier"  # where a fresh start puts what it finds: checkpoints, and the end of another run
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
    start: str | None = None  # the weights that training began with


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


class Training(NamedTuple):
    """What is to be known of a model's training by who uses it.

    behind_system_turn: an empty system turn stood in front of conversations, where the template knows that role; published
    preprocessing puts it there, and the template that such a run saves does not. is_chosen_step: it is not the last step's,
    but that of the best evaluation.
    """

    behind_system_turn: bool
    is_chosen_step: bool


def training_of(model: str) -> Training:
    """Of a run's folder, of a checkpoint or of what was merged of one; of a model from elsewhere nothing is known."""
    keys, merged = read_yaml(Path(model, RECIPE_FILE)), read_json(Path(model, MERGED_FROM))
    behind = keys.get("preprocessing") == "published" and keys.get("auto_insert_empty_system_msg") is True
    chosen = keys.get("load_best_model_at_end") is True
    return Training(behind or merged.get("behind_system_turn") is True, chosen or merged.get("is_chosen_step") is True)
