"""The second stage: the passes over the prompts, joined by prompt id, in all_outputs.json."""

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from alignment.data.mixing import counts_text
from alignment.data.prompts import Prompt, as_published
from alignment.errors import UserError

from .prompts import stage_rows, texts_of
from .responses import sampling_records
from .stages import FOLDER, read_record, write_json, write_rows

logger = logging.getLogger(__name__)

JOINED = "all_outputs"
EMPTY = "empty responses"
ABSENT = "prompts that not every file has"
IDENTICAL = "prompts whose responses are all identical"
TOO_FEW = "prompts with fewer than two responses"


def post_process(folder: Path) -> None:
    """Write all_outputs.json. Done anew each time, in one move: it takes seconds. One process does it."""
    state = PartialState()
    if state.is_main_process:
        files = pass_files(folder)
        rows, counts = join(files)
        if not rows:
            raise UserError(f"{folder}: no prompt has two different responses ({counts_text(counts)})")
        write_rows(folder / f"{JOINED}.json", rows)
        (folder / FOLDER).mkdir(exist_ok=True)
        record = {"files": [file.name for file in files], "counts": dict(counts), "sampling": sampling_records(folder)}
        write_json(folder / FOLDER / f"{JOINED}.json", record)
        logger.info("%s: %s prompts from %s files.", folder / f"{JOINED}.json", f"{len(rows):,}", len(files))
        if counts:
            logger.info("left out or remarkable: %s.", counts_text(counts))
    state.wait_for_everyone()


def pass_files(folder: Path) -> list[Path]:
    """output*.json, by seed. Raises UserError if there are fewer than two, or if one is only half made."""
    files = sorted(folder.glob("output*.json"), key=lambda file: [int(word) for word in re.findall(r"\d+", file.name)])
    half = sorted({path.name.split(".")[0] for path in (folder / FOLDER).glob("output*.jsonl")})
    half = [name for name in half if (read_record(folder / FOLDER, name) or {}).get("state") != "finished"]
    if half:
        raise UserError(
            f"{folder}: {', '.join(half)} {'is' if len(half) == 1 else 'are'} half done; let decode.py finish first, or delete "
            f"{folder / FOLDER / half[0]}.*"
        )
    if len(files) < 2:
        found = f"only {files[0].name}" if files else "none"
        raise UserError(f"{folder}: holds {found} of the files output*.json; pairs need two (decode.py, another --seed)")
    return files


def join(files: list[Path]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Every prompt with the responses that any file has for it, and counts of what was left out."""
    prompts: dict[str, Prompt] = {}
    responses: dict[str, list[dict[str, Any]]] = {}
    for file in tqdm(files, desc="Joining", unit=" files"):
        for row, prompt, place in stage_rows(file):
            prompts.setdefault(prompt.id, prompt)
            for text in texts_of(row, "generated_text", place):
                kept = {"text": text, "file": file.stem}
                responses.setdefault(prompt.id, []).append(kept)
    counts: Counter[str] = Counter()
    rows = []
    for key, prompt in prompts.items():
        given = responses[key]
        spoken = [response for response in given if response["text"].strip()]
        counts[EMPTY] += len(given) - len(spoken)
        counts[ABSENT] += len({response["file"] for response in given}) < len(files)
        texts = [response["text"] for response in spoken]
        if len(texts) < 2:
            counts[TOO_FEW] += 1
        elif len(set(texts)) == 1:
            counts[IDENTICAL] += 1
        else:
            rows.append(
                {
                    "prompt_id": key,
                    "prompt": as_published(prompt),
                    "all_generated_responses": texts,
                    "files": [response["file"] for response in spoken],
                }
            )
    return rows, +counts
