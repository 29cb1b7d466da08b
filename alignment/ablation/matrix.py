"""MATRIX.yaml: a base recipe, and what is varied."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipe.parser import RENAMED, SWITCHES, Given, RecipeError, closest, read_recipe, suggestion
from ..recipe.values import Doubtful, Mismatch, expanded

KEYS = ("base", "settings", "method", "axes", "one_at_a_time", "fallback", "launch", "output_dir")
OWN_LAUNCH_KEYS = ("on", "accelerate_config", "gpus_per_node", "hours")
PLACES = ("local", "slurm")
OUTPUTS = Path("outputs/ablations")
# Names become folders.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*$")
# What tells the folder of one cell from another's is no axis.
RESERVED = ("output_dir", "prepare_only", "resume_from_checkpoint")
METHOD = "method"
SPELLINGS = RENAMED | {key: present for key, (present, _) in SWITCHES.items()}


@dataclass(frozen=True)
class Value:
    """One value of an axis: keys of a recipe, and the method, under a name."""

    name: str
    keys: dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """What is varied. The first value is the incumbent."""

    name: str
    values: tuple[Value, ...]

    def asks_for(self, *keys: str) -> bool:
        """Whether the axis is about one of `keys`: every value sets one of them, in whatever spelling."""
        return all({SPELLINGS.get(key, key) for key in value.keys} & set(keys) for value in self.values)


@dataclass(frozen=True)
class Launch:
    """How cells are started."""

    on: str = "local"
    accelerate_config: Path = Path("accelerate_configs/single_gpu.yaml")
    gpus_per_node: int | None = None  # processes of a cell; 0: one, on the CPU; None: as accelerate_config says
    hours: float = 24.0
    more: dict[str, Any] = field(default_factory=dict)  # submitit's own


@dataclass(frozen=True)
class Matrix:
    """An experiment as its file describes it; paths as they can be opened from here."""

    path: Path
    base: Path
    settings: dict[str, Any]  # of all cells, before the base's
    method: str | None
    axes: tuple[Axis, ...]
    one_at_a_time: bool
    fallback: tuple[Value, ...]
    launch: Launch
    output_dir: Path

    def about(self, *keys: str) -> Axis | None:
        """The axis that varies one of these keys, if there is one."""
        return next((axis for axis in self.axes if axis.asks_for(*keys)), None)


def read_matrix(path: str) -> Matrix:
    """The experiment of a file. Raises RecipeError with everything that is wrong with it."""
    given = {entry.key: entry for entry in read_recipe(path)}
    complaints = [
        f"{entry.place}: unknown key {key!r}{suggestion(closest(key, KEYS))}" for key, entry in given.items() if key not in KEYS
    ]
    complaints += [f"{path}: {key} is missing" for key in ("base", "axes") if key not in given]
    complaints += [
        f"{place}: {value!r} may be meant as text or as a number; put it in quotes, or write it plainly"
        for place, value in doubtful(given.values())
    ]
    reader = Reader(Path(path), given, complaints)
    matrix = Matrix(
        path=Path(path),
        base=reader.file("base", Path()),
        settings=reader.settings(),
        method=reader.text(METHOD),
        axes=reader.axes(),
        one_at_a_time=reader.one_of("one_at_a_time", (False, True)),
        fallback=reader.fallback(),
        launch=reader.launch(),
        output_dir=reader.folder(),
    )  # fmt: skip
    complaints += contradictions(matrix, {key: entry.place for key, entry in given.items()})
    if complaints:
        raise RecipeError(complaints)
    return matrix


def doubtful(entries: Iterable[Given]) -> Iterable[tuple[str, str]]:
    """Texts that YAML 1.1 would read as other numbers, wherever they stand."""
    for entry in entries:
        stack = [entry.value]
        while stack:
            value = stack.pop()
            if isinstance(value, Doubtful):
                yield entry.place, str(value)
            elif isinstance(value, dict | list):
                stack += value.values() if isinstance(value, dict) else value


def contradictions(matrix: Matrix, places: dict[str, str]) -> list[str]:
    """What the keys of a matrix say against each other."""
    complaints, seen = [], dict.fromkeys(matrix.settings, "settings")
    unshared = sorted(matrix.settings.keys() & {*RESERVED, METHOD})
    complaints += [f"{places['settings']}: {key} is none of the recipe's that all cells can share" for key in unshared]
    for axis in matrix.axes:
        for key in {key: None for value in axis.values for key in value.keys}:
            if key in RESERVED:
                complaints.append(f"{places['axes']}: axis {axis.name} sets {key}, which every cell has of its own")
            elif key in seen:
                complaints.append(f"{places['axes']}: {seen[key]} and {axis.name} both set {key}")
            seen[key] = axis.name
    if matrix.axes and matrix.method is None and matrix.about(METHOD) is None:
        complaints.append(f"{matrix.path}: method is missing: method: simpo beside base, or in every value of one axis")
    if matrix.method is not None and METHOD in seen and matrix.about(METHOD):
        complaints.append(f"{places[METHOD]}: axis {seen[METHOD]} sets the method too; keep one of them")
    if matrix.fallback and matrix.about(METHOD) is None:
        complaints.append(f"{places['fallback']}: stands in for a value of the axis that sets method, and there is none")
    return complaints


class Reader:
    """Reads the keys of one matrix; adds to the complaints, and goes on with something harmless."""

    def __init__(self, path: Path, given: dict[str, Given], complaints: list[str]):
        self.path, self.given, self.complaints = path, given, complaints

    def complain(self, key: str, problem: str) -> None:
        self.complaints.append(f"{self.given[key].place}: {problem}")

    def value(self, key: str) -> Any:
        return self.given[key].value if key in self.given else None

    def text(self, key: str) -> str | None:
        value = self.value(key)
        if value is None or isinstance(value, str):
            return value
        self.complain(key, f"{key} = {value!r}: expected a name")
        return None

    def one_of(self, key: str, choices: tuple[Any, ...]) -> Any:
        value = self.value(key)
        if value is None or value in choices:
            return choices[0] if value is None else value
        self.complain(key, f"{key} = {value!r}: must be one of {', '.join(map(str, choices))}")
        return choices[0]

    def file(self, key: str, otherwise: Path, name: Any = None) -> Path:
        """A file that is named from the matrix's own folder, or from the one that the command is given in."""
        name = self.value(key) if name is None else name
        if name is None:
            return otherwise
        try:
            path = Path(expanded(str(name)))
        except Mismatch as mismatch:
            self.complain(key, f"{name!r}: expected {mismatch}")
            return otherwise
        found = next((place for place in (self.path.parent / path, path) if place.is_file()), None)
        if found is None:
            self.complain(key, f"{str(name)!r}: no such file, neither from {self.path.parent} nor from here")
        return found or otherwise

    def settings(self) -> dict[str, Any]:
        value = self.value("settings")
        if value is None or isinstance(value, dict):
            return value or {}
        self.complain("settings", "expected {key: value, ...}")
        return {}

    def folder(self) -> Path:
        try:
            return Path(expanded(self.text("output_dir") or str(OUTPUTS / self.path.stem)))
        except Mismatch as mismatch:
            self.complain("output_dir", f"expected {mismatch}")
            return OUTPUTS

    def axes(self) -> tuple[Axis, ...]:
        axes = self.value("axes")
        if "axes" not in self.given:
            return ()
        if (
            not isinstance(axes, dict)
            or not axes
            or not all(isinstance(entry, dict | list) and entry for entry in axes.values())
        ):
            self.complain("axes", "expected axis: {name: {key: value, ...}, ...}, or key: [value, ...]")
            return ()
        return tuple(Axis(str(name), self.bundles("axes", f"axis {name}", entry, str(name))) for name, entry in axes.items())

    def fallback(self) -> tuple[Value, ...]:
        entry = self.value("fallback")
        if entry is None:
            return ()
        values = self.bundles("fallback", "fallback", entry, None)
        if len(values) != 1 or METHOD not in values[0].keys:
            self.complain("fallback", "expected one name with its keys, method among them")
        return values

    def bundles(self, place: str, what: str, entry: Any, key: str | None) -> tuple[Value, ...]:
        """The values of an axis: named bundles, or a list of values of the key that the axis is named after."""
        if isinstance(entry, list) and key is not None:
            values = [Value(short(key, value), {key: value}) for value in entry]
        elif isinstance(entry, dict) and all(isinstance(keys, dict) for keys in entry.values()):
            values = [Value(str(name), keys) for name, keys in entry.items()]
        else:
            self.complain(place, f"{what}: expected name: {{key: value, ...}} for each value")
            return ()
        names = [value.name for value in values]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.complain(place, f"{what}: {name} stands there twice")
        for name in names:
            if not NAME.match(name):
                self.complain(place, f"{what}: {name!r} cannot name a folder; letters, digits and . _ + - can")
        return tuple(values)

    def launch(self) -> Launch:
        entry = self.value("launch")
        if entry is None:
            return Launch(accelerate_config=self.file("launch", Launch.accelerate_config))
        if not isinstance(entry, dict):
            self.complain("launch", "expected {on: local, accelerate_config: FILE, ...}")
            return Launch()
        entry = {"on" if key is True else key: value for key, value in entry.items()}  # what YAML 1.1 makes of a bare `on`
        on, gpus, hours = entry.get("on", "local"), entry.get("gpus_per_node"), entry.get("hours", Launch.hours)
        if on not in PLACES:
            self.complain("launch", f"on = {on!r}: must be one of {', '.join(PLACES)}")
        if not (gpus is None or (isinstance(gpus, int) and gpus >= 0)):
            self.complain("launch", f"gpus_per_node = {gpus!r}: must be a number of GPUs; 0 for one process on the CPU")
            gpus = None
        if isinstance(hours, bool) or not isinstance(hours, int | float) or not 0 < hours < math.inf:
            self.complain("launch", f"hours = {hours!r}: must be positive")
        if entry.get("nodes", 1) != 1:
            self.complain(
                "launch", "nodes: a cell runs on one machine here; accelerate_configs/multi_node.slurm starts larger ones"
            )
        config = self.file("launch", Launch.accelerate_config, entry.get("accelerate_config", str(Launch.accelerate_config)))
        return Launch(on, config, gpus, hours, {key: value for key, value in entry.items() if key not in OWN_LAUNCH_KEYS})


def short(key: str, value: Any) -> str:
    """The name of a bare value: the initials of its key, and the value. `learning_rate`, 5e-7 -> lr5e-7."""
    text = re.sub(r"e([-+])0*", r"e\1", repr(value)) if isinstance(value, float) else str(value)
    return "".join(word[0] for word in key.split("_") if word) + text


def refuse_unknown_methods(matrix: Matrix, known: Iterable[str]) -> None:
    """Raises UserError where a method is named that has no entry point."""
    known = list(known)
    named = [matrix.method] if matrix.method else []
    named += [value.keys[METHOD] for axis in matrix.axes for value in axis.values if METHOD in value.keys]
    named += [value.keys[METHOD] for value in matrix.fallback]
    for name in named:
        if name not in known:
            raise UserError(
                f"{matrix.path}: method = {name!r}: must be one of {', '.join(known)}{suggestion(closest(str(name), known))}"
            )
