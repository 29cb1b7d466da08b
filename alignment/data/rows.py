"""One row as it comes -> its canonical columns, and what is wrong with it."""

import hashlib
import reprlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")

UNREADABLE = "cannot be read"
IDENTICAL = "identical responses"
REPEATED = "prompt repeated in a response"
HARMLESS = {IDENTICAL, REPEATED}

Turn = dict[str, str]


class Finding(NamedTuple):
    """What is wrong, or only remarkable, in a row: the reason under which it is counted, and a sentence."""

    reason: str
    detail: str


def code_digest() -> str:
    # datasets knows an imported function by its name alone: without this, cached rows would outlive the rules below.
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def read_batch(batch: dict[str, list], *, read: Callable[[dict[str, Any]], dict[str, list]], code: str) -> dict[str, list]:
    """Columns in, canonical columns and findings out. `code` is there for the cache key only."""
    rows = [read(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    return columns | {"findings": [[finding._asdict() for finding in row["findings"]] for row in rows]}


def read_pair(row: dict[str, Any]) -> dict[str, list]:
    """prompt, chosen and rejected as lists of turns, and findings; all three are empty for an unreadable row.

    A prompt that is no list of turns is ignored: the prompt is then all chosen turns but the last.
    """
    problem = unreadable("chosen", row["chosen"]) or unreadable("rejected", row["rejected"])
    prompt = turns(row["prompt"]) if unreadable("prompt", row.get("prompt")) is None else []
    if not problem and not prompt and len(row["chosen"]) == 1:
        problem = "no prompt turn: chosen is a response only, and there is no prompt list of {role, content}"
    if problem:
        return {"prompt": [], "chosen": [], "rejected": [], "findings": [Finding(UNREADABLE, problem)]}

    given = [turns(row["chosen"]), turns(row["rejected"])]
    repeats = [bool(prompt) and len(said) > len(prompt) and said[: len(prompt)] == prompt for said in given]
    chosen, rejected = (said if repeat else prompt + said for said, repeat in zip(given, repeats, strict=True))
    response = slice(len(prompt), None) if prompt else slice(-1, None)
    pair = {"prompt": prompt or chosen[:-1], "chosen": chosen[response], "rejected": rejected[response]}

    findings = list(islice(pair_faults(chosen, rejected), 1))
    if any(repeats):
        findings.append(Finding(REPEATED, "a response repeats the prompt; the repeated turns are removed"))
    if pair["chosen"] == pair["rejected"]:
        findings.append(Finding(IDENTICAL, "chosen and rejected are the same response"))
    return pair | {"findings": findings}


def read_conversation(row: dict[str, Any]) -> dict[str, list]:
    """messages as a list of turns, and findings."""
    problem = unreadable("messages", row["messages"])
    if problem:
        return {"messages": [], "findings": [Finding(UNREADABLE, problem)]}
    messages = turns(row["messages"])
    return {"messages": messages, "findings": list(islice(conversation_faults("messages", messages), 1))}


def turns(value: list[dict[str, Any]]) -> list[Turn]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def unreadable(column: str, value: Any) -> str | None:
    """Why a value is not a list of {role, content}; None if it is one."""
    if value is None:
        return f"{column} is null"
    if not isinstance(value, list):
        return f"{column} is {reprlib.repr(value)}, not a list of {{role, content}}"
    if not value:
        return f"{column} is an empty list"
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            return f"{column} has the turn {reprlib.repr(turn)}; a turn needs a role and a content, both text"
    return None


def pair_faults(chosen: list[Turn], rejected: list[Turn]) -> Iterator[Finding]:
    """Both are whole conversations, prompt and response."""
    if chosen[:-1] != rejected[:-1]:
        yield Finding("earlier turns differ", "chosen and rejected differ before the last turn; they must share the prompt")
    yield from conversation_faults("chosen", chosen)
    yield from conversation_faults("rejected", rejected)


def conversation_faults(column: str, conversation: list[Turn]) -> Iterator[Finding]:
    for turn in conversation:
        if turn["role"] not in ROLES:
            yield Finding("unknown role", f"{column} has a turn by {turn['role']!r}; a role is {', '.join(ROLES)}")
    *earlier, last = conversation
    if last["role"] != "assistant":
        yield Finding(
            "last turn is not the assistant's",
            f"{column} ends with a {last['role']} turn; the last turn must be the assistant's",
        )
    if not last["content"].strip():
        yield Finding("empty response", f"the last turn of {column} is empty")
    # An empty system turn is a usual way of having none.
    if any(turn["role"] != "system" and not turn["content"].strip() for turn in earlier):
        yield Finding("empty turn", f"{column} has an empty turn before the last one")
