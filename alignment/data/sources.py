"""Where rows come from: files, folders, globs, saved datasets and the Hub, and the splits that each offers."""

import glob
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from operator import getitem
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError

from ..errors import UserError

TRAIN, TEST = "train", "test"

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
EVALUATION_WORDS = {"test", "validation", "valid", "val", "evaluation", "eval", "dev"}
LOADING_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError)


class Rows(NamedTuple):
    """Rows that have been found but not read: how messages name them, and how they are read."""

    place: str
    load: Callable[[], Dataset]


class Source(NamedTuple):
    """One entry of dataset_mixer. Files and lone saved datasets have no split names: they go by "train" and "test"."""

    name: str
    splits: dict[str, Rows]
    has_split_names: bool = True

    def to_read(self, wanted: dict[str, str]) -> dict[str, str]:
        """Split name -> purpose of what it has of the wanted splits."""
        if not self.has_split_names:
            wanted = {purpose: purpose for purpose in wanted.values()}
        return {name: purpose for name, purpose in wanted.items() if name in self.splits}


def split_purpose(name: str) -> str | None:
    """By what the name contains, as in the published code: train_prefs, test_prefs; val is in validation and eval."""
    if "train" in name.lower():
        return TRAIN
    return TEST if any(part in name.lower() for part in ("test", "val", "dev")) else None


def file_purpose(path: Path) -> str:
    """A file is for training unless one of the words of its name says otherwise: test, validation, eval, dev.

    Whole words, because latest.jsonl is no test set.
    """
    words = set(re.split(r"[^a-z]+", path.name.lower()))
    return TEST if words & EVALUATION_WORDS and "train" not in words else TRAIN


def open_source(name: str, config: str | None) -> Source:
    """Look for a file, a folder, a glob and then, for want of them, a Hub dataset. No data file is read yet."""
    path = Path(name).expanduser()
    is_glob = not path.exists() and glob.has_magic(name)
    if not path.exists() and not is_glob:
        return open_hub_dataset(name, config)
    if config not in (None, "", "default"):
        raise UserError(f"{name}: is local and has no config {config!r}; give it null in dataset_configs")
    if path.is_dir():
        return open_folder(name, path)
    files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if is_glob else [path]
    if not files:
        raise UserError(f"{name}: matches no file, seen from {Path.cwd()}")
    return Source(name, split_files(name, files, file_purpose), has_split_names=False)


def open_folder(name: str, folder: Path) -> Source:
    """A dataset or splits written by save_to_disk, or data files named by split, also in data/ as on the Hub."""
    if is_saved_dataset(folder):
        return Source(name, {file_purpose(folder): saved_rows(folder)}, has_split_names=False)
    saved = {child.name: saved_rows(child) for child in sorted(folder.iterdir()) if is_saved_dataset(child)}
    files = [
        file
        for file in sorted([*folder.iterdir(), *folder.glob("data/*")])
        if file.suffix in FILE_FORMATS and file.name not in METADATA_FILES
    ]
    splits = saved | split_files(name, files, split_name)
    if not splits:
        raise UserError(
            f"{name}: holds no dataset; expected files like train.jsonl, test.json or train-00000-of-00002.parquet, "
            "or a folder written by save_to_disk"
        )
    return Source(name, splits)


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def saved_rows(folder: Path) -> Rows:
    # datasets keeps its cache beside the rows; rows in memory have theirs in a temporary folder.
    in_memory = not os.access(folder, os.W_OK)
    return Rows(str(folder), partial(load_from_disk, str(folder), keep_in_memory=in_memory))


def split_name(file: Path) -> str:
    """train_prefs for train_prefs.jsonl and for train_prefs-00000-of-00002-b21158d6.parquet."""
    return re.sub(r"-\d+-of-\d+.*", "", file.stem)


def split_files(source: str, files: Sequence[Path], split_of: Callable[[Path], str]) -> dict[str, Rows]:
    grouped: dict[str, list[Path]] = {}
    for file in files:
        grouped.setdefault(split_of(file), []).append(file)
    return {
        split: Rows(place, partial(load_files, place, shards))
        for split, shards in grouped.items()
        for place in [str(shards[0]) if len(shards) == 1 else f"{source}, split {split}"]
    }


def load_files(place: str, files: Sequence[Path]) -> Dataset:
    formats = {FILE_FORMATS.get(file.suffix) for file in files}
    if len(formats) > 1 or None in formats:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{place}: needs files of one format, .jsonl, .json or .parquet; found {names}")
    return load_dataset(formats.pop(), data_files=[str(file) for file in files], split="train")


def open_hub_dataset(source: str, config: str | None) -> Source:
    name, _, named_config = source.partition(":")
    if named_config and config:
        raise UserError(f"{source}: has a config in dataset_configs too, {config!r}; name it in one place")
    nothing_here = f"{source}: no file or folder of this name, seen from {Path.cwd()}"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or Path(name).suffix in FILE_FORMATS:
        raise UserError(f"{nothing_here}; give a file, a folder, a glob or a Hub dataset (owner/name)")
    config = named_config or config or None
    try:
        found = load_dataset(name, config)
    except LOADING_ERRORS as error:
        advice = "name a local path, or run `hf auth login` if the dataset is private or gated"
        raise UserError(f"{nothing_here}, and the Hub gave none: {one_line(error)}; {advice}") from error
    label = f"{name}:{config}" if config else name
    return Source(label, {split: Rows(f"{label}, split {split}", partial(getitem, found, split)) for split in found})


def one_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    return " ".join(str(cause).split())


def load_rows(rows: Rows) -> Dataset:
    try:
        return rows.load()
    except StopIteration:  # what datasets raises for a file without a line
        raise UserError(f"{rows.place}: has no rows") from None
    except LOADING_ERRORS as error:
        raise UserError(f"{rows.place}: cannot be read: {one_line(error)}") from error
