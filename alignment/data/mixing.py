"""Which conversations a recipe trains and evaluates on: found, sampled, checked row by row, mixed and shuffled.

A source of dataset_mixer offers splits; a split gives its share of rows; a row becomes a pair or a conversation of
{role, content} turns, together with what is wrong with it and its place: the file it was read from and its line there.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, disable_progress_bars

from ..errors import UserError
from ..recipe.configs import DataArguments
from .rows import HARMLESS, TEMPLATE_COLUMNS, UNREADABLE, code_digest, read_batch, read_conversation, read_pair
from .sources import TEST, TRAIN, Rows, Source, load_rows, open_source, split_purpose

PUBLISHED_SEED = 42
BATCH_ROWS = 1000
FEW = 3

TURNS = List({"role": Value("string"), "content": Value("string")})
FINDINGS = List({"reason": Value("string"), "detail": Value("string")})


class SplitReport(NamedTuple):
    """What happened to the rows of one split: rows by reason, a bad row counted once, under its first fault."""

    read: int
    dropped: dict[str, int]
    tolerated: dict[str, int]
    places: list[str]
    """Place, row number and what is wrong, for the first few rows of each reason."""
    notes: list[str]

    @property
    def kept(self) -> int:
        return self.read - sum(self.dropped.values())

    def __str__(self) -> str:
        text = f"{self.read:,} row{'s' * (self.read != 1)} read"
        if self.dropped:
            text += f", {sum(self.dropped.values()):,} dropped ({counts_text(self.dropped)})"
        if self.tolerated:
            text += f", tolerated: {counts_text(self.tolerated)}"
        return "; ".join([text, *self.notes])


def get_datasets(
    data_args: DataArguments,
    *,
    columns: tuple[str, ...],
    preprocessing: str,
    bad_rows: str,
    seed: int,
    do_eval: bool,
    num_proc: int | None = None,
) -> tuple[DatasetDict, dict[str, SplitReport]]:
    """The rows of a recipe under "train" and, with do_eval, "test"; and a report for each of the two.

    columns: ("chosen", "rejected") for rows of prompt, chosen and rejected turns; ("messages",) for conversations.
    published: the first rows of every source, every row that the published code could digest, shuffled with seed 42.
    exact: a sample drawn and shuffled with `seed`; malformed rows are refused, or dropped with bad_rows="drop".
    Raises UserError for a source, split, share, column or row that cannot be used.
    """
    if not PartialState().is_main_process:
        disable_progress_bars()
    exact = preprocessing == "exact"
    splits, notes = find_splits(data_args, do_eval)
    parts: dict[str, list[Part]] = {TRAIN: [], TEST: []}
    for split in splits:
        rows = take_share(split, columns, seed if exact else None)
        parts[split.purpose].append(check_rows(split.rows.place, rows, columns, num_proc))
    refuse_bad_rows(parts[TRAIN] + parts[TEST], keep_malformed=not exact or bad_rows == "drop")

    mixed, reports = DatasetDict(), {}
    for purpose, its_parts in parts.items():
        if its_parts:
            reports[purpose] = report(its_parts, drop=exact, notes=notes[purpose])
            if reports[purpose].kept == 0:
                raise UserError(f"{purpose} has no row left: {reports[purpose]}")
            rows = concatenate_datasets([part.well_formed() if exact else part.rows for part in its_parts])
            # In memory, 8 bytes a row: a file of the order that lost its end would read as one of fewer rows.
            mixed[purpose] = rows.shuffle(seed=seed if exact else PUBLISHED_SEED, keep_in_memory=True)
    return mixed, reports


class Split(NamedTuple):
    """One split of one source that a recipe asks for."""

    purpose: str
    rows: Rows
    share: float | int


def find_splits(data_args: DataArguments, do_eval: bool) -> tuple[list[Split], dict[str, list[str]]]:
    """The splits to read, in the order of the mixer, and notes: evaluation splits that a source lacks, what is passed over."""
    mixer = data_args.dataset_mixer
    if not mixer:
        raise UserError("dataset_mixer: name a source and its share, e.g. {my_pairs.jsonl: 1.0}")
    wanted = wanted_splits(data_args.dataset_splits, do_eval)
    configs = data_args.dataset_configs or [None] * len(mixer)
    sources = [open_source(name, config) for name, config in zip(mixer, configs, strict=True)]

    splits = [
        Split(purpose, source.splits[name], share if purpose == TRAIN else 1)
        for source, share in zip(sources, mixer.values(), strict=True)
        for name, purpose in source.to_read(wanted).items()
    ]
    named = [source for source in sources if source.has_split_names]
    absent = [(source, name) for source in named for name in wanted if source.find(name) is None]
    has_evaluation = any(split.purpose == TEST for split in splits)
    errors = [
        absent_split(source, name, wanted)
        for source, name in absent
        if wanted[name] == TRAIN or len(sources) == 1 or not has_evaluation
    ]
    if errors:
        raise UserError("\n".join(errors))
    if not any(split.purpose == TRAIN for split in splits):
        raise UserError(f"no training rows in {', '.join(mixer)}: name a training split in dataset_splits or a training file")
    if do_eval and not has_evaluation:
        raise UserError(f"no evaluation rows in {', '.join(mixer)}: name an evaluation split or file, or --do_eval=false")
    notes = {TEST: [f"{source.name} has no split {name!r}" for source, name in absent]}
    return splits, notes | {TRAIN: [note for source in sources for note in source.notes(data_args.dataset_splits)]}


def wanted_splits(names: Sequence[str], do_eval: bool) -> dict[str, str]:
    """Split name -> "train" or "test". A run that does not evaluate needs no evaluation split, so none is read."""
    purposes = {name: split_purpose(name) for name in names}
    for name, purpose in purposes.items():
        if purpose is None:
            raise UserError(
                f"dataset_splits: {name!r} could be for training or evaluation; "
                "a split name must have train, test, validation, eval or dev as a word of it"
            )
    return {name: purpose for name, purpose in purposes.items() if purpose == TRAIN or do_eval}


def absent_split(source: Source, name: str, wanted: dict[str, str]) -> str:
    """The message for a split that a source does not have, with the command line that would work."""
    problem = f"{source.name}: no split {name!r}; it has {', '.join(source.splits)}"
    nearest = [
        source.find(split) or next((s for s in source.splits if split_purpose(s) == purpose), None)
        for split, purpose in wanted.items()
    ]
    if None not in nearest:
        return f"{problem}. Try --dataset_splits={','.join(dict.fromkeys(nearest))}"
    if split_purpose(name) == TEST:
        return f"{problem}. Add an evaluation split, or train without one: --do_eval=false"
    return f"{problem}. Add a training split, named train*, or leave the source out"


def take_share(split: Split, columns: tuple[str, ...], seed: int | None) -> Dataset:
    """The rows of a split's share, as records: the first ones, or with a seed a sample in their order."""
    rows = load_rows(split.rows, (*canonical_columns(columns), *TEMPLATE_COLUMNS))
    count = share_size(split, len(rows))
    if seed is None or count == len(rows):
        return rows.select(range(count))
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))


def canonical_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    return columns if columns == ("messages",) else ("prompt", *columns)


def share_size(split: Split, available: int) -> int:
    """int(fraction * available) or the rows asked for; 1 means all rows, whether it is written 1 or 1.0."""
    if available == 0:
        raise UserError(f"{split.rows.place}: has no rows")
    if split.share == 1:
        return available
    if split.share > available:
        raise UserError(f"{split.rows.place}: {split.share:,} rows asked for, {available:,} available")
    size = split.share if isinstance(split.share, int) else int(split.share * available)
    if size == 0:
        raise UserError(f"{split.rows.place}: a share of {split.share} is none of its {available:,} rows; ask for more")
    return size


class Flaw(NamedTuple):
    """A finding with its place: index is the row's in Part.rows."""

    index: int
    reason: str
    message: str


class Part(NamedTuple):
    """The share of one split, malformed rows included, and what is wrong with its rows."""

    rows: Dataset
    flaws: list[Flaw]

    def malformed(self) -> set[int]:
        return {flaw.index for flaw in self.flaws if flaw.reason not in HARMLESS}

    def well_formed(self) -> Dataset:
        malformed = self.malformed()
        return self.rows.select([index for index in range(len(self.rows)) if index not in malformed])


def check_rows(place: str, rows: Dataset, columns: tuple[str, ...], num_proc: int | None) -> Part:
    """Records in their canonical columns, prompt, chosen and rejected or messages, and all that is wrong with them."""
    refuse_absent_columns(place, rows, columns)
    canonical = canonical_columns(columns)
    processes = min(num_proc or 1, len(rows) // BATCH_ROWS)
    text = {"more": Value("string"), "place": Value("string")}
    checked = rows.map(
        read_batch,
        batched=True,
        batch_size=BATCH_ROWS,
        remove_columns=rows.column_names,
        features=Features(dict.fromkeys(canonical, TURNS) | text | {"findings": FINDINGS}),
        fn_kwargs={
            "read": read_conversation if columns == ("messages",) else read_pair,
            "columns": canonical,
            "code": code_digest(),
        },
        num_proc=processes if processes > 1 else None,
        desc=f"Checking {place}",
    )
    refuse_cut(checked, rows)
    return Part(checked.remove_columns("findings"), flaws_of(checked))


def flaws_of(rows: Dataset) -> list[Flaw]:
    columns = rows.select_columns(["place", "findings"])[:]
    return [
        Flaw(index, finding["reason"], f"{place}: {finding['detail']}")
        for index, (place, findings) in enumerate(zip(columns["place"], columns["findings"], strict=True))
        for finding in findings
    ]


def refuse_absent_columns(place: str, rows: Dataset, columns: tuple[str, ...]) -> None:
    """Raises UserError for a column that no row has. The first row has it nearly always."""
    absent, seen = set(columns), {}
    for record in (row["record"] for row in rows.select_columns("record")):
        with suppress(ValueError, RecursionError):  # told with its line later
            row = json.loads(record.decode("utf-8"))
            seen |= dict.fromkeys(row if isinstance(row, dict) else ())
        absent -= seen.keys()
        if not absent:
            return
    if seen:
        column = next(column for column in columns if column in absent)
        raise UserError(f"{place}: no column {column!r}; it has {', '.join(seen)}")


def refuse_cut(made: Dataset, rows: Dataset) -> None:
    """Raises UserError if the file that holds what was made of `rows` lost some of its batches: it reads like a shorter one."""
    if len(made) != len(rows):
        files = sorted(Path(file["filename"]) for file in made.cache_files)
        raise UserError(damaged(files, f"{len(made):,} of {len(rows):,} rows"))


def damaged(files: Sequence[Path], reason: str) -> str:
    names = " ".join(map(str, files))
    return f"{names}: prepared data, and damaged ({reason}). Delete it and start again, it is then made anew: rm {names}"


def refuse_bad_rows(parts: Sequence[Part], keep_malformed: bool) -> None:
    flaws = [flaw for part in parts for flaw in part.flaws if flaw.reason not in HARMLESS]
    unreadable = [flaw for flaw in flaws if flaw.reason == UNREADABLE]
    if unreadable:
        raise UserError(f"{listing(unreadable)}; mend or remove what cannot be read")
    if flaws and not keep_malformed:
        raise UserError(f"{listing(flaws)}; bad_rows: drop leaves out what is malformed")


def listing(flaws: Sequence[Flaw]) -> str:
    """The first few, one a line, then the number of bad rows by reason."""
    lines = [flaw.message for flaw in flaws[:FEW]] + ["..."] * (len(flaws) > FEW)
    return "\n".join([*lines, f"bad rows: {counts_text(count_reasons(flaws))}"])


def report(parts: Sequence[Part], drop: bool, notes: list[str]) -> SplitReport:
    dropped: list[Flaw] = []
    tolerated: list[Flaw] = []
    for part in parts:
        out = part.malformed() if drop else set()
        dropped += [flaw for flaw in part.flaws if flaw.index in out and flaw.reason not in HARMLESS]
        tolerated += [flaw for flaw in part.flaws if flaw.index not in out]
    by_reason: dict[str, list[str]] = {}
    for flaw in dropped + tolerated:
        by_reason.setdefault(flaw.reason, []).append(flaw.message)
    return SplitReport(
        read=sum(len(part.rows) for part in parts),
        dropped=count_reasons(dropped),
        tolerated=count_reasons(tolerated),
        places=[message for messages in by_reason.values() for message in messages[:FEW]],
        notes=notes,
    )


def count_reasons(flaws: Iterable[Flaw]) -> dict[str, int]:
    return dict(Counter(flaw.reason for flaw in flaws))


def counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
