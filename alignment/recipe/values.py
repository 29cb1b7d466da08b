"""A value as its field declares it, whether it comes from YAML or as the text of a command line."""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


class Mismatch(Exception):
    """A value of the wrong type; the message says what is expected."""


class Doubtful(str):
    """What YAML 1.1 reads as another number than its writer: 010 as 8, 1:30 as 90. Where text is meant it is that text."""


def read_as(kind: Any, value: Any) -> Any:
    """value as the annotation `kind`, from YAML or as text of the command line. Raises Mismatch."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return read_union(arguments, value)
    if origin is Literal:
        return read_choice(arguments, value)
    if isinstance(origin, type) and issubclass(origin, Enum):
        return read_choice([member.value for member in origin], value)
    if origin is list:
        return read_list(arguments[0], value)
    if origin is dict:
        return read_dict(arguments[1] if arguments else Any, value)
    if origin in SCALARS:
        return SCALARS[origin](value)
    raise Mismatch("null")  # an object that no recipe can spell, such as ParallelismConfig


def read_union(kinds: Sequence[Any], value: Any) -> Any:
    if NoneType in kinds and (value is None or (isinstance(value, str) and value.strip().lower() in ("null", "none"))):
        return None
    expected = []
    for kind in candidates(kinds, value):
        try:
            return read_as(kind, value)
        except Mismatch as mismatch:
            expected.append(str(mismatch))
    raise Mismatch(" or ".join(expected))


def candidates(kinds: Sequence[Any], value: Any) -> list[Any]:
    """The members of a union that `value` may be, the likeliest first."""
    kinds = [kind for kind in kinds if kind is not NoneType]
    if str not in kinds:
        return kinds
    others = [kind for kind in kinds if kind is not str]
    if any(isinstance(kind, type) and issubclass(kind, Enum) for kind in others):
        return others  # `SchedulerType | str` means a name of the enum
    if not isinstance(value, str):
        return [*others, str]
    # Any text is a str, and any text can stand for a list, so the text's form decides.
    form = dict if value.startswith("{") else list if value.startswith("[") or "," in value else None
    containers = [kind for kind in others if (get_origin(kind) or kind) in (dict, list)]
    matching = [kind for kind in containers if (get_origin(kind) or kind) is form]
    return matching or [*(kind for kind in others if kind not in containers), str]


def read_choice(choices: Collection[Any], value: Any) -> Any:
    if value is False and "no" in choices:
        return "no"  # YAML reads a bare no as false
    for choice in choices:
        spelt_out = isinstance(choice, bool) and isinstance(value, str) and value.lower() == str(choice).lower()
        if spelt_out or (type(value), value) == (type(choice), choice):
            return choice
    raise Mismatch(f"{'one of ' if len(choices) > 1 else ''}{', '.join(map(str, choices))}")


def read_list(item_kind: Any, value: Any) -> list[Any]:
    if isinstance(value, str):
        text = value.strip()
        value = from_json(text) if text.startswith("[") else [item.strip() for item in text.split(",")] if text else []
    if not isinstance(value, list):
        raise Mismatch("a list")
    if "" in value:
        raise Mismatch("a list without empty entries")
    try:
        return [read_as(item_kind, item) for item in value]
    except Mismatch as mismatch:
        raise Mismatch(f"a list of entries, each {mismatch}") from None


def read_dict(value_kind: Any, value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.startswith("{"):
        value = from_json(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Mismatch('a mapping such as {"key": 1}')
    try:
        return {str(key): read_as(value_kind, entry) for key, entry in value.items()}
    except Mismatch as mismatch:
        raise Mismatch(f"a mapping to entries, each {mismatch}") from None


def from_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except ValueError as error:
        raise Mismatch(f"JSON ({error})") from None


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key is given twice")
    return entries


def read_bool(value: Any) -> bool:
    spelling = str(value).strip().lower() if isinstance(value, str | int) else None
    if spelling in ("true", "yes", "on", "y", "t", "1"):
        return True
    if spelling in ("false", "no", "off", "n", "f", "0"):
        return False
    raise Mismatch("true or false")


def read_int(value: Any) -> int:
    number = number_in(value)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    if not isinstance(number, int):
        raise Mismatch("a whole number")
    return number


def read_float(value: Any) -> float:
    try:
        number = float(number_in(value))
    except OverflowError:
        number = math.nan
    if math.isnan(number):
        raise Mismatch("a number")
    return number


def number_in(value: Any) -> int | float:
    """The number that value is or spells; nan where it is none."""
    if isinstance(value, Doubtful):
        raise Mismatch(f"a decimal number without leading zeros or colons (YAML would read {value} as another)")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return math.nan


def read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise Mismatch("text (in YAML perhaps with quotes)")
    return str(value)


def text(value: Any) -> Any:
    """A member of an enum as a recipe spells it."""
    return getattr(value, "value", value)


def read_anything(value: Any) -> Any:
    """What no field describes, such as an entry of lr_scheduler_kwargs: as YAML reads it, doubtful numbers aside."""
    if isinstance(value, Doubtful):
        number_in(value)
    if isinstance(value, dict):
        return {read_anything(key): read_anything(entry) for key, entry in value.items()}
    return [read_anything(entry) for entry in value] if isinstance(value, list) else value


SCALARS: dict[Any, Callable[[Any], Any]] = {
    Any: read_anything,
    bool: read_bool,
    int: read_int,
    float: read_float,
    str: read_text,
}


# ---- Paths ----

VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expanded(path: str) -> str:
    """The path with ~ and $VARIABLES as a shell would have them. Raises Mismatch where one of them stands for nothing."""
    whole = VARIABLE.sub(lambda match: variable(match[1] or match[2]), path)
    try:
        return str(Path(whole).expanduser()) if whole.startswith("~") else whole
    except RuntimeError:
        raise Mismatch(f"a path: no user is called {whole.split('/')[0][1:]!r}") from None


def variable(name: str) -> str:
    if not os.environ.get(name):
        raise Mismatch(f"a path: the environment variable {name} is not set, and a folder would be named after it")
    return os.environ[name]


def expanded_input(path: str) -> str:
    """As `expanded`, of something that is to be read: what exists under the very name is meant."""
    return path if Path(path).exists() else expanded(path)


def expanded_template(template: str) -> str:
    """As `expanded_input`, where a path is told from Jinja text by its ending."""
    return expanded_input(template) if template.endswith(".jinja") else template
