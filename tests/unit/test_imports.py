"""Imports go one way: scripts -> alignment, and inside alignment from the end of ORDER towards its beginning."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A file of alignment imports only files that stand before it here. Files of a folder (review) share one place.
ORDER = [
    "__init__",
    "errors",
    "launch",
    "strategy",
    "losses",
    "chat",
    "tokenization",
    "configs",
    "values",
    "parser",
    "sources",
    "rows",
    "data",
    "prepare",
    "models",
    "adapters",
    "adapter_checks",
    "head",
    "shared_prompt",
    "throughput",
    "collate",
    "metrics",
    "guards",
    "card",
    "checkpoints",
    "run_folder",
    "signals",
    "hub",
    "durable",
    "review",
    "failures",
    "splits",
    "records",
    "pipeline",
]
CODE_FOLDERS = ("alignment", "scripts", "on_policy_data_gen", "eval", "benchmarks")


def python_files(*folders: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(source: str, package: str) -> set[str]:
    """Absolute dotted names of all imports, wherever in the file: modules, and what is taken from them."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def imports_of(path: Path) -> set[str]:
    return imported_names((ROOT / path).read_text(encoding="utf-8"), package=".".join(path.parts[:-1]))


def place(name: str) -> int:
    """Of a module of alignment, in ORDER."""
    layer = name.split(".")[1] if "." in name else "__init__"
    assert layer in ORDER, f"alignment/{layer}.py has no place yet: add it to ORDER, behind everything that it imports"
    return ORDER.index(layer)


def climbing_imports(source: str, package: str, module: str) -> list[str]:
    highest = place(module) if module.count(".") > 1 else place(module) - 1  # files of a folder may import one another
    names = (name for name in imported_names(source, package) if name.split(".")[0] == "alignment")
    return sorted(name for name in names if place(name) > highest)


def importers(package: str) -> list[str]:
    def belongs(name: str) -> bool:
        return name == package or name.startswith(f"{package}.")

    return [path.as_posix() for path in python_files(*CODE_FOLDERS) if any(map(belongs, imports_of(path)))]


@pytest.mark.parametrize("path", python_files("alignment"), ids=str)
def test_a_file_of_alignment_imports_only_files_before_it(path):
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    package = ".".join(path.parts[:-1])
    assert climbing_imports((ROOT / path).read_text(encoding="utf-8"), package, module) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from .pipeline import run",
        "from . import pipeline",
        "import alignment.pipeline",
        "def f():\n    from alignment import pipeline",
    ],
)
def test_an_import_that_climbs_is_found_however_it_is_written(statement):
    assert "alignment.pipeline" in climbing_imports(statement, "alignment", "alignment.chat")


def test_files_of_the_review_may_import_one_another_but_not_the_pipeline():
    source = "from .plots import draw\nfrom ..errors import UserError\nfrom ..pipeline import run"
    climbing = climbing_imports(source, "alignment.review", "alignment.review.report")
    assert climbing == ["alignment.pipeline", "alignment.pipeline.run"]


def test_alignment_never_imports_scripts():
    assert [path for path in importers("scripts") if path.startswith("alignment/")] == []


def test_parts_of_trl_that_may_vanish_are_imported_by_one_file_at_most():
    assert len(importers("trl.experimental")) <= 1


def test_only_the_plots_import_matplotlib():
    assert importers("matplotlib") == ["alignment/review/plots.py"]


def test_only_the_decoder_imports_vllm():
    assert len(importers("vllm")) <= 1
