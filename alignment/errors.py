"""What a user can get wrong. A message here is complete: the place, the value, the way out; it is shown without a traceback."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class UserError(Exception):
    """A mistake in what the user gave: recipe, data, model path, environment. Entry points print it and exit with 2."""


class Problem(NamedTuple):
    """One thing wrong with a config: the field, its value, and what would be right.

    is_local: it is this machine that lacks something; a dry run, which is for another one, lists it and goes on.
    """

    key: str
    value: Any
    advice: str
    is_local: bool = False

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.advice}"


class ConfigError(UserError, ValueError):
    """Every problem of one config, raised once, when it is built."""

    def __init__(self, owner: str, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join([f"{owner}:", *(f"  {problem}" for problem in self.problems)]))


class TrainingStopped(Exception):
    """Training cannot go on, and no later step would repair it. Entry points print it and exit with 1."""
