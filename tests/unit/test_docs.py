"""What the documents show is run: a command or an example that is not executed decays."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import scripts.generate
import scripts.merge_adapter
import scripts.push_run
import scripts.review_run
import scripts.score_pairs
from alignment.data.splits import PAIRS
from alignment.pipeline import Method, main
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser
from scripts.dpo_config import DPOConfig
from scripts.orpo_config import ORPOConfig
from scripts.sft_config import SFTConfig
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests.workspaces import recipe_keys, save_model, save_workspace, write_recipe

ROOT = Path(__file__).parents[2]
KEYS = {
    "preprocessing": "exact", "use_cpu": True, "max_length": 160, "max_prompt_length": 80, "learning_rate": 1e-3,
    "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "margin": 0.5,
}  # fmt: skip


def test_the_objective_that_the_guide_adds_trains(tmp_path):
    """Its four pieces in one file, as an entry point, on a tiny model."""
    guide = (ROOT / "docs/add-an-objective.md").read_text(encoding="utf-8")
    assert len(guide.splitlines()) < 75
    script = tmp_path / "run_toy.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)), encoding="utf-8")
    save_workspace(tmp_path, 8, 3, initializer_range=0.1)
    recipe = write_recipe(tmp_path, {**KEYS, **recipe_keys(tmp_path), "output_dir": str(tmp_path / "run")})
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(script), str(recipe)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Objective: Toy, loss = relu(margin - (mean logp_w - mean logp_l)), margin = 0.5" in done.stdout
    assert json.loads((tmp_path / "run/environment.json").read_text())["objective"]["name"] == "Toy"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("rewards/margins" in record for record in records)


def test_the_commands_for_after_a_run_are_read_by_their_entry_points():
    page = (ROOT / "docs/after-a-run.md").read_text(encoding="utf-8")
    parsers = {
        "generate": scripts.generate.short_help(),
        "merge_adapter": scripts.merge_adapter.parser(),
        "push_run": scripts.push_run.parser(),
        "score_pairs": scripts.score_pairs.parser(),
    }
    read = []
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            _, script, *words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", line), comments=True)
            assert (ROOT / script).is_file()
            if (parser := parsers.get(Path(script).stem)) is not None:
                _, unknown = parser.parse_known_args(words)
                assert set(unknown) <= ({"--key=value", "--preprocessing=exact"} if "score" in script else set())
                read.append(Path(script).stem)
    assert {*read} == {*parsers}


GUIDES = (
    "your-own-data", "choosing-settings", "reproducing-a-paper-run", "comparing-objectives", "troubleshooting",
)  # fmt: skip
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of a recipe, a matrix, an accelerate file and a record beside one another in prose.
CONFIGS = (SimPOConfig, DPOConfig, ORPOConfig, SFTConfig, ModelArguments, DataArguments)
KNOWN = {each.name for config in CONFIGS for each in fields(config)} | {"warmup_ratio", "torch_dtype", "evaluation_strategy"}


def text_of(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_leads_to_every_guide():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in GUIDES if f"](docs/{name}.md)" not in readme] == []


@pytest.mark.parametrize("name", GUIDES)
def test_keys_that_a_guide_sets_are_keys_of_recipes(name):
    """`key: value` in backticks; sources of dataset_mixer, which are no keys, have a slash, a star, or the example's folder."""
    set_keys = re.findall(r"`\"?([\w./*]+)\"?: [^`]+`", text_of(name))
    records = {"pairs", "loss", "grad_norm", "pairs/train.jsonl", "shards/*.jsonl", "owner/name"}
    assert {*set_keys} - KNOWN - records == set()


@pytest.mark.parametrize("name", GUIDES)
def test_files_that_a_guide_names_exist(name):
    folders = "accelerate_configs|training_configs|scripts|benchmarks|eval|tests|alignment"
    paths = re.findall(rf"\b((?:{folders})/[\w/.-]+\.(?:yaml|py))", text_of(name))
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def recipe_command(words: list[str]) -> tuple[str, list[str]]:
    """The script of a command and what it is given, whatever launches it."""
    place = next(index for index, word in enumerate(words) if word.startswith("scripts/"))
    return words[place], words[place + 1 :]


def test_the_commands_of_the_guides_are_read_by_their_entry_points(tmp_path, monkeypatch):
    """Each is parsed as its entry point parses it, with the recipe that it names; mine.yaml is the page's own."""
    (tmp_path / "mine.yaml").write_text(blocks(text_of("your-own-data"), "yaml")[0], encoding="utf-8")
    for folder in ("training_configs", "accelerate_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    read = []
    for name in GUIDES:
        for line in "\n".join(blocks(text_of(name), "bash")).splitlines():
            script, words = recipe_command(shlex.split(line, comments=True))
            assert (ROOT / script).is_file()
            if script.endswith("run_simpo.py"):
                H4ArgumentParser((ModelArguments, DataArguments, SimPOConfig)).parse(words)
            elif script.endswith("review_run.py"):
                scripts.review_run.parser().parse_args(words)
            else:
                assert script.endswith("run_ablation.py")
                assert Path(words[0]).is_file()
                assert words[1:] in ([], ["--check"])
            read.append(Path(script).stem)
    assert {*read} == {"run_simpo", "review_run", "run_ablation"}


def test_what_a_guide_quotes_is_what_the_code_says():
    """Of troubleshooting: text in quotation marks behind **Told by** or **Do**, as far as its numbers."""
    code = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "alignment").rglob("*.py"))
    code = re.sub(r"\"\s+f?\"", "", code)  # a sentence that goes on in the next line
    quoted = re.findall(r"\"([a-zA-Z][^\"]{20,})\"", " ".join(text_of("troubleshooting").split()))
    assert len(quoted) >= 5
    assert [each for each in quoted if re.split(r"\d{3,}", each)[0] not in code] == []


def test_the_example_of_your_own_data_is_prepared_and_its_bad_row_refused(tmp_path, monkeypatch, capsys):
    page = text_of("your-own-data")
    good, bad = blocks(page, "jsonl")
    (recipe,) = blocks(page, "yaml")
    save_model(tmp_path / "model")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/train.jsonl").write_text(good, encoding="utf-8")
    (tmp_path / "pairs/test.jsonl").write_text(good.splitlines()[0] + "\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    simpo = Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS)
    command = ["mine.yaml", "--dry_run", "--model_name_or_path=model", "--max_length=512", "--max_prompt_length=256"]
    main(simpo, command)
    out = capsys.readouterr().out
    assert "3 pairs, 128 a step" in out
    assert not (tmp_path / "outputs").exists()
    (tmp_path / "pairs/train.jsonl").write_text(good + bad, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(simpo, command)
    assert ended.value.code == 2
    (message,) = re.findall(r"```\n(pairs/train.jsonl.*?)\n```", page)
    assert message in capsys.readouterr().err
    main(simpo, [*command, "--bad_rows=drop"])
    assert "3 pairs, 128 a step" in capsys.readouterr().out
