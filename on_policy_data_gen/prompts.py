"""Prompts: where they come from, what identifies them, how published files spell them."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignment.data.files import Record, json_records
from alignment.data.mixing import counts_text
from alignment.data.rows import SAID, TEMPLATE_COLUMNS, plain, turns, unreadable
from alignment.data.sources import Rows, Source, load_rows, open_source
from alignment.data.splits import turns_hash
from alignment.data.template import Turns
from alignment.errors import UserError

from .configs import PromptArguments

logger = logging.getLogger(__name__)

USUAL_SPLITS = ("train_prefs", "train")
USUAL_COLUMNS = ("prompt", "messages", "chosen")


class Prompt(NamedTuple):
    """What a response answers: turns of roles and contents, the last one not the assistant's.

    id: a hash of them, the same in every file and run; rows are joined by it.
    """

    id: str
    turns: Turns


def prompt_of(value: str | list[dict[str, Any]]) -> Prompt:
    """From text, or from turns. A reply at the end is left out. Raises UserError for what is neither, or says nothing."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if problem := unreadable("the prompt", value):
        raise UserError(problem)
    given = turns(value)
    while given and given[-1]["role"] == "assistant":
        given.pop()
    if not given:
        raise UserError("the prompt has no turn but replies")
    if any(turn.get(key) for turn in given for key in SAID):
        raise UserError("the prompt has turns that call tools or reason, which are not sampled for")
    if not given[-1]["content"].strip():
        raise UserError("the prompt is empty")
    given = [plain(turn) for turn in given]
    return Prompt(turns_hash(given), given)


def as_published(prompt: Prompt) -> str | Turns:
    """A lone user turn as its text; turns otherwise."""
    first, *others = prompt.turns
    return first["content"] if first["role"] == "user" and not others else prompt.turns


def read_prompts(args: PromptArguments) -> list[Prompt]:
    """The different prompts of a source, in its order. Raises UserError if there are none."""
    source = open_source(args.data_dir, None)
    rows = source_split(source, args.prompt_split)
    wanted = (args.prompt_column,) if args.prompt_column else USUAL_COLUMNS
    found: dict[str, Prompt] = {}
    left_out: Counter[str] = Counter()
    first_place: dict[str, str] = {}
    column, read = None, 0
    for record in load_rows(rows, (*wanted, *TEMPLATE_COLUMNS)):
        row = parsed(record["record"], record["place"])
        column = column or prompt_column(row, wanted, record["place"])
        read += 1
        try:
            prompt = prompt_of(row.get(column))
            if any(row.get(beside) for beside in TEMPLATE_COLUMNS):
                raise UserError(f"the row has {' or '.join(TEMPLATE_COLUMNS)}, which no reward model here reads")
        except UserError as error:
            left_out[str(error)] += 1
            first_place.setdefault(str(error), record["place"])
            continue
        found.setdefault(prompt.id, prompt)
        if len(found) == args.max_prompts:
            break
    if not found:
        raise UserError(f"{rows.place}: no prompt in column {column!r} ({counts_text(left_out) or 'no rows'})")
    logger.info("%s: %s rows read, %s different prompts in %s.", rows.place, f"{read:,}", f"{len(found):,}", column)
    for reason, count in left_out.items():
        logger.info("left out: %s rows, first %s: %s.", f"{count:,}", first_place[reason], reason)
    return [*found.values()]


def source_split(source: Source, name: str | None) -> Rows:
    if not source.has_split_names:
        return next(iter(source.splits.values()))
    wanted = [name] if name else USUAL_SPLITS
    found = next((own for split in wanted if (own := source.find(split)) is not None), None)
    if found is None and name is None and len(source.splits) == 1:
        found = next(iter(source.splits))
    if found is None:
        what = f"no split {name!r}" if name else f"none of the splits {' and '.join(USUAL_SPLITS)}"
        raise UserError(f"{source.name}: {what}; it has {', '.join(source.splits)}; name one with --prompt_split")
    return source.splits[found]


def prompt_column(row: dict[str, Any], wanted: tuple[str, ...], place: str) -> str:
    found = next((column for column in wanted if column in row), None)
    if found is None:
        raise UserError(f"{place}: no column {' or '.join(wanted)}; it has {', '.join(row)}; name one with --prompt_column")
    return found


def parsed(text: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: is {row!r:.80}, not a row {{...}}")
    return row


# ---- Files of the stages, ours and published ones ----


def stage_rows(path: Path) -> Iterator[tuple[dict[str, Any], Prompt, str]]:
    """Rows of a JSON list or of JSONL with the prompt of each, and its place. Raises UserError for one without."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    for text, place in records_of(path):
        row = parsed(text, place)
        if "prompt" not in row:
            raise UserError(f"{place}: has no prompt; it has {', '.join(row)}")
        try:
            yield row, prompt_of(row["prompt"]), place
        except UserError as error:
            raise UserError(f"{place}: {error}") from error


def records_of(path: Path) -> Iterator[Record]:
    try:
        yield from json_records(path, ())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def texts_of(row: dict[str, Any], key: str, place: str) -> list[str]:
    """A list of texts, or one text. Raises UserError for anything else."""
    value = row.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: {key} is {value!r:.80}, not text")
    return texts
