"""Prompts: what is asked of a model, and what identifies it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .chat import generation_text
from .files import Record, json_records
from .rows import SAID, plain, turns, unreadable
from .splits import turns_hash
from .template import Turns
from .tokenization import Response, add_ends, encode_texts, writes_bos


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


def row_seed(seed: int, prompt_id: str) -> int:
    """The seed of one response, whatever else is sampled beside it: 0 to 2^63 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt_id}".encode()).digest()[:8]) >> 1


def as_read(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, date: str | None) -> list[tuple[str, list[int]]]:
    """Each prompt's text, ready for a reply, and its token ids, with one bos where the tokenizer writes one itself.

    date: what a template's clock shows. Raises UserError for a prompt that the template cannot write.
    """
    add_bos = writes_bos(tokenizer)
    texts = [generation_text(prompt.turns, tokenizer, date=date) for prompt in prompts]
    ids = encode_texts(tokenizer, texts)
    whole = (add_ends(Response(row, []), tokenizer, add_eos=False, add_bos=add_bos).prompt for row in ids)
    return list(zip(texts, whole, strict=True))


# ---- Files of rows ----


def parsed(text: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: is {row!r:.80}, not a row {{...}}")
    return row


def records_of(path: Path) -> Iterator[Record]:
    try:
        yield from json_records(path, ())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
