"""Imports go one way: scripts -> alignment, and inside alignment from the end of ORDER towards its beginning.

Between wings first: whatever a file takes from another wing comes from one before its own. Between files of a wing second.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A wing, or a file beside the wings, imports only what stands before it here; so does a file among those of its wing. A
# folder in a wing stands there with its files.
ORDER = {
    "errors": [],
    "report": [
        "objective",
        "card",
        "curves",
        "saved_files",
        "review.conventions",
        "review.statistics",
        "review.pairs",
        "review.logs",
        "review.signals",
        "review.verdict",
        "review.reading",
        "review.comparison",
        "review.figures",
        "review.wording",
        "review.plots",
        "review.page",
    ],
    "launch": ["opening", "launch", "strategy", "turns"],
    "recipe": ["values", "ranges", "parser", "schema", "idle", "rehearsal", "dry_run", "configs"],
    "model": [
        "tokenizer_files",
        "config_files",
        "precision",
        "vocabulary",
        "endings",
        "loading",
        "companions",
        "text_part",
        "adapters",
        "adapter_checks",
        "layers",
        "head",
        "generation",
        "shared_prompt",
        "saved",
    ],
    "data": [
        "files",
        "sources",
        "rows",
        "mixing",
        "template",
        "chat",
        "tokenization",
        "prepare",
        "splits",
        "prompts",
        "handed",
    ],
    "run": [
        "output",
        "run_folder",
        "card",
        "signals",
        "checkpoints",
        "resuming",
        "hub",
        "guards",
        "durable",
        "failures",
        "records",
        "trackers",
    ],
    "preference": [
        "losses",
        "scores",
        "configs",
        "collate",
        "fidelity",
        "metrics",
        "throughput",
        "division",
        "memory",
        "stand_ins",
        "fake_step",
        "fitting",
        "by_tokens",
        "steps",
        "reference",
        "records",
        "evaluation",
        "trainer",
    ],
    "watch": ["settings", "rules", "warnings", "samples"],
    "leaving": [],
    "preflight": [
        "settings",
        "rows",
        "shown",
        "lengths",
        "steps",
        "model",
        "memory",
        "disk",
        "pitfalls",
        "report",
        "dry_run",
    ],
    "pipeline": [],
    "afterwards": ["command", "merging", "scoring", "pushing"],
    "ablation": [
        "matrix",
        "cells",
        "checks",
        "process",
        "cluster",
        "outcomes",
        "decisions",
        "results",
        "deciding",
        "running",
        "page",
        "experiment",
    ],
}
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


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def place(name: str) -> tuple[int, int]:
    """Of a module of alignment, or of a name in one, in ORDER: its wing's and its own; -1 for a package's `__init__`."""
    _, wing, *rest = [*name.split("."), ""]
    if wing not in ORDER:
        return -1, -1
    known = (".".join(rest[:depth]) for depth in (2, 1))
    return list(ORDER).index(wing), next((ORDER[wing].index(file) for file in known if file in ORDER[wing]), -1)


def climbing_imports(source: str, package: str, module: str) -> list[str]:
    """What a wing or a file takes from itself or from what stands behind it. A package's `__init__` is before its files."""
    names = (name for name in imported_names(source, package) if name.split(".")[0] == "alignment")
    return sorted(name for name in names if place(name) >= place(module))


def importers(package: str) -> list[str]:
    def belongs(name: str) -> bool:
        return name == package or name.startswith(f"{package}.")

    return [path.as_posix() for path in python_files(*CODE_FOLDERS) if any(map(belongs, imports_of(path)))]


def test_every_file_of_alignment_has_a_place():
    files = {".".join(path.with_suffix("").parts[1:]) for path in python_files("alignment") if path.stem != "__init__"}
    placed = {f"{wing}.{file}" for wing, files in ORDER.items() for file in files}
    assert files == placed | {name for name, files in ORDER.items() if not files}


def test_a_wing_says_what_it_is_for_and_holds_nothing_else():
    for wing in (name for name, files in ORDER.items() if files):
        (docstring,) = ast.parse((ROOT / "alignment" / wing / "__init__.py").read_text(encoding="utf-8")).body
        assert ast.get_docstring(ast.Module([docstring], [])), wing


@pytest.mark.parametrize("path", python_files("alignment"), ids=str)
def test_a_file_of_alignment_imports_only_what_stands_before_it(path):
    package = ".".join(path.parts[:-1])
    assert climbing_imports((ROOT / path).read_text(encoding="utf-8"), package, module_of(path)) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from ..pipeline import run",
        "from .. import pipeline",
        "import alignment.pipeline",
        "def f():\n    from alignment import pipeline",
    ],
)
def test_an_import_that_climbs_is_found_however_it_is_written(statement):
    assert "alignment.pipeline" in climbing_imports(statement, "alignment.data", "alignment.data.chat")


def test_a_wing_does_not_import_one_behind_it_though_its_own_file_stands_late():
    source = "from ..data.sources import TRAIN\nfrom ..recipe.configs import Run"
    climbing = climbing_imports(source, "alignment.model", "alignment.model.shared_prompt")
    assert climbing == ["alignment.data.sources", "alignment.data.sources.TRAIN"]


def test_a_file_does_not_import_one_behind_it_in_its_own_wing():
    source = "from . import chat, splits\nfrom .mixing import damaged"
    assert climbing_imports(source, "alignment.data", "alignment.data.prepare") == ["alignment.data.splits"]


def test_alignment_never_imports_scripts():
    assert [path for path in importers("scripts") if path.startswith("alignment/")] == []


def test_on_policy_data_is_made_with_alignment_and_not_the_other_way():
    assert [path for path in importers("on_policy_data_gen") if path.startswith("alignment/")] == []
    assert [path for path in importers("scripts") if path.startswith("on_policy_data_gen/")] == []


def test_nothing_but_evaluation_imports_evaluation():
    assert [path for path in importers("eval") if not path.startswith("eval/")] == []


def test_parts_of_trl_that_may_vanish_are_imported_by_one_file_at_most():
    assert len(importers("trl.experimental")) <= 1


def test_only_the_plots_import_matplotlib():
    assert importers("matplotlib") == ["alignment/report/curves.py", "alignment/report/review/plots.py"]


def test_a_file_in_a_folder_of_a_wing_does_not_import_one_behind_it():
    source = "from .page import write\nfrom .pairs import Pairs\nfrom ...errors import UserError"
    climbing = climbing_imports(source, "alignment.report.review", "alignment.report.review.signals")
    assert climbing == ["alignment.report.review.page", "alignment.report.review.page.write"]


def test_only_the_jobs_of_a_cluster_import_submitit():
    assert importers("submitit") == ["alignment/ablation/cluster.py"]


def test_only_the_decoder_imports_vllm():
    assert len(importers("vllm")) <= 1
