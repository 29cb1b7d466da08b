"""What the documents show is run: a command or an example that is not executed decays."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import on_policy_data_gen.recipe
import scripts.generate
import scripts.merge_adapter
import scripts.push_run
import scripts.review_run
import scripts.score_pairs
from alignment.data.mixing import SplitReport, get_datasets
from alignment.data.splits import PAIRS
from alignment.errors import UserError
from alignment.pipeline import Method, main
from alignment.preference.losses import simpo_loss
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser
from eval.settings import EvaluationArguments
from on_policy_data_gen.configs import (
    AnnotateArguments,
    DecodeArguments,
    PairArguments,
    PolicyArguments,
    PostProcessArguments,
    PromptArguments,
    RewardArguments,
)
from scripts.dpo_config import DPOConfig
from scripts.orpo_config import ORPOConfig
from scripts.sft_config import SFTConfig
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests.workspaces import recipe_keys, save_model, save_splits, save_workspace, write_recipe

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


PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}
CONFIGS = (SimPOConfig, DPOConfig, ORPOConfig, SFTConfig, ModelArguments, DataArguments)
KNOWN = {each.name for config in CONFIGS for each in fields(config)} | {"warmup_ratio", "torch_dtype", "evaluation_strategy"}
# `name: value` of something else: a matrix's launch, a record of a log, a source of data.
OTHERS = {"on", "slurm_signal_delay_s", "loss", "grad_norm", "pairs"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def unknown_keys(page: str) -> set[str]:
    """Of recipes, given a value in backticks."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    return {*re.findall(r"`([a-z_0-9]+): [^`]+`", prose)} - KNOWN - OTHERS


@pytest.mark.parametrize("name", PAGES)
def test_keys_that_a_page_sets_are_keys_of_recipes(name):
    assert unknown_keys(PAGES[name]) == set()


def test_a_key_that_no_recipe_has_would_be_seen():
    assert unknown_keys("lower `learning_rat: 3e-7`") == {"learning_rat"}


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_exist(name):
    folders = "accelerate_configs|training_configs|scripts|benchmarks|eval|on_policy_data_gen|tests|alignment|docs"
    paths = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.-]+\.(?:yaml|py|md|json|slurm))", PAGES[name])
    to_be_written = {"scripts/toy_config.py", "scripts/toy_trainer.py", "scripts/run_toy.py"} if "objective" in name else set()
    assert [path for path in {*paths} - to_be_written if not (ROOT / path).is_file()] == []


# ---- Commands ----

RECIPES = {  # of an entry point: what it can be told, and the recipe that RECIPE.yaml stands for
    "scripts/run_simpo.py": ((ModelArguments, DataArguments, SimPOConfig), "training_configs/llama-3-8b-instruct-simpo.yaml"),
    "scripts/run_on_policy.py": (on_policy_data_gen.recipe.KINDS, "training_configs/on-policy/llama-3-8b-instruct.yaml"),
    "on_policy_data_gen/decode.py": ((PromptArguments, PolicyArguments, DecodeArguments), None),
    "on_policy_data_gen/post_process.py": ((PostProcessArguments,), None),
    "on_policy_data_gen/reward_model_annotate.py": ((RewardArguments, PairArguments, AnnotateArguments), None),
    "eval/generate_outputs.py": ((PolicyArguments, EvaluationArguments), None),
}
PARSERS = {
    "scripts/generate.py": scripts.generate.short_help,
    "scripts/merge_adapter.py": scripts.merge_adapter.parser,
    "scripts/push_run.py": scripts.push_run.parser,
    "scripts/review_run.py": scripts.review_run.parser,
    "scripts/score_pairs.py": scripts.score_pairs.parser,
}
# Of other packages; the second runs where they are installed (make test-evaluation), the third makes an environment.
FOREIGN = ("lm_eval run ", "vllm-env/bin/vllm serve ", "python3 -m venv vllm-env && ")


def commands() -> list[tuple[str, str]]:
    """Page and line of every command that a page shows."""
    return [
        (name, line) for name, page in PAGES.items() for block in blocks(page, "bash") for line in block.splitlines() if line
    ]


def read_command(line: str) -> str:
    """The script that a command starts, once its entry point has read what it is given; make's target; "" for a foreign one."""
    if line.startswith(FOREIGN):
        return ""
    words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", line), comments=True)
    if words[0] == "make":
        assert words[1] in re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return f"make {words[1]}"
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script, given = words[place], words[place + 1 :]
    assert (ROOT / script).is_file()
    if script in RECIPES:
        kinds, recipe = RECIPES[script]
        is_run = script == "scripts/run_simpo.py" and not {"--dry_run", "--prepare_only"} & {*given}
        local = ["--dry_run"] * is_run  # then what only this machine lacks is no error
        H4ArgumentParser(kinds).parse([recipe if word == "RECIPE.yaml" else word for word in given] + local)
    elif script in PARSERS:
        _, unknown = PARSERS[script]().parse_known_args(given)
        assert {*unknown} <= ({"--key=value", "--preprocessing=exact"} if script == "scripts/score_pairs.py" else set())
    elif script == "scripts/run_ablation.py":
        assert Path(given[0]).is_file()
        assert given[1:] in ([], ["--check"])
    else:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert script.startswith("benchmarks/")
        assert [word for word in given if word.startswith("--") and f'"{word}"' not in source and word != "--vocab"] == []
    return script


@pytest.fixture
def as_a_reader(tmp_path, monkeypatch):
    """In a folder with the recipes and what a page has its reader write."""
    (recipe,) = blocks(PAGES["docs/your-own-data.md"], "yaml")
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    (tmp_path / "vllm-env/bin").mkdir(parents=True)
    (tmp_path / "vllm-env/bin/python").symlink_to(sys.executable)
    for folder in ("training_configs", "accelerate_configs", "eval"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("as_a_reader")
def test_every_command_of_every_page_is_read_by_its_entry_point():
    read = [read_command(line) for _, line in commands()]
    assert {*RECIPES, *PARSERS, "scripts/run_ablation.py", "make quickstart"} <= {*read}


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize(
    "line",
    [
        "python scripts/run_simpo.py RECIPE.yaml --gpu_memry=80",
        "python scripts/review_run.py",
        "python scripts/run_simpos.py RECIPE.yaml",
        "make quickstrat",
        "python benchmarks/train_step.py --contender packed",
    ],
)
def test_a_command_that_would_not_run_would_be_seen(line):
    with pytest.raises((AssertionError, SystemExit, UserError)):
        read_command(line)


def test_what_a_guide_quotes_is_what_the_code_says():
    """Of troubleshooting: text in quotation marks, up to the first long number."""
    code = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "alignment").rglob("*.py"))
    code = re.sub(r"\"\s+f?\"", "", code)  # a sentence that goes on in the next line
    quoted = re.findall(r"\"([a-zA-Z][^\"]{20,})\"", " ".join(PAGES["docs/troubleshooting.md"].split()))
    assert len(quoted) >= 5
    assert [each for each in quoted if re.split(r"\d{3,}", each)[0] not in code] == []


def test_the_example_of_your_own_data_is_prepared_and_its_bad_row_refused(tmp_path, monkeypatch, capsys):
    page = PAGES["docs/your-own-data.md"]
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


def test_a_table_of_texts_becomes_pairs_as_your_own_data_says(tmp_path, monkeypatch):
    (script,) = blocks(PAGES["docs/your-own-data.md"], "python")
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_text('prompt,chosen,rejected\nq,x,y\n"p, p",x,"line\nline"\n', encoding="utf-8")
    exec(script, {})
    source = DataArguments(dataset_mixer={"pairs": 1.0})
    rules = {"columns": PAIRS.columns, "preprocessing": "exact", "bad_rows": "refuse", "seed": 42, "do_eval": False}
    splits, reports = get_datasets(source, **rules)
    assert reports["train"].tolerated == {}
    read = [[row[column][0]["content"] for column in ("prompt", "chosen", "rejected")] for row in splits["train"]]
    assert sorted(read) == [["p, p", "x", "line\nline"], ["q", "x", "y"]]


def turns(*texts: str) -> list[dict[str, str]]:
    """Each text, like user: q, as a turn."""
    return [dict(zip(("role", "content"), text.split(": "), strict=True)) for text in texts]


def row_of(chosen: list, rejected: list, **more) -> dict:
    return {"chosen": chosen, "rejected": rejected, **more}


ASKED, GOOD, BAD = turns("user: q"), turns("assistant: x"), turns("assistant: y")
# The rows of the page's table, in its order.
REFUSED = {
    "prompt and replies are texts": {"prompt": "q", "chosen": "x", "rejected": "y"},
    "replies alone": row_of(GOOD, BAD),
    "turns of `from` and `value`": row_of([{"from": "human", "value": "q"}] * 2, [{"from": "human", "value": "q"}] * 2),
    "one reply": {"chosen": ASKED + GOOD},
    "a role of another name": row_of(turns("human: q") + GOOD, turns("human: q") + BAD),
    "two prompts": row_of(ASKED + GOOD, turns("user: p") + BAD),
    "`prompt` is not how `chosen` begins": row_of(ASKED + GOOD, ASKED + BAD, prompt=ASKED + turns("assistant: a")),
    "an empty reply": row_of(ASKED + turns("assistant: "), ASKED + BAD),
    "an empty question": row_of(turns("user: ") + GOOD, turns("user: ") + BAD),
}


def read_pairs(folder: Path, row: dict, bad_rows: str, preprocessing: str = "exact") -> SplitReport:
    save_splits(folder, [row_of(ASKED + GOOD, ASKED + BAD), row], [row_of(ASKED + GOOD, ASKED + BAD)])
    source = DataArguments(dataset_mixer={str(folder): 1.0})
    rules = {"columns": PAIRS.columns, "preprocessing": preprocessing, "seed": 42, "do_eval": True}
    return get_datasets(source, bad_rows=bad_rows, **rules)[1]["train"]


def test_rows_are_refused_or_left_out_as_the_table_of_your_own_data_says(tmp_path):
    table = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (refused|left out) \|$", PAGES["docs/your-own-data.md"], re.MULTILINE)
    assert [kind for kind, _, _ in table] == [*REFUSED]
    for number, (kind, message, fate) in enumerate(table):
        with pytest.raises(UserError) as refusal:
            read_pairs(tmp_path / f"{number}", REFUSED[kind], "refuse")
        assert re.search(rf"train\.jsonl, line 2: .*{re.escape(message)}\n", str(refusal.value)), kind
        for case, rules in enumerate([("drop",), ("refuse", "published")]):
            folder = tmp_path / f"{number}-{case}"
            if fate == "refused":
                with pytest.raises(UserError, match="mend or remove what cannot be read"):
                    read_pairs(folder, REFUSED[kind], *rules)
            else:
                report = read_pairs(folder, REFUSED[kind], *rules)
                assert (report.read, report.kept) == (2, 1 if rules == ("drop",) else 2), kind


def test_two_equal_replies_are_counted_and_stay_in(tmp_path):
    report = read_pairs(tmp_path / "pairs", row_of(ASKED + GOOD, ASKED + GOOD), "refuse")
    assert (report.kept, report.tolerated) == (2, {"identical responses": 1})


def test_two_equal_replies_give_no_gradient():
    reply = torch.tensor([-1.3], requires_grad=True)
    simpo_loss(reply, reply, beta=10.0, gamma_beta_ratio=0.3).sum().backward()
    assert reply.grad.item() == 0


@pytest.mark.parametrize("beta", [2.0, 10.0])
def test_a_pair_lets_go_as_the_guide_to_settings_says(beta):
    """Half of beta at the ratio, 88 % and 12 % of beta 2 / beta nats below and above."""
    leads = torch.tensor([0.3 - 2 / beta, 0.3, 0.3 + 2 / beta], requires_grad=True)
    simpo_loss(leads, torch.zeros(3), beta=beta, gamma_beta_ratio=0.3).sum().backward()
    assert (-leads.grad / beta).tolist() == pytest.approx([0.88, 0.5, 0.12], abs=0.005)


def test_the_loss_at_first_is_what_the_guide_to_a_paper_run_says():
    (text,) = re.findall(r"^\| `loss` \| ([^|]+)", PAGES["docs/reproducing-a-paper-run.md"], re.MULTILINE)
    said = re.findall(r"([\d.]+) for [^(]+\(([\d.]+) x ([\d.]+)\)", text)
    said += re.findall(r"([\d.]+) for its v2 \(([\d.]+) x ([\d.]+)\)", text)
    assert len({*said}) == 2
    for loss, beta, ratio in said:
        even = torch.zeros(1)
        assert simpo_loss(even, even, beta=float(beta), gamma_beta_ratio=float(ratio)).item() == pytest.approx(
            float(loss), abs=0.005
        )


def test_the_golden_run_begins_and_ends_as_the_guide_to_a_paper_run_says():
    page = " ".join(PAGES["docs/reproducing-a-paper-run.md"].split())
    sides = r"rewards of the chosen from (\S+) to (\S+), of the rejected from (\S+) to (\S+)\. A"
    sentence = rf"a loss of (\S+) at the first step and (\S+) at the last, {sides}"
    said = [float(number) for number in re.search(sentence, page).groups()]
    trace = json.loads((ROOT / "tests/golden/data/traces/sigmoid-header.json").read_text(encoding="utf-8"))
    steps = [record for record in trace if "loss" in record]
    logged = [steps[at][key] for key in ("loss", "rewards/chosen", "rewards/rejected") for at in (0, -1)]
    assert said == pytest.approx(logged, abs=0.051)
