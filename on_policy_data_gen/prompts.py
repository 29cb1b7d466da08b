"""Prompts: where they come from, and how published files spell them."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment.data.mixing import counts_text
from alignment.data.prompts import Prompt, parsed, prompt_of, records_of
from alignment.data.rows import TEMPLATE_COLUMNS, is_unicode
from alignment.data.sources import Rows, Source, load_rows, open_source
from alignment.errors import UserError

from .configs import PromptArguments

logger = logging.getLogger(__name__)

USUAL_SPLITS = ("train_prefs", "train")
USUAL_COLUMNS = ("prompt", "messages", "chosen")


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


def texts_of(row: dict[str, Any], key: str, place: str) -> list[str]:
    """A list of texts, or one text. Raises UserError for anything else."""
    value = row.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: {key} is {value!r:.80}, not text")
    if not all(map(is_unicode, texts)):
        raise UserError(f"{place}: {key} is {value!r:.80}, with half of a character (\\ud800 to \\udfff) in it")
    return texts
