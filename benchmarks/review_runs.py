"""Runs that are built to go wrong, and one that is not, reviewed: does the review say what was built?

    make quickstart && python benchmarks/review_runs.py [--only collapse ...]

Trains on the quickstart's supervised model, in outputs/review/, on a CPU:
  generalizes    the quickstart's own SimPO run
  memorizes      SimPO on 64 pairs whose preference is a coin toss, so that there is nothing general in them; 40 epochs, rank 64
  collapses      SimPO at a learning rate that is a hundred times too high
  brief-simpo    SimPO where the chosen response is the rejected one, shortened; of held-out pairs a fifth are the other way
  brief-dpo      the same for DPO
Prints what was built and the verdict, and leaves each run's review.md and report.html in its folder; the brief ones side by
side in outputs/review/brief.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from alignment.report.review.page import Review, in_words, page_of, review, write
from alignment.report.review.reading import read_runs
from scripts.quickstart.run import ENVIRONMENT, PAIRS, ROOT, SEED, SFT, SIMPO
from scripts.quickstart.task import (
    DETAILS,
    POLITE,
    REQUESTS,
    Order,
    conversation,
    respond,
    split_orders,
)

FOLDER = Path("outputs/review")
HELD_OUT = 3000  # pairs: fewer leave the accuracy's change undecided where half of them flip
Row = dict[str, list[dict[str, str]]]


def coin_toss(rng: random.Random, order: Order, *, held_out: bool) -> Row:
    """Two responses that follow the rule, and a coin."""
    request = rng.choice(REQUESTS).format(order=order)
    first, second = (respond(rng, order, "right", POLITE) for _ in range(2))
    while second == first:
        second = respond(rng, order, "right", POLITE)
    return {"chosen": conversation(request, first), "rejected": conversation(request, second)}


def brevity(rng: random.Random, order: Order, *, held_out: bool) -> Row:
    """One response, with some of its details left out."""
    request = rng.choice(REQUESTS).format(order=order)
    whole = respond(rng, order, "right", POLITE)
    while not (details := [each for each in DETAILS if each in whole]):
        whole = respond(rng, order, "right", POLITE)
    shorter = whole.replace(f" {rng.choice(details)}", "")
    chosen, rejected = (whole, shorter) if held_out and rng.random() < 0.2 else (shorter, whole)
    return {"chosen": conversation(request, chosen), "rejected": conversation(request, rejected)}


def save_pairs(name: str, make: Callable[..., Row], train: int) -> Path:
    orders = split_orders(SEED)
    folder = FOLDER / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    for file, count, known, is_held_out in (("train", train, orders[0], False), ("test", HELD_OUT, orders[1], True)):
        rows = [make(rng, rng.choice(known), held_out=is_held_out) for _ in range(count)]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
    return folder


def train(name: str, method: str, pairs: Path, *settings: str) -> Path:
    """A run into outputs/review/NAME, by the quickstart's recipe and these settings; one that is finished is left alone."""
    recipe = f"training_configs/quickstart/{method}.yaml"
    mixer = f"--dataset_mixer={json.dumps({str(pairs): 1.0})}"
    given = [mixer, f"--output_dir={FOLDER / name}", "--eval_on_start=false", "--eval_strategy=no", *settings]
    subprocess.run([sys.executable, f"scripts/run_{method}.py", recipe, *given], env=os.environ | ENVIRONMENT, check=True)
    return FOLDER / name


def built() -> dict[str, Callable[[], Path]]:
    long = ("--num_train_epochs=40", "--per_device_train_batch_size=16", "--learning_rate=5e-4")
    adapter = ("--use_peft", "--lora_r=64", "--lora_alpha=64", '--lora_target_modules=["all-linear"]')
    short = ("--max_steps=40",)
    return {
        "generalizes": lambda: SIMPO,
        "memorizes": lambda: train("memorizes", "simpo", save_pairs("coin", coin_toss, 64), *long, *adapter),
        "collapses": lambda: train("collapses", "simpo", SIMPO.parent / "data/pairs", *short, "--learning_rate=4e-2"),
        "brief-simpo": lambda: train("brief-simpo", "simpo", save_pairs("brief", brevity, PAIRS), *short),
        "brief-dpo": lambda: train("brief-dpo", "dpo", save_pairs("brief", brevity, PAIRS), *short),
    }


def reviewed(paths: Sequence[Path], folder: Path) -> Review:
    found = review(read_runs(paths))
    write(page_of(found), folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(built()), default=list(built()))
    args = parser.parse_args()
    os.chdir(ROOT)
    if not (SFT / "model.safetensors").is_file():
        sys.exit(f"error: {SFT}: no model there; make quickstart trains it")
    lines = []
    for name in args.only:
        path = built()[name]()
        found = reviewed([path], path)
        lines.append(f"==== built: {name}\n{in_words(found)}")
    if {"brief-simpo", "brief-dpo"} <= set(args.only):
        lines.append(in_words(reviewed([FOLDER / "brief-simpo", FOLDER / "brief-dpo"], FOLDER / "brief")))
    print("\n\n".join(lines))


if __name__ == "__main__":
    main()
