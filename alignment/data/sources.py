"""Where rows come from: files, folders, globs, saved datasets and the Hub, and the splits that each offers."""

import glob
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.errors import HTTPError

from ..errors import UserError, reason_of
from .files import FORMATS, data_format, dataset_records, digest, file_records, kept_rows, local_path, plain_name

TRAIN, TEST = "train", "test"

METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
TRAINING_WORD = re.compile(r"train|pretrain|finetrain")
EVALUATION_WORDS = {"test", "tests", "testset", "validation", "valid", "val", "evaluation", "eval", "evals", "evalset", "dev"}
LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, HTTPError, DatasetsError)
SHOWN = 5


class Rows(NamedTuple):
    """Rows that have been found but not read: how messages name them, and how the columns that a run needs are read."""

    place: str
    load: Callable[[Sequence[str]], Dataset]


class Source(NamedTuple):
    """One entry of dataset_mixer. Files and lone saved datasets have no split names: they go by "train" and "test"."""

    name: str
    splits: dict[str, Rows]
    has_split_names: bool = True
    passed_over: Sequence[str] = ()

    def find(self, split: str) -> str | None:
        """Its own name for a split: the same, or the only one that differs in upper and lower case alone."""
        alike = [name for name in self.splits if name.lower() == split.lower()]
        return split if split in self.splits else alike[0] if len(alike) == 1 else None

    def to_read(self, wanted: dict[str, str]) -> dict[str, str]:
        """Split name -> purpose of what it has of the wanted splits."""
        if not self.has_split_names:
            wanted = {purpose: purpose for purpose in wanted.values()}
        return {found: purpose for name, purpose in wanted.items() if (found := self.find(name)) is not None}

    def notes(self, wanted: Sequence[str]) -> list[str]:
        """What lies in its place and is not read."""
        read = {self.find(name) for name in wanted}
        unnamed = [name for name in self.splits if name not in read] if self.has_split_names else []
        listed = {"passed over": self.passed_over, "not named in dataset_splits:": unnamed}
        return [f"{self.name}: {what} {few(names)}" for what, names in listed.items() if names]


def few(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *["..."] * (len(names) > SHOWN)])


def words_of(name: str) -> set[str]:
    """train, prefs for train_prefs, TrainPrefs and train-prefs2."""
    return set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()))


def split_purpose(name: str) -> str | None:
    """By whole words: train_prefs, test_prefs, validation; retrieval has no val in it, constraints no train."""
    words = words_of(name)
    if any(TRAINING_WORD.match(word) for word in words):
        return TRAIN
    return TEST if words & EVALUATION_WORDS else None


def file_purpose(path: Path) -> str:
    """A file is for training unless its name says otherwise."""
    return split_purpose(plain_name(path)) or TRAIN


def open_source(name: str, config: str | None) -> Source:
    """Look for a file, a folder, a glob and then, for want of them, a Hub dataset. No data file is read yet."""
    path = local_path(name)
    if path is None and not glob.has_magic(name):
        return open_hub_dataset(name, config)
    if config not in (None, "", "default"):
        raise UserError(f"{name}: is local and has no config {config!r}; give it null in dataset_configs")
    try:
        return open_glob(name) if path is None else open_folder(name, path) if path.is_dir() else open_file(name, path)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error


def open_file(name: str, file: Path) -> Source:
    if data_format(file) is None:
        kinds = f"{', '.join(FORMATS)}, also compressed"
        raise UserError(f"{name}: {file.name} is none of the files that can be read: {kinds}{way_of_tables([file.name])}")
    return Source(name, split_files(name, [file], file_purpose), has_split_names=False)


def open_glob(name: str) -> Source:
    """The files that a pattern matches, in the order of their names, each for what its name says.

    Folders that exist by the name as it stands are no pattern: `[v2] pairs` in `[v2] pairs/*.jsonl`.
    """
    pattern = Path(name).expanduser()
    start = next(parent for parent in pattern.parents if parent.is_dir())
    matches = sorted(start.glob(str(pattern.relative_to(start))))
    files = [match for match in matches if is_data(match)]
    if not files:
        seen = f" that can be read ({', '.join(FORMATS)}), but {few([*map(str, matches)])}" if matches else ""
        raise UserError(f"{name}: matches no file{seen}, seen from {Path.cwd()}")
    others = [str(match) for match in matches if match not in files]
    return Source(name, split_files(name, files, file_purpose), has_split_names=False, passed_over=others)


def is_data(file: Path) -> bool:
    """A data file by its name; `._train.jsonl` is what other systems leave beside one."""
    hidden = file.name.startswith(".") or file.name in METADATA_FILES
    return data_format(file) is not None and not hidden and file.is_file()


def open_folder(name: str, folder: Path) -> Source:
    """A dataset or splits written by save_to_disk, or data files named by split or in a folder a split, also in data/."""
    if is_saved_dataset(folder):
        return Source(name, {file_purpose(folder): saved_rows(folder)}, has_split_names=False)
    children = sorted([*folder.iterdir(), *folder.glob("data/*")])
    saved = {child.name: saved_rows(child) for child in children if is_saved_dataset(child)}
    files = [child for child in children if is_data(child)]
    folders = {child.name: split_folder(child) for child in children if child != folder / "data" and split_folder(child)}
    used = {*files, *(file for inside in folders.values() for file in inside)}
    others = [name_ for child in children for name_ in passed_over(folder, child, used)]
    purpose = split_purpose(folder.name)
    if purpose and files and not (saved or folders or any(split_purpose(split_name(file)) for file in files)):
        return Source(name, {purpose: rows_of(name, purpose, files)}, has_split_names=False, passed_over=others)
    if twice := sorted({split_name(file) for file in files} & folders.keys()):
        raise UserError(f"{name}: has both files and a folder for the split {twice[0]}; keep one of them")
    splits = saved | split_files(name, files, split_name) | {split: rows_of(name, split, folders[split]) for split in folders}
    if not splits:
        seen = f"; it holds {few(others)}" if others else ""
        raise UserError(
            f"{name}: holds no dataset; expected files like train.jsonl, test.json or train-00000-of-00002.parquet, also "
            f"compressed, a folder of them for each split, or a folder written by save_to_disk{seen}{way_of_tables(others)}"
        )
    return Source(name, splits, passed_over=others)


def way_of_tables(names: Sequence[str]) -> str:
    """What to do where tables of texts were meant, which have no turns."""
    tables = [name for name in names if name.lower().endswith((".csv", ".tsv"))]
    return f"; {tables[0]} is a table of texts, of which docs/your-own-data.md makes pairs" if tables else ""


def split_folder(path: Path) -> list[Path]:
    """The data files of a folder that may be a split."""
    if not path.is_dir() or path.name.startswith(".") or is_saved_dataset(path):
        return []
    return [file for file in sorted(path.iterdir()) if is_data(file)]


def passed_over(folder: Path, child: Path, used: set[Path]) -> list[str]:
    """Names, seen from a folder, of what is not read in a child of it."""
    if child in used or is_saved_dataset(child) or child == folder / "data" or child.name in METADATA_FILES:
        return []
    inside = sorted(child.iterdir()) if split_folder(child) else [child]
    return [str(path.relative_to(folder)) for path in inside if path not in used]


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def saved_rows(folder: Path) -> Rows:
    def load(columns: Sequence[str]) -> Dataset:
        key = digest([folder / "state.json", *sorted(folder.glob("*.arrow"))])
        return kept(key, partial(load_from_disk, str(folder)), str(folder), columns)

    return Rows(str(folder), load)


def kept(key: str, open_rows: Callable[[], Dataset], place: str, columns: Sequence[str]) -> Dataset:
    return kept_rows(f"{key} {sorted(columns)}", lambda: dataset_records(open_rows(), place, columns))


def split_name(file: Path) -> str:
    """train_prefs for train_prefs.jsonl.gz and for train_prefs-00000-of-00002-b21158d6.parquet."""
    return re.sub(r"-\d+-of-\d+.*", "", Path(plain_name(file)).stem)


def split_files(source: str, files: Sequence[Path], split_of: Callable[[Path], str]) -> dict[str, Rows]:
    grouped: dict[str, list[Path]] = {}
    for file in files:
        grouped.setdefault(split_of(file), []).append(file)
    return {split: rows_of(source, split, shards) for split, shards in grouped.items()}


def rows_of(source: str, split: str, shards: Sequence[Path]) -> Rows:
    place = str(shards[0]) if len(shards) == 1 else f"{source}, split {split}"
    return Rows(place, partial(load_files, place, shards))


def load_files(place: str, files: Sequence[Path], columns: Sequence[str]) -> Dataset:
    stems = {(file.parent, Path(plain_name(file)).stem) for file in files}
    if len(stems) < len(files) or len({data_format(file) for file in files}) > 1:
        names = few([file.name for file in files])
        raise UserError(f"{place}: needs files of one format, not the same rows in several; found {names}")
    return kept_rows(f"{digest(files)} {sorted(columns)}", lambda: file_records(files, columns))


def open_hub_dataset(source: str, config: str | None) -> Source:
    name, _, named_config = source.partition(":")
    if named_config and config:
        raise UserError(f"{source}: has a config in dataset_configs too, {config!r}; name it in one place")
    nothing_here = f"{source}: no file or folder of this name, seen from {Path.cwd()}"
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or data_format(Path(name)) is not None:
        raise UserError(f"{nothing_here}; give a file, a folder, a glob or a Hub dataset (owner/name)")
    config = named_config or config or None
    try:
        found = load_dataset(name, config)
    except LOADING_ERRORS as error:
        advice = "name a local path, or run `hf auth login` if the dataset is private or gated"
        raise UserError(f"{nothing_here}, and the Hub gave none: {one_line(error)}; {advice}") from error
    label = f"{name}:{config}" if config else name
    return Source(label, {split: hub_rows(f"{label}, split {split}", found[split]) for split in found})


def hub_rows(place: str, rows: Dataset) -> Rows:
    return Rows(place, partial(kept, f"{place} {rows._fingerprint}", lambda: rows, place))


def one_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    return reason_of(cause, whole=True)


def load_rows(rows: Rows, columns: Sequence[str]) -> Dataset:
    try:
        return rows.load(columns)
    except LOADING_ERRORS as error:
        raise UserError(f"{rows.place}: cannot be read: {one_line(error)}") from error
