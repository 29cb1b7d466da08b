"""From nothing to a preference-trained model, on a CPU and offline: `python scripts/quickstart/run.py`, a few minutes."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from alignment.launch.opening import opening

with opening():
    from alignment.report.curves import read_metrics
    from scripts.quickstart.model import random_model, sample, train_tokenizer
    from scripts.quickstart.task import RULE, conversation_rows, follows_rule, preference_rows, split_orders

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("outputs/quickstart")
DATA, MODEL, SFT, SIMPO = (FOLDER / name for name in ("data", "model", "sft", "simpo"))

SEED = 42
CONVERSATIONS, PAIRS, HELD_OUT = 4000, 2048, 300  # rows
SAMPLED = 100  # held-out requests
TEMPERATURE = 0.7
WIDTH = 110  # columns of the summary
# One thread: matrices this small gain little from a second one, and took six times as long when its core was busy.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def main() -> None:
    os.chdir(ROOT)  # here and in the recipes, paths begin at the root of the repository
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    heading("1 of 4: data, a tokenizer, a model of random weights")
    requests = write_data()
    write_model()
    heading("2 of 4: supervised fine-tuning, so that the model speaks")
    launch("scripts/run_sft.py", "training_configs/quickstart/sft.yaml")
    heading("3 of 4: SimPO, so that it responds as the pairs prefer")
    launch("scripts/run_simpo.py", "training_configs/quickstart/simpo.yaml")
    heading("4 of 4: held-out requests, before and after SimPO")
    before, after = (sample(run, requests, temperature=TEMPERATURE, seed=SEED) for run in (SFT, SIMPO))
    print(summary(read_metrics(SIMPO / "metrics.jsonl"), requests, before, after))


def heading(text: str) -> None:
    print(f"\n==== {text} ====\n", flush=True)


def write_data() -> list[str]:
    """Write conversations and pairs, no held-out order among the training rows. Returns held-out requests."""
    train, test = split_orders(SEED)
    held_out = preference_rows(SEED + 3, test, HELD_OUT)
    write_rows(DATA / "conversations" / "train.jsonl", conversation_rows(SEED, train, CONVERSATIONS))
    write_rows(DATA / "conversations" / "test.jsonl", conversation_rows(SEED + 1, test, HELD_OUT))
    write_rows(DATA / "pairs" / "train.jsonl", preference_rows(SEED + 2, train, PAIRS))
    write_rows(DATA / "pairs" / "test.jsonl", held_out)
    return list(dict.fromkeys(row["chosen"][0]["content"] for row in held_out))[:SAMPLED]


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows")


def write_model() -> None:
    lines = (DATA / "conversations" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer([turn["content"] for line in lines for turn in json.loads(line)["messages"]])
    model = random_model(tokenizer, seed=SEED)
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)
    print(f"{MODEL}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


def launch(script: str, recipe: str) -> None:
    """Run a stage. Where it fails its own error stands last on the screen, and the exit status is 1."""
    threads = f"--num_cpu_threads_per_process={os.cpu_count()}"  # what accelerate would choose, and say in three lines
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", threads]
    command = [*launcher, "--config_file", "accelerate_configs/cpu.yaml", "--cpu", "--num_processes=1", script, recipe]
    status = subprocess.run(command, env={**os.environ, **ENVIRONMENT}).returncode
    if status != 0:
        sys.exit(1)


def summary(metrics: Sequence[dict], requests: Sequence[str], before: Sequence[str], after: Sequence[str]) -> str:
    """Held-out figures and responses before and after SimPO, and where everything is."""
    evaluations = [record for record in metrics if "eval_rewards/accuracies" in record]
    first, last = evaluations[0], evaluations[-1]
    table = [
        ("", "before", "after"),
        ("reward accuracy", *(f"{record['eval_rewards/accuracies']:.1%}" for record in (first, last))),
        ("reward margin", *(f"{record['eval_rewards/margins']:.2f}" for record in (first, last))),
        ("responses that follow the rule", *(f"{rule_score(requests, sampled):.1%}" for sampled in (before, after))),
        ("words per response", *(f"{mean_words(sampled):.1f}" for sampled in (before, after))),
    ]
    lines = [f"{name:32}{start:>10}{end:>10}" for name, start, end in table]
    note = (
        f"Rewards of {HELD_OUT} held-out pairs; one response to each of {len(requests)} held-out requests, sampled at "
        f"temperature {TEMPERATURE}. The rule: a response {RULE}. The first three:"
    )
    lines += ["", textwrap.fill(note, WIDTH)]
    for request, old, new in list(zip(requests, before, after, strict=True))[:3]:
        lines += ["", f"    {request}", shown("before", request, old), shown("after", request, new)]
    lines += ["", f"model   {SIMPO}", f"card    {SIMPO / 'README.md'}", f"curves  {SIMPO / 'curves.png'}"]
    return "\n".join(lines)


def rule_score(requests: Sequence[str], responses: Sequence[str]) -> float:
    """Share of the responses that follow the rule."""
    return sum(map(follows_rule, requests, responses)) / len(requests)


def mean_words(responses: Sequence[str]) -> float:
    return sum(len(response.split()) for response in responses) / len(responses)


def shown(when: str, request: str, response: str) -> str:
    verdict = "follows the rule" if follows_rule(request, response) else "breaks the rule"
    return textwrap.fill(response, WIDTH, initial_indent=f"    {when:8}{verdict:18}", subsequent_indent=" " * 30)


if __name__ == "__main__":
    main()
