"""One row as it comes -> its canonical columns, and what is wrong with it."""

import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import not_utf8

ROLES = ("system", "developer", "user", "assistant", "tool")
# Columns beside the conversations that a chat template may read.
TEMPLATE_COLUMNS = ("tools", "documents")
# Keys of a turn, beside its content, that hold what somebody said; others (an id, a score) only tell of it.
SAID = ("tool_calls", "reasoning_content", "reasoning", "thinking")

UNREADABLE = "cannot be read"
IDENTICAL = "identical responses"
REPEATED = "prompt repeated in a response"
REFUSED = "refused by the template"
HARMLESS = {IDENTICAL, REPEATED}

Turn = dict[str, Any]


class Finding(NamedTuple):
    """What is wrong, or only remarkable, in a row: the reason under which it is counted, and a sentence."""

    reason: str
    detail: str


def code_digest() -> str:
    # datasets knows an imported function by its name alone: without this, cached rows would outlive the rules below.
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def read_batch(
    batch: dict[str, list], *, read: Callable[[dict[str, Any]], dict[str, list]], columns: tuple[str, ...], code: str
) -> dict[str, list]:
    """Records and their places in; canonical columns, places and findings out. `code` is there for the cache key only."""
    rows = [read_record(record, read, columns) for record in batch["record"]]
    canonical = {column: [[plain(turn) for turn in row[column]] for row in rows] for column in columns}
    findings = [[finding._asdict() for finding in row["findings"]] for row in rows]
    return canonical | {"more": [more(row, columns) for row in rows], "place": batch["place"], "findings": findings}


def read_record(record: bytes, read: Callable[[dict[str, Any]], dict[str, list]], columns: tuple[str, ...]) -> dict[str, Any]:
    problem = None
    try:
        row = json.loads(record.decode("utf-8"))
    except UnicodeDecodeError as error:
        problem = not_utf8(error)
    except json.JSONDecodeError as error:
        problem = f"is no JSON ({error.msg.removesuffix(' at')} at column {error.colno}); every line holds one row, {{...}}"
    except ValueError as error:  # a number of thousands of digits
        problem = f"cannot be read: {error}"
    except RecursionError:
        problem = "is nested too deeply"
    else:
        if isinstance(row, dict):
            given = {column: template_column(row, column) for column in TEMPLATE_COLUMNS if row.get(column)}
            return {**read(row), **given}
        problem = f"is {reprlib.repr(row)}, not a row {{...}}"
    return {**{column: [] for column in columns}, "findings": [Finding(UNREADABLE, problem)]}


def template_column(row: dict[str, Any], column: str) -> Any:
    """A list of mappings; data sets that must have one type a column keep it as JSON text."""
    value = row[column]
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
    return value


def plain(turn: Turn) -> Turn:
    return {"role": turn["role"], "content": turn["content"]}


def more(row: dict[str, Any], columns: tuple[str, ...]) -> str:
    """As JSON, what a template may read beside roles and contents; nothing where there is nothing."""
    beside = {column: keys for column in columns if any(keys := [own_keys(turn) for turn in row[column]])}
    beside |= {column: row[column] for column in TEMPLATE_COLUMNS if row.get(column)}
    return json.dumps(beside) if beside else ""


def own_keys(turn: Turn) -> Turn:
    return {key: value for key, value in turn.items() if key not in ("role", "content")}


def whole_turns(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """A row with its turns as they came, and the columns beside them: what `more` put aside is put back."""
    beside = json.loads(row["more"]) if row.get("more") else {}
    keys = {column: beside.pop(column, None) for column in columns}
    whole = {
        column: [turn | own for turn, own in zip(row[column], keys[column], strict=True)] if keys[column] else row[column]
        for column in columns
    }
    return {**row, **whole, **beside}


def read_pair(row: dict[str, Any]) -> dict[str, list]:
    """prompt, chosen and rejected as lists of turns, and findings; all three are empty for an unreadable row.

    A prompt that is no list of turns is ignored: the prompt is then all chosen turns but the last.
    """
    problem = unreadable("chosen", row.get("chosen")) or unreadable("rejected", row.get("rejected"))
    prompt = turns(row["prompt"]) if unreadable("prompt", row.get("prompt")) is None else []
    if not problem and not prompt and len(row["chosen"]) == 1:
        problem = f"no prompt turn: chosen is a response only, and {unreadable('prompt', row.get('prompt'))}"
    if problem:
        return {"prompt": [], "chosen": [], "rejected": [], "findings": [Finding(UNREADABLE, problem)]}

    given = [turns(row["chosen"]), turns(row["rejected"])]
    repeats = [bool(prompt) and len(said_) > len(prompt) and same(said_[: len(prompt)], prompt) for said_ in given]
    chosen, rejected = (said_ if repeat else prompt + said_ for said_, repeat in zip(given, repeats, strict=True))
    response = slice(len(prompt), None) if prompt else slice(-1, None)
    pair = {"prompt": prompt or chosen[:-1], "chosen": chosen[response], "rejected": rejected[response]}

    findings = list(islice(chain(pair_faults(chosen, rejected), response_faults(pair)), 1))
    if any(repeats):
        findings.append(Finding(REPEATED, "a response repeats the prompt; the repeated turns are removed"))
    if same(pair["chosen"], pair["rejected"]):
        findings.append(Finding(IDENTICAL, "chosen and rejected are the same response"))
    return pair | {"findings": findings}


def read_conversation(row: dict[str, Any]) -> dict[str, list]:
    """messages as a list of turns, and findings."""
    problem = unreadable("messages", row.get("messages"))
    if problem:
        return {"messages": [], "findings": [Finding(UNREADABLE, problem)]}
    messages = turns(row["messages"])
    return {"messages": messages, "findings": list(islice(conversation_faults("messages", messages), 1))}


def turns(value: list[dict[str, Any]]) -> list[Turn]:
    """Turns without the keys that are null; a turn that only calls tools has an empty content."""
    return [{"content": "", **{key: entry for key, entry in turn.items() if entry is not None}} for turn in value]


def said(turn: Turn) -> Turn:
    return {key: turn[key] for key in ("role", "content", *SAID) if turn.get(key)}


def same(these: list[Turn], those: list[Turn]) -> bool:
    """Whether the same was said, whatever else the turns tell."""
    return [said(turn) for turn in these] == [said(turn) for turn in those]


# Who speaks in a column that has one turn; several turns are told by a list alone.
ROLE_OF = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def unreadable(column: str, value: Any) -> str | None:
    """Why a value is not a list of {role, content}; None if it is one."""
    if value is None:
        return f"{column} is null"
    if isinstance(value, str) and column in ROLE_OF:
        turns_of_it = f'[{{"role": "{ROLE_OF[column]}", "content": {column.upper()}}}]'
        return f"{column} is the text {reprlib.repr(value)}, not a list of turns: {turns_of_it}"
    if not isinstance(value, list):
        return f"{column} is {reprlib.repr(value)}, not a list of {{role, content}}"
    if not value:
        return f"{column} is an empty list"
    for turn in value:
        if not is_turn(turn):
            return f"{column} has the turn {reprlib.repr(turn)}; a turn needs a role and a content, both text"
        if not is_unicode(turn["role"] + (turn.get("content") or "")):
            return f"{column} has the turn {reprlib.repr(turn)}, with half of a character (\\ud800 to \\udfff) in it"
    return None


def is_turn(value: Any) -> bool:
    """{role, content}; a turn that calls tools may have no content."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str) or (value.get("content") is None and bool(value.get("tool_calls")))


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def pair_faults(chosen: list[Turn], rejected: list[Turn]) -> Iterator[Finding]:
    """Both are whole conversations, prompt and response."""
    if not same(chosen[:-1], rejected[:-1]):
        yield Finding("earlier turns differ", "chosen and rejected differ before the last turn; they must share the prompt")
    yield from conversation_faults("chosen", chosen)
    yield from conversation_faults("rejected", rejected)


def response_faults(pair: dict[str, list[Turn]]) -> Iterator[Finding]:
    for side in ("chosen", "rejected"):
        roles = [turn["role"] for turn in pair[side]]
        if roles != ["assistant"]:
            yield Finding(
                "more than a reply in a response",
                f"behind the prompt, {side} goes on with {len(roles)} turns ({', '.join(roles)}), which all count as its "
                "response; a response is one assistant turn, so prompt must be the exact beginning of chosen and rejected",
            )


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
    if not last["content"].strip() and not any(last.get(key) for key in SAID):
        yield Finding("empty response", f"the last turn of {column} is empty")
    # An empty system turn is a usual way of having none.
    if any(turn["role"] != "system" and not turn["content"].strip() and not turn.get("tool_calls") for turn in earlier):
        yield Finding("empty turn", f"{column} has an empty turn before the last one")
