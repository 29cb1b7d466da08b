"""A stage that can be killed: finished rows in JSONL, each line whole or made again, and the settings that made them.

In the folder `_stages` of the output: NAME.json says what the stage was told and how far it is, NAME.RANK.jsonl holds what
process RANK has finished. When all of it is there, it becomes one file in the output, and the JSONL goes.
"""

import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from tqdm import tqdm

from alignment.errors import UserError
from alignment.launch.turns import decided_by_main

logger = logging.getLogger(__name__)

FOLDER = "_stages"
Row = dict[str, Any]


class Stage:
    """One stage's record and its finished rows. Every process of a launch has its own object, and its own file."""

    def __init__(self, folder: Path, name: str, date: str):
        self.folder, self.name, self.date = folder, name, date
        self.own = folder / f"{name}.{PartialState().process_index}.jsonl"

    def parts(self) -> list[Path]:
        return parts_of(self.folder, self.name)

    def rows(self) -> Iterator[Row]:
        """What all processes have finished. Raises UserError for a line that no append can have left."""
        for part in self.parts():
            with part.open("rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise UserError(
                            f"{part}, line {number}: is damaged ({error}). Delete that line, and the same command makes its "
                            "row again"
                        ) from error

    def everyones(self) -> dict[str, Row]:
        """What all processes have finished, by prompt id; the same on each: none goes on before every one has read it."""
        state = PartialState()
        state.wait_for_everyone()
        rows = {row["prompt_id"]: row for row in self.rows()}
        state.wait_for_everyone()
        return rows

    def keep(self, rows: Iterable[Row], *, done: int, total: int, what: str) -> None:
        """Append each row as it comes, in one write, so that a kill leaves whole lines and one torn one at most.

        done, total: for the progress bar, which the first process shows for all of them.
        """
        state = PartialState()
        with (
            self.own.open("ab", buffering=0) as file,
            tqdm(desc=what, initial=done, total=total, unit=" rows", disable=not state.is_main_process) as bar,
        ):
            for row in rows:
                append(file.fileno(), row)
                bar.update(min(state.num_processes, total - bar.n))


def parts_of(folder: Path, name: str) -> list[Path]:
    """The JSONL files of the stage `name`; those of `name.1` are another's."""
    part = re.compile(rf"{re.escape(name)}\.\d+\.jsonl")
    return sorted(path for path in folder.iterdir() if part.fullmatch(path.name))


def append(descriptor: int, row: Row) -> None:
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    written = os.write(descriptor, line)
    while written < len(line):  # a full disk writes a part, and says so at the next write
        written += os.write(descriptor, line[written:])


@contextmanager
def stage(output: Path, name: str, settings: dict[str, Any], *, date: str, makes: Iterable[Path]) -> Iterator[Stage | None]:
    """The stage `name`, begun or gone on with; None where it is finished. On all processes alike.

    settings: what the rows depend on, in values that JSON knows. date: of today; a stage that is gone on with keeps its own.
    makes: the files that the stage ends with.
    Raises UserError if another command writes there, if settings differ from those of the rows that are there, or if a
    file that it would write is not its own.
    """
    folder, main = output / FOLDER, PartialState().is_main_process
    lock = None
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            raise UserError(f"{output}: another command is making {name} there; wait for it, or stop it") from None
    try:
        begun = decided_by_main(lambda: begin(folder, name, settings, date, [*makes]))
        yield None if begun is None else Stage(folder, name, begun)
    finally:
        if lock is not None:
            lock.release()


def begin(folder: Path, name: str, settings: dict[str, Any], date: str, makes: list[Path]) -> str | None:
    """The date of the stage's rows; None where it is finished."""
    record = read_record(folder, name)
    there = [path for path in makes if path.exists()]
    if record is None:
        if there:
            raise UserError(
                f"{there[0]}: is there already, and {folder} does not say how it was made; move it, or "
                "give another --output_dir"
            )
        write_json(folder / f"{name}.json", {"state": "begun", "date": date, "settings": settings})
        return date
    is_finished = record["state"] == "finished" and len(there) == len(makes)
    refuse_other(folder, name, record, settings, "finished" if is_finished else "half done")
    if is_finished:
        for leftover in parts_of(folder, name):
            leftover.unlink()
        return None
    for part in parts_of(folder, name):
        cut_torn_line(part)
    return record["date"]


def refuse_other(folder: Path, name: str, record: dict[str, Any], settings: dict[str, Any], state: str) -> None:
    before = record["settings"]
    keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if not keys:
        return
    lines = [f"  {key}: {before.get(key)!r} then, {settings.get(key)!r} now" for key in keys]
    files = shlex.join(str(path) for path in [folder / f"{name}.json", *parts_of(folder, name)])
    anew = f"begin it anew: rm {files}, and what it made beside {FOLDER}"
    advice = f"Give those again, or another --output_dir, or {anew}."
    raise UserError("\n".join([f"{folder / name}.json: this stage is {state}, with other settings:", *lines, advice]))


def cut_torn_line(part: Path) -> None:
    """Forget what stands behind the last line that is whole: a kill came in the middle of it, and its row is made again."""
    content = part.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.info("%s: its last line is torn, and its row is made again.", part)
        os.truncate(part, whole)


def finish(begun: Stage, write: Callable[[], dict[str, Any] | None]) -> None:
    """When every process has finished its rows: write what the stage makes, and drop the JSONL.

    write: what the first process does; what it returns is kept in the stage's record.
    """
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        record = read_record(begun.folder, begun.name)
        write_json(begun.folder / f"{begun.name}.json", {**record, "result": write(), "state": "finished"})
        for part in begun.parts():
            part.unlink()
    state.wait_for_everyone()


def read_record(folder: Path, name: str) -> dict[str, Any] | None:
    """What the stage was told, and its result; None where there is no such stage, or one killed before it was told."""
    try:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def share(rows: list[Any]) -> list[Any]:
    """This process's part of what is to do, as long as the others'."""
    state = PartialState()
    return rows[state.process_index :: state.num_processes]


# ---- Files in the output ----


def write_json(path: Path, content: Any) -> None:
    replace(path, [json.dumps(content, indent=1, ensure_ascii=False) + "\n"])


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON list, as the published scripts write it, a row a line."""
    lines = (f"{'[' if number == 0 else ','}\n{json.dumps(row, ensure_ascii=False)}" for number, row in enumerate(rows))
    first = next(lines, "[")
    replace(path, (text for part in ([first], lines, ["\n]\n"]) for text in part))


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """JSONL."""
    replace(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def replace(path: Path, texts: Iterable[str]) -> None:
    """Written aside, and put in place in one move."""
    draft = path.with_name(f".{path.name}.new")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(texts)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
