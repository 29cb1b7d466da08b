"""A finished run, or a merged model, sent to the Hub: what makes the model, its tokenizer and its card, and nothing else."""

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import TrainingStopped, UserError
from ..model.loading import MERGED_BASE, MERGED_FROM
from ..report.card import is_hub_name
from ..report.review.reading import read_yaml
from ..run.checkpoints import RECIPE_FILE
from ..run.hub import push_run, refuse_closed_hub, repository_name
from ..run.resuming import holds_end
from ..run.run_folder import only_writer, read_status, write_status
from ..run.signals import StopSignals

logger = logging.getLogger(__name__)

# By their paths in the folder: weights, configs, tokenizer, card, licences, and code that the model brought.
MODEL = (
    "model*.safetensors", "adapter_model.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "README.md", "LICEN*", "NOTICE*", "COPYING*", "USE_POLICY*",
    "modeling_*.py", "configuration_*.py", "tokenization_*.py",
)  # fmt: skip
RECORDS = (
    "recipe.yaml", "environment.json", "metrics.jsonl", "eval_pairs.jsonl", "probe_pairs.jsonl", "samples.jsonl",
    "warnings.jsonl", "nonfinite_rows.jsonl", "trainer_state.json", "*_results.json", "curves.png",
    "review.md", "report.html", MERGED_FROM,
)  # fmt: skip
CHECKPOINTS = ("checkpoint-*/*",)
WAYS_OUT = "or HF_TOKEN) or another --hub_model_id"
NEVER = ("_*", "*training_args.bin")


@dataclass(frozen=True)
class Upload:
    """A `Destination`. The token is what `hf auth login` or HF_TOKEN gave: one on a command line is read by others."""

    output_dir: str
    hub_model_id: str | None
    hub_private_repo: bool | None
    hub_revision: str | None
    hub_minutes: float = 120.0
    hub_token: None = None


def push(
    folder: Path,
    *,
    hub_model_id: str | None = None,
    hub_private_repo: bool | None = None,
    hub_revision: str | None = None,
    records: bool = False,
    checkpoints: bool = False,
    only_list: bool = False,
) -> list[str]:
    """Send the files of a finished run, or with only_list print which they would be. Returns their paths in the folder.

    What is None is as the run's recipe says. Raises UserError for a folder that is neither a finished run nor a merged model,
    for an adapter whose base nobody else has, and where this token may not write; TrainingStopped if sending fails.
    """
    is_run = refuse_unfinished(folder)
    refuse_local_base(folder)
    recipe = read_yaml(folder / RECIPE_FILE)
    given = {"hub_model_id": hub_model_id, "hub_private_repo": hub_private_repo, "hub_revision": hub_revision}
    upload = Upload(str(folder), **{key: recipe.get(key) if value is None else value for key, value in given.items()})
    paths = chosen_files(folder, records=records, checkpoints=checkpoints)
    if only_list:
        print(listing(folder, upload, paths))
        return paths
    if (why := refuse_closed_hub(upload, f"hub_model_id = {repository_name(upload)!r}", WAYS_OUT)) is not None:
        raise TrainingStopped(f"{repository_name(upload)}: the Hub could not be asked for it: {why}. Nothing was sent")
    stop = StopSignals()
    with stop.listening(), only_writer(folder) if is_run else nullcontext(), stop.deferred():
        push_run(upload, stop, only=paths)
        if is_run:
            note(folder)
    return paths


# ---- Which folder ----


def refuse_unfinished(folder: Path) -> bool:
    """Whether it is a run, and not what merge_adapter.py left. Raises UserError for what is neither, or not at its end."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if holds_end(folder):
        return True
    if (folder / MERGED_FROM).is_file() and (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return False
    status = read_status(folder)
    if status is None:
        raise UserError(
            f"{folder}: is neither a run's folder nor a model that scripts/merge_adapter.py left; name one of these"
        )
    told = f" ({status['reason']})" if status.get("reason") else ""
    raise UserError(f"{folder}: this run is not finished: {status['state']}{told}. Its own command goes on with it")


def refuse_local_base(folder: Path) -> None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    is_merged_here = Path(base).name == MERGED_BASE and (folder / MERGED_BASE).is_dir()  # named as another folder saw it
    if is_merged_here or not is_hub_name(base):
        raise UserError(
            f"{folder}: is an adapter of {base!r}, a folder of this machine, without which it is nothing. Merge it "
            f"(scripts/merge_adapter.py {folder} MERGED) and push that, or name the base's place on the Hub in "
            "adapter_config.json (base_model_name_or_path)"
        )


# ---- Which files ----


def chosen_files(folder: Path, *, records: bool, checkpoints: bool) -> list[str]:
    wanted = (*MODEL, *(RECORDS if records else ()), *(CHECKPOINTS if checkpoints else ()))
    return [path for path in files_in(folder) if matches(path, wanted) and not matches(path, NEVER)]


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """A pattern without a slash is of a name in the folder itself."""
    return any(fnmatch(path, pattern) and ("/" in pattern or "/" not in path or pattern in NEVER) for pattern in patterns)


def listing(folder: Path, upload: Upload, paths: list[str]) -> str:
    """What would be sent where, and what would stay."""
    sizes = {path: (folder / path).stat().st_size for path in files_in(folder)}
    private = {True: ", private", False: ", public", None: ""}[upload.hub_private_repo]
    branch = f", branch {upload.hub_revision}" if upload.hub_revision else ""
    total = sum(sizes[path] for path in paths)
    lines = [f"{repository_name(upload)}{branch}{private}: {len(paths)} files, {total / 1e6:,.1f} MB would be sent"]
    lines += [f"  {sizes[path]:>15,}  {path}" for path in paths]
    stay = sorted({path.split("/")[0] + ("/" if "/" in path else "") for path in sizes if path not in paths})
    return "\n".join([*lines, f"These would stay here: {', '.join(stay) or 'none'}"])


def note(folder: Path) -> None:
    """In the run's status, as a push of its own is."""
    facts: dict[str, Any] = {key: value for key, value in (read_status(folder) or {}).items() if key not in ("state", "reason")}
    write_status(folder, "finished", **facts | {"pushed": True})
