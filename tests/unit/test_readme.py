"""README and documents say what is in the tree."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)[1]
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])}
OTHER_RECIPES = PAGES[ROOT / "docs/recipes.md"]
RECIPE_ROWS = re.findall(r"^\| (`[\w.-]+\.yaml`[^|]*) \| ([^|]+) \| ([^|]+) \|", README + OTHER_RECIPES, re.MULTILINE)


def named_recipes(cell: str) -> list[str]:
    """`a-lora.yaml`, `-qlora.yaml` stands for two files."""
    first, *rest = re.findall(r"`([\w.-]+)`", cell)
    return [first, *(first.rsplit("-", 1)[0] + name for name in rest)]


def files_in_the_tree() -> set[str]:
    """Paths of the files that it names, each in the folder whose line they stand in or below."""
    folders: list[tuple[int, str]] = []  # that the line stands in: indentation and path
    files = set()
    for line in TREE.splitlines():
        indentation, first = len(line) - len(line.lstrip()), line.split()[0]
        if first.endswith("/") or "." in first:
            folders = [folder for folder in folders if folder[0] < indentation]
        if first.endswith("/"):
            folders.append((indentation, "/".join([*(path for _, path in folders[-1:]), first[:-1]])))
        path = folders[-1][1] if folders else "."
        files |= {(Path(path) / name).as_posix() for name in re.findall(r"\b[\w/]+\.(?:py|txt)\b", line)}
    return files


def test_the_tree_names_every_file_of_the_code_in_its_folder():
    code = [
        path
        for folder in ("alignment", "scripts", "benchmarks", "on_policy_data_gen", "eval")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert {path.relative_to(ROOT).as_posix() for path in code if path.name != "__init__.py"} <= files_in_the_tree()


def test_every_file_in_the_tree_exists():
    assert len(files_in_the_tree()) > 40
    assert [path for path in sorted(files_in_the_tree()) if not (ROOT / path).is_file()] == []


def test_the_table_names_every_recipe():
    named = {name for cell, _, _ in RECIPE_ROWS for name in named_recipes(cell)}
    assert named == {path.name for path in (ROOT / "training_configs").glob("*.yaml")}


@pytest.mark.parametrize(("cell", "model", "numbers"), RECIPE_ROWS, ids=[cell for cell, _, _ in RECIPE_ROWS])
def test_the_table_repeats_the_recipes(cell, model, numbers):
    for name in named_recipes(cell):
        recipe = yaml.safe_load((ROOT / "training_configs" / name).read_text(encoding="utf-8"))
        assert recipe["model_name_or_path"] == model
        if re.match(r"[\d.]+, ", numbers):
            beta, gamma, rate = (float(number) for number in numbers.split(", "))
            rate *= 10 if name.endswith("lora.yaml") else 1
            found = recipe["beta"], recipe["gamma_beta_ratio"], float(recipe["learning_rate"])
            assert found == pytest.approx((beta, gamma, rate))


CARDS = (24, 48, 80, 141)  # GB


def memory_of(name: str) -> list[str]:
    """GPUs and GiB of each, as `4x36`, for a recipe on each of CARDS, by the page's table; - where it does not fit."""
    row = re.search(rf"^\| `{re.escape(name)}` \| packed \| (.+) \|$", OTHER_RECIPES, re.MULTILINE)[1]
    return ["-" if cell.startswith("not") else cell.replace(": ", "x").removesuffix(" GiB") for cell in row.split(" | ")]


def test_the_table_of_gpus_says_what_the_longer_one_says():
    table = re.search(r"\| `training_configs/\*-simpo.yaml` .*?\n\n", README, re.DOTALL)[0]
    names = [match[1] for match in re.finditer(r"^\| `(\S+)-simpo` \| packed", OTHER_RECIPES, re.MULTILINE)]
    assert len(names) == 10
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`{name}`" for name in names]
    for name, row in zip(names, rows, strict=True):
        kind, gib, card = re.fullmatch(r"(Q?LoRA), (\d+) on (\d+) GB", row[-1]).groups()
        adapter = memory_of(f"{name}-simpo-{kind.lower()}")
        assert row[2:-1] == memory_of(f"{name}-simpo"), name
        least = next(index for index, cell in enumerate(adapter) if cell != "-")
        assert (f"1x{gib}", int(card)) == (adapter[least], CARDS[least]), name


def test_the_commands_name_files_that_exist():
    commands = README + "".join(PAGES[ROOT / f"docs/{name}.md"] for name in ("data", "performance", "recipes", "running"))
    paths = re.findall(r"(?:accelerate_configs|training_configs|scripts|benchmarks|eval)/[\w/.-]+\.(?:yaml|py)", commands)
    assert len(paths) >= 12
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_the_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets


def test_the_python_example_is_python():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    ast.parse(example)


def headings(page: str) -> set[str]:
    """What a link can name behind its #: as GitHub spells it."""
    titles = re.findall(r"^#+ (.+)", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path, page: str) -> list[str]:
    found = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page)
    targets = [(link, (path.parent / link).resolve() if link else path, anchor) for link, anchor in found]
    return [
        f"{path.name}: {link}#{anchor}"
        for link, target, anchor in targets
        if not target.exists() or (anchor and anchor not in headings(target.read_text(encoding="utf-8")))
    ]


def test_every_link_between_pages_leads_somewhere():
    assert [link for path, page in PAGES.items() for link in broken_links(path, page)] == []


@pytest.mark.parametrize("link", ["[a](docs/no-such-page.md)", "[a](docs/recipes.md#no-such-heading)", "[a](#no-such-heading)"])
def test_a_link_that_leads_nowhere_would_be_seen(link):
    assert broken_links(ROOT / "README.md", link)


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\(([\w./-]+\.md)", README)}
    assert {*PAGES} - {ROOT / "README.md"} <= linked


def test_the_readme_is_read_in_ten_minutes():
    """200 words a minute, the tree apart, which is looked things up in."""
    assert len(README.replace(TREE, "").split()) < 2000
