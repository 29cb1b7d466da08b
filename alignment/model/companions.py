"""Files that belong to a model beside its weights: licences, what converters and processors read. They go along."""

import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub import metadata_load
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers.utils import cached_file
from yaml import YAMLError

from ..recipe.configs import ModelArguments
from .loading import Source, find_adapter, weights_source

logger = logging.getLogger(__name__)

TAKEN = (
    "*.json",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.md",
    "*.py",
    "*.jinja",
    "*.pdf",
    "LICEN*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
# What a run, or the Hub, writes of its own; weights; and templates, of which the trained one is saved.
LEFT = (
    ".*", "README*", "config.json", "generation_config.json", "*.index.json", "adapter_*", "*_results.json",
    "trainer_state.json", "environment.json", "manifest.json", "merged_from.json", "since_last_log*", "chat_template*",
    "requirements*.txt", "latest", "zero_to_fp32.py",
)  # fmt: skip


def companion_folders(model_args: ModelArguments) -> list[Path]:
    """Where the companions of a whole model lie: an adapter's own folder first, then that of the weights. Empty for a Hub
    that does not answer, and for a run that leaves an adapter, whose base has its own."""
    if model_args.use_peft:
        return []
    adapter = find_adapter(model_args)
    sources = [weights_source(model_args), *([adapter.source] if adapter is not None else [])]
    return [folder for source in reversed(sources) if (folder := files_of(source)) is not None]


def files_of(source: Source) -> Path | None:
    if Path(source.name).is_dir():
        return Path(source.name)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                source.name, revision=source.revision, allow_patterns=list(TAKEN), ignore_patterns="*/*"
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        logger.warning("%s: files beside the weights, its licence for one, were not copied: %s", source.name, error)
        return None


def licence_of(model_args: ModelArguments) -> dict[str, str]:
    """What the base's card says of its licence, in the keys of a card's header."""
    source = weights_source(model_args)
    readme = cached_file(source.name, "README.md", revision=source.revision, _raise_exceptions_for_missing_entries=False)
    try:
        said = metadata_load(readme) if readme is not None else None
    except (OSError, ValueError, YAMLError):
        return {}  # a card that is none
    keys = ("license", "license_name", "license_link")
    return {key: said[key] for key in keys if key in said} if said and "license" in said else {}


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Files of `source` that belong to its model and that `folder` lacks. Returns their names."""
    if source.resolve() == folder.resolve():
        return []
    copied = []
    for path in sorted(source.iterdir()):
        if path.is_file() and is_companion(path.name) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    return copied


def is_companion(name: str) -> bool:
    def matches(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)

    return matches(TAKEN) and not matches(LEFT)
