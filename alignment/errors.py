"""What a user can get wrong. A message here is complete: the place, the value, the way out; it is shown without a traceback."""

import codecs
import socket
import ssl
from collections.abc import Sequence
from typing import Any, NamedTuple


class UserError(Exception):
    """A mistake in what the user gave: recipe, data, model path, environment. Entry points print it and exit with 2."""


# What a connection fails with.
NETWORK = (ConnectionError, TimeoutError, ssl.SSLError, socket.gaierror)
SHOWN = 200  # characters of a value that a message quotes


def shown(value: Any) -> str:
    """A value as a message quotes it: with an end."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 4 :]}"


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to do about text in another encoding. Windows' has its quotation marks at 0x80 to 0x9f."""
    byte = error.object[error.start]
    is_utf16 = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else "cp1252" if byte < 0xA0 else "latin1"
    return f"is not UTF-8 (byte 0x{byte:02x}); save it as UTF-8, e.g. iconv -f {encoding} -t utf-8"


def reason_of(error: BaseException, *, whole: bool = False) -> str:
    """What an error says, in its first line or all in one; then what a failed connection, where it began, said of itself."""
    root = error
    while (behind := root.__cause__ or root.__context__) is not None:
        root = behind
    text = str(error).strip() or type(error).__name__
    told = " ".join(text.split()) if whole else text.splitlines()[0]
    is_hidden = isinstance(root, NETWORK) and str(root) not in text
    return f"{told.rstrip('.')}: {root}" if is_hidden else told


class Problem(NamedTuple):
    """One thing wrong with a config: the field, its value, and what would be right.

    is_local: it is this machine that lacks something; a dry run, which is for another one, lists it and goes on.
    """

    key: str
    value: Any
    advice: str
    is_local: bool = False

    def __str__(self) -> str:
        return f"{self.key} = {shown(self.value)}: {self.advice}"


class ConfigError(UserError, ValueError):
    """Every problem of one config, raised once, when it is built."""

    def __init__(self, owner: str, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join([f"{owner}:", *(f"  {problem}" for problem in self.problems)]))


class TrainingStopped(Exception):
    """Training cannot go on, and no later step would repair it. Entry points print it and exit with 1."""
