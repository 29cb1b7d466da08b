"""From a matrix to the recipes of its cells."""

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..pipeline import Method
from ..recipe.configs import DataArguments, ModelArguments
from ..recipe.parser import H4ArgumentParser, dump_recipe, read_recipe
from ..recipe.values import Mismatch
from .matrix import METHOD, Matrix, Value

# What a recipe chooses its objective by; another method's choice means nothing to a cell.
CHOOSES = "loss_type"


@dataclass(frozen=True)
class Cell:
    """One run of the experiment, under the names of its values."""

    name: str
    values: Mapping[str, str]  # axis -> name of the value
    method: str
    recipe: Mapping[str, Any]  # as it is written, without output_dir and run_name
    dropped: tuple[str, ...]  # keys of the base that the method does not read
    folder: Path
    is_fallback: bool = False

    @property
    def run(self) -> Path:
        """The run's output_dir."""
        return self.folder / "run"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def beside(self, axis: str) -> tuple[tuple[str, str], ...]:
        """Its values on all other axes: equal for cells that differ on this one alone."""
        return tuple((name, value) for name, value in self.values.items() if name != axis)


def make_cells(matrix: Matrix, methods: Mapping[str, Method]) -> list[Cell]:
    """All cells, in the order of the axes; those of the fallback last. Raises UserError where two would have one name."""
    base = {given.key: given.value for given in read_recipe(str(matrix.base))}
    cells = [
        make_cell(matrix, base, combination, methods)
        for combination in itertools.product(*(axis.values for axis in matrix.axes))
    ]
    axis = matrix.about(METHOD)
    for value in matrix.fallback:
        columns = [(value,) if other == axis else other.values for other in matrix.axes]
        cells += [make_cell(matrix, base, each, methods, is_fallback=True) for each in itertools.product(*columns)]
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{matrix.path}: two cells are called {', '.join(twice)}; give their values other names")
    return cells


def make_cell(
    matrix: Matrix,
    base: Mapping[str, Any],
    values: Iterable[Value],
    methods: Mapping[str, Method],
    *,
    is_fallback: bool = False,
) -> Cell:
    values = tuple(values)
    own = {key: entry for value in values for key, entry in value.keys.items()}
    method = own.pop(METHOD, matrix.method)
    name = "-".join(value.name for value in values)
    shared = replaced(base, matrix.settings, parser_of(methods[method].config)) | matrix.settings
    kept, dropped = inherited(shared, own, method, methods)
    by_axis = {axis.name: value.name for axis, value in zip(matrix.axes, values, strict=True)}
    return Cell(name, by_axis, method, kept | own, dropped, matrix.output_dir / "cells" / name, is_fallback)


# ---- What a cell takes from the base ----


def inherited(
    base: Mapping[str, Any], own: Mapping[str, Any], method: str, methods: Mapping[str, Method]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The base's keys that `own` leaves alone and the method reads; and those that only other methods read.

    A key that no method knows is kept: the parser says what is wrong with it.
    """
    parser = parser_of(methods[method].config)
    others = [parser_of(other.config) for name, other in methods.items() if name != method]
    left = replaced(base, own, parser)
    dropped = [
        key
        for key, value in left.items()
        if not reads(parser, key, value) and any(reads(other, key, value) for other in others)
    ]
    kept = {key: value for key, value in left.items() if key not in dropped}
    unread = unread_keys(methods[method].config, kept | dict(own))
    return {key: value for key, value in kept.items() if key not in unread}, tuple(
        dropped + [key for key in kept if key in unread]
    )


def replaced(base: Mapping[str, Any], own: Mapping[str, Any], parser: H4ArgumentParser) -> dict[str, Any]:
    """What is left of the base beside `own`, in whatever spelling."""
    keys = {parser.present_key(key) for key in own}
    return {key: value for key, value in base.items() if parser.present_key(key) not in keys}


@functools.cache
def parser_of(config: type) -> H4ArgumentParser:
    """For what it knows of keys; what parses a recipe is a fresh one."""
    return H4ArgumentParser((ModelArguments, DataArguments, config))


def reads(parser: H4ArgumentParser, key: str, value: Any) -> bool:
    """Whether a method has a use for a key, in one of its spellings; or, of a choice of objective, for this one."""
    config = parser.dataclass_types[-1]
    if key == CHOOSES and value not in getattr(config, "loss_types", ()):
        return rewrites(config, key, value)
    return key in parser.targets or key in parser.old_spellings or rewrites(config, key, value)


def rewrites(config: type, key: str, value: Any) -> bool:
    """Whether the method knows the key as another library's spelling of one of its own."""
    try:
        return hasattr(config, "rewrite") and config.rewrite({key: value})[0] != {key: value}
    except Mismatch:
        return True


def unread_keys(config: type, recipe: Mapping[str, Any]) -> list[str]:
    """Keys that another objective of this method would read, and this recipe's does not."""
    own_keys = getattr(config, "own_keys", ())
    if not own_keys or recipe.get(CHOOSES, config.loss_type) not in config.loss_types:
        return []
    objective = object.__new__(config)  # its choice alone; the parser is going to build and check the whole
    vars(objective).update({key: recipe[key] for key in (*own_keys, CHOOSES) if key in recipe})
    return [key for key in objective.unread() if key in recipe]


# ---- What is written ----


def recipe_text(cell: Cell, command: str, experiment: str) -> str:
    """The cell's recipe, to be run by itself too. command: what launches it."""
    keys = {**cell.recipe, "output_dir": str(cell.run), "run_name": f"{experiment}-{cell.name}"}
    return f"# {command}\n# Cell {cell.name} of {experiment}.\n\n{dump_recipe(keys)}"
