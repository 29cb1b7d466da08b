"""Every value of a recipe and where it comes from: a line of the file, an option, another setting, or the default."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from ..recipe.configs import RunArguments
from ..recipe.parser import H4ArgumentParser, Setting, is_secret
from ..recipe.values import text


class Origin(NamedTuple):
    """One field as the run would have it."""

    key: str
    value: Any
    source: str  # "line 12", "command line", "default", or the setting that it follows from
    is_default: bool = False


def origins(parser: H4ArgumentParser, args: RunArguments) -> list[Origin]:
    """Of every field of a parsed recipe: first what was given, in its order, then what follows, then the defaults."""
    given = [origin_of(key, setting, parser.place) for key, setting in parser.settings.items()]
    derived = [Origin(key, value, "default of this objective") for key, value in args.followed_defaults.items()]
    if args.total_train_batch_size is not None:
        source = f"total_train_batch_size / ({args.per_device_train_batch_size} x {args.planned_processes} processes)"
        derived.append(Origin("gradient_accumulation_steps", args.gradient_accumulation_steps, source))
    known = {origin.key for origin in derived}
    rest = [
        Origin(key, value, "default", is_default=True)
        for key, value in vars(parser.values({})).items()
        if key not in parser.settings and key not in known
    ]
    return [*(origin for origin in given if origin.key not in known), *derived, *rest]


def origin_of(key: str, setting: Setting, place: str) -> Origin:
    given = setting.given
    source = "command line" if given.is_option else given.place.removeprefix(f"{place}, ")
    return Origin(key, setting.value, source if given.key == key else f"{source}, as {given.key}")


def meant(parser: H4ArgumentParser) -> Mapping[str, Any]:
    """Every field as the recipe means it, whatever this machine can do: a dry run itself computes on the CPU."""
    return vars(parser.values(parser.settings))


def shown(origin: Origin) -> str:
    """The value in YAML, on one line; a secret is not."""
    if is_secret(origin.key) and isinstance(origin.value, str):
        return "..."
    value = yaml.safe_dump(text(origin.value), default_flow_style=True, width=10**6, allow_unicode=True)
    return value.removesuffix("\n").removesuffix("\n...").strip()
