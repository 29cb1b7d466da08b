"""What the papers of the project say beside its code: citation, versions, environment, how to contribute."""

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from alignment.model.shared_prompt import PROVEN
from tests.unit.model.test_proven_architectures import OWN

ROOT = Path(__file__).parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
ENVIRONMENT = (ROOT / "environment.yml").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
# Of the Citation File Format 1.2.0. cffconvert, which has the whole schema, wants jsonschema < 4.
REQUIRED = {"cff-version", "message", "title", "authors"}
REQUIRED_OF_A_WORK = {"type", "title", "authors"}


def requirements(lines: str) -> dict[str, Requirement]:
    """Canonical name -> requirement, of a value of setup.cfg."""
    plain = [line for line in lines.splitlines() if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", r.name).lower(): r for r in map(Requirement, plain)}


def pip_lines() -> list[str]:
    (listed,) = (entry["pip"] for entry in yaml.safe_load(ENVIRONMENT)["dependencies"] if isinstance(entry, dict))
    return listed


# ---- CITATION.cff ----


def missing(citation: dict[str, Any]) -> set[str]:
    """Required fields of Citation File Format 1.2.0 that are absent or empty."""
    work = citation.get("preferred-citation", {})
    return {key for key in REQUIRED if not citation.get(key)} | {key for key in REQUIRED_OF_A_WORK if not work.get(key)}


def test_the_citation_has_what_its_format_requires():
    assert missing(CITATION) == set()
    assert CITATION["cff-version"] == "1.2.0"
    for author in CITATION["authors"] + CITATION["preferred-citation"]["authors"]:
        assert set(author) in ({"name"}, {"family-names", "given-names"})


@pytest.mark.parametrize("key", sorted(REQUIRED))
def test_a_citation_without_a_required_field_would_be_seen(key):
    assert missing({name: value for name, value in CITATION.items() if name != key}) == {key}


def test_the_paper_that_is_cited_is_simpo():
    paper = CITATION["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Meng", "Xia", "Chen"]
    assert (paper["year"], paper["identifiers"][0]["value"]) == (2024, "arXiv:2405.14734")


def test_citation_and_changelog_have_the_version_of_the_package():
    version = SETUP["metadata"]["version"]
    assert (CITATION["version"], CITATION["license"]) == (version, SETUP["metadata"]["license"])
    unreleased, newest, *_ = re.findall(r"^## \[([^]]+)]", CHANGELOG, re.MULTILINE)
    assert (unreleased, newest) == ("Unreleased", version)


def test_the_changelog_has_the_headings_that_its_form_knows():
    assert {*re.findall(r"^### (.+)", CHANGELOG, re.MULTILINE)} <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }


# ---- environment.yml ----


def test_the_environments_python_is_one_that_the_package_allows():
    (python,) = re.findall(r"python=([\d.]+)", ENVIRONMENT)
    assert python in SpecifierSet(SETUP["options"]["python_requires"])
    assert f"Python :: {python}\n" in SETUP["metadata"]["classifiers"] + "\n"


def test_the_environment_installs_the_suite_with_extras_that_exist_and_names_all_of_them():
    extras = set(SETUP["options.extras_require"])
    (installed,) = (re.fullmatch(r"-e \.\[(.+)]", line)[1] for line in pip_lines() if line.startswith("-e"))
    assert {"gpu"} <= set(installed.split(",")) <= extras
    comment = " ".join(line for line in ENVIRONMENT.splitlines() if line.startswith("#"))
    assert {extra for extra in extras if not re.search(rf"\b{extra}\b", comment)} == set()


def test_the_environments_versions_are_the_tested_ones_and_those_are_allowed():
    assert "-c constraints.txt" in pip_lines()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    needed = requirements(SETUP["options"]["install_requires"])
    for extra in SETUP["options.extras_require"].values():
        needed |= requirements(extra)
    assert {name for name in needed if name not in pins} <= {"flash-attn"}  # compiled against whatever torch there is
    assert {name: pins[name] for name, r in needed.items() if name in pins and pins[name] not in r.specifier} == {}


# ---- CONTRIBUTING.md ----


def test_every_test_target_of_the_makefile_is_described():
    targets = set(re.findall(r"^([a-z][\w.-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    described = set(re.findall(r"`make ([\w.-]+)", CONTRIBUTING))
    assert described <= targets
    assert targets - described == set()


def test_the_files_that_contributors_are_sent_to_exist():
    links = re.findall(r"]\(([\w./-]+)\)", CONTRIBUTING)
    paths = re.findall(r"`((?:alignment|tests|docs|scripts|training_configs)/[\w/.-]+)`", CONTRIBUTING)
    assert len(paths) > 10
    assert [path for path in links + paths if not (ROOT / path).exists()] == []


def test_the_settings_of_proven_architectures_are_of_proven_architectures():
    assert {*OWN} <= PROVEN
