"""All recipes of an experiment, checked together before the first run starts."""

import itertools
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from ..errors import Problem, UserError
from ..pipeline import Method, recipe_checks
from ..recipe.configs import DataArguments, ModelArguments, RunArguments
from ..recipe.parser import Check, H4ArgumentParser, RecipeError, full_recipe
from ..run.resuming import DIVISION, HARMLESS, recipe_differences
from ..run.run_folder import read_status
from .cells import Cell
from .matrix import Axis, Launch, Matrix

OF_THE_CELL = ("output_dir", "run_name", "logging_dir")  # differ between cells, and change nothing
DATA = tuple(each.name for each in fields(DataArguments) if each.name != "preprocessing_num_workers")
LENGTHS = {"max_length": "length_limit", "max_prompt_length": "prompt_limit"}  # key -> what a config makes of it
MANY = 4  # names of cells in one line
# What cells have in common, unless an axis is about it: the keys that ask for it.
COMMON = {
    "tokens": (
        *DATA, *LENGTHS, "model_name_or_path", "model_revision", "tokenizer_name_or_path", "preprocessing", "bad_rows",
        "truncation_mode",
    ),
    "batches": (
        "per_device_train_batch_size", "gradient_accumulation_steps", "total_train_batch_size", "dataloader_drop_last",
    ),
    "the order of rows": ("seed", "data_seed", "train_sampling_strategy"),
    "steps": ("num_train_epochs", "max_steps", "early_stopping_patience", "early_stopping_threshold"),
    "what is evaluated": ("train_probe", "score_step_0"),
}  # fmt: skip


@dataclass(frozen=True)
class Parsed:
    """A cell whose recipe stands for itself."""

    cell: Cell
    model_args: ModelArguments
    data_args: DataArguments
    args: RunArguments
    rows: str  # what a row is, to this method
    processes: int
    full_recipe: str

    @property
    def rows_per_step(self) -> int:
        args = self.args
        return (
            args.total_train_batch_size or args.per_device_train_batch_size * args.gradient_accumulation_steps * self.processes
        )

    def setting(self, key: str) -> Any:
        """What a key of a recipe comes to; None where the method has none such."""
        for owner in (self.data_args, self.model_args):
            if hasattr(owner, key):
                return getattr(owner, key)
        return getattr(self.args, LENGTHS.get(key, key), getattr(self.args, key, None))

    def common(self, what: str) -> dict[str, Any]:
        """What this cell has of one of COMMON."""
        if what == "batches":
            return {"rows a step": self.rows_per_step, "dataloader_drop_last": self.args.dataloader_drop_last}
        return {key: self.setting(key) for key in COMMON[what]} | ({"a row": self.rows} if what == "tokens" else {})

    def everything(self) -> dict[str, Any]:
        """Every setting that makes the run what it is."""
        owners = (self.model_args, self.data_args, self.args)
        settings = {each.name: getattr(owner, each.name) for owner in owners for each in fields(owner) if each.init}
        return {"method": self.cell.method, **{key: value for key, value in settings.items() if key not in OF_THE_CELL}}


def check_cells(matrix: Matrix, cells: Sequence[Cell], texts: Mapping[str, str], methods: Mapping[str, Method]) -> list[str]:
    """Lines about the recipes that a reader should know. texts: each cell's recipe, by its name.

    Raises RecipeError with everything that is wrong with any of them.
    """
    complaints: dict[str, list[str]] = defaultdict(list)  # what -> names of the cells
    notices: dict[str, list[str]] = defaultdict(list)
    parsed = []
    processes = launched_processes(matrix.launch)
    for cell in cells:
        if cell.dropped:
            notices[f"left out, because {cell.method} does not read it: {', '.join(cell.dropped)}"].append(cell.name)
        try:
            objects, own_notices, whole = parse(
                texts[cell.name], methods[cell.method], on_this_machine=matrix.launch.on == "local"
            )
        except RecipeError as error:
            for complaint in error.complaints:
                complaints[complaint].append(cell.name)
            continue
        for notice in own_notices:
            notices[notice].append(cell.name)
        parsed.append(Parsed(cell, *objects, ", ".join(methods[cell.method].data.columns), processes, whole))
    for each in parsed:
        for problem in cell_problems(each):
            complaints[str(problem)].append(each.cell.name)
    lines = [*by_cells(complaints, cells), *incomparable(matrix.axes, parsed), *equal(parsed), *begun_otherwise(parsed)]
    if lines:
        raise RecipeError([f"{matrix.path}: {line}" for line in lines])
    return by_cells(notices, cells)


def launched_processes(launch: Launch) -> int:
    if launch.gpus_per_node is not None:
        return max(launch.gpus_per_node, 1)
    try:
        return load_config_from_file(str(launch.accelerate_config)).num_processes or 1
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{launch.accelerate_config}: is no launch config of accelerate's ({error})") from error


def parse(text: str, method: Method, *, on_this_machine: bool) -> tuple[tuple[Any, ...], list[str], str]:
    """The dataclasses of a recipe, what the parser remarks on, and every setting as YAML. Raises RecipeError.

    A machine that only submits runs, or whose GPUs are for the runs alone, is not asked what it can compute.
    """
    able = on_this_machine and not torch.cuda.is_available()
    parser = H4ArgumentParser((ModelArguments, DataArguments, method.config))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(text, encoding="utf-8")
        place = re.compile(rf"{re.escape(str(path))}(, line \d+)?: ")
        checks = [partial(as_of_a_run, check) for check in recipe_checks(method)]
        try:
            objects = parser.parse([str(path), *([] if able else ["--prepare_only"])], checks)
        except RecipeError as error:
            raise RecipeError([place.sub("", complaint) for complaint in error.complaints]) from None
    recipe = objects[-1].followed_defaults | parser.recipe
    return objects, [place.sub("", notice) for notice in parser.notices], full_recipe(recipe, parser.dataclass_types)


def as_of_a_run(check: Check, values: SimpleNamespace) -> list[Problem]:
    return check(SimpleNamespace(**vars(values) | {"prepare_only": False}))


def cell_problems(parsed: Parsed) -> Iterable[Problem]:
    """What a run may do, and a cell may not."""
    args = parsed.args
    if not args.do_eval:
        yield Problem("do_eval", args.do_eval, "cells are compared by their held-out rows; set it to true")
    if args.push_to_hub:
        yield Problem("push_to_hub", True, "no cell is pushed; set it to false, and push what the experiment ends with")
    forward = args.per_device_train_batch_size * parsed.processes
    if (total := args.total_train_batch_size) and total % forward:
        advice = f"is no multiple of {forward} (per_device_train_batch_size x {parsed.processes} processes)"
        yield Problem("total_train_batch_size", total, advice)


def by_cells(lines: Mapping[str, list[str]], cells: Sequence[Cell]) -> list[str]:
    """Each line once, with the cells that it is about."""
    return [f"{'all cells' if len(names) == len(cells) else some_of(names)}: {line}" for line, names in lines.items()]


def some_of(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MANY else f"{', '.join(names[:MANY])} and {len(names) - MANY} more"


# ---- What makes cells comparable ----


def incomparable(axes: Sequence[Axis], parsed: Sequence[Parsed]) -> Iterable[str]:
    """Where cells differ in what no axis is about."""
    for what, keys in COMMON.items():
        asking = [axis.name for axis in axes if axis.asks_for(*keys)]
        groups: dict[tuple, list[Parsed]] = defaultdict(list)
        for each in parsed:
            groups[tuple(each.cell.values[name] for name in asking)].append(each)
        for first, *others in groups.values():
            other = next((other for other in others if other.common(what) != first.common(what)), None)
            if other is not None:
                mine, its = first.common(what), other.common(what)
                differing = "; ".join(f"{key}: {mine[key]!r} and {its[key]!r}" for key in mine if mine[key] != its[key])
                yield (
                    f"{first.cell.name} and {other.cell.name} differ in {what} ({differing}), which no axis asks for: set it "
                    "in settings, or in every value of one axis"
                )
                break


def equal(parsed: Sequence[Parsed]) -> Iterable[str]:
    """Cells that are the same run."""
    for one, other in itertools.combinations(parsed, 2):
        if one.everything() == other.everything():
            yield f"{one.cell.name} and {other.cell.name} are the same run: what tells them apart has no effect"


def begun_otherwise(parsed: Sequence[Parsed]) -> Iterable[str]:
    """Cells that were begun by another recipe."""
    for each in parsed:
        try:
            before = yaml.safe_load((each.cell.run / "recipe.yaml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        differences = recipe_differences(before, yaml.safe_load(each.full_recipe), (*HARMLESS, *DIVISION))
        rows = (read_status(each.cell.run) or {}).get("rows_per_step", each.rows_per_step)
        differences += [f"  rows a step: {rows} then, {each.rows_per_step} now"] if rows != each.rows_per_step else []
        if differences:
            changes = ";".join(differences).strip()
            yield f"{each.cell.folder} holds a run of another recipe ({changes}): choose another output_dir, or delete it"
