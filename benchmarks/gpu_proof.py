"""What a machine with one GPU has to show, in at most nine minutes and without a network: one JSON and one Markdown file.

    make gpu-proof [PROOF="--data PAIRS.jsonl --tokenizer FOLDER --out FOLDER"]
    python benchmarks/gpu_proof.py --cpu        # the same, small, to see that it runs

Sections come in the order of their worth, each a process with a time limit of its own, none longer than what is left of the
whole; what is there when one is stopped is kept. Without --data, pairs are random tokens.

A machine without a network needs what its image lacks as wheels, in the versions of constraints.txt and setup.cfg. Beside
torch 2.11 for CUDA, numpy, pyyaml, tqdm, packaging, requests, pandas and pyarrow these are: transformers, tokenizers,
huggingface_hub, filelock, fsspec, httpx2, httpcore2, truststore, trl, accelerate, peft, datasets, dill, multiprocess, xxhash,
liger_kernel; for "kernels" pytest and pytest-xdist, with pluggy, iniconfig, pygments and execnet:
`pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --platform
manylinux_2_17_x86_64 --platform manylinux2014_x86_64 NAME==VERSION ...`, there `pip install --no-index --no-deps`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LLAMA_8B = "--hidden 4096 --layers 32 --heads 32 --kv-heads 8 --intermediate 14336 --vocab 128256"
LLAMA_1B = "--hidden 2048 --layers 16 --heads 32 --kv-heads 8 --intermediate 8192 --vocab 128256"
GEMMA_9B = (
    "--model-type gemma2 --hidden 3584 --layers 42 --heads 16 --kv-heads 8 --intermediate 14336 --vocab 256000 --attn eager"
)
TINY = "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --intermediate 128 --vocab 600"
ON_GPU = "--device cuda --dtype bfloat16 --repeats 2 --recompute-layers 0"
LORA = "--use_peft=true --lora_r=64 --lora_alpha=64"
WITH_FIGURES = ("benchmarks/train_step.py", "benchmarks/whole_steps.py")
WHOLE = 540  # seconds
SHORTEST = 5  # seconds, in which a section would not even import torch


class Section(NamedTuple):
    """A command of this repository's, and how many seconds it may take."""

    name: str
    command: list[str]
    seconds: int


class Result(NamedTuple):
    """What became of a section; status as processes have it, None where it was stopped; the figures that it wrote."""

    name: str
    command: str
    status: int | None
    seconds: float
    output: str
    figures: list[dict[str, Any]]


def sections(args: argparse.Namespace) -> list[Section]:
    step = ["benchmarks/train_step.py", *(["--data", args.data, "--tokenizer", args.tokenizer] if args.data else [])]
    if args.cpu:
        few = "--repeats 1 --micro-batches 1 --contenders published packed@2000t --recompute-layers 1 --profile"
        steps = f"{TINY} --micro-batches 32 --response-tokens 20 -- {LORA} --max_tokens_per_micro_batch=400"
        return [
            Section("kernels", ["-m", "pytest", "-q", "tests/gpu"], 100),
            Section("llama, tiny", [*step, *TINY.split(), *few.split()], 100),
            Section("whole steps, tiny", ["benchmarks/whole_steps.py", *steps.split()], 100),
        ]

    def shape(
        name: str, seconds: int, size: str, contenders: str, micro_batches: int, layers: str = "--fused-layers"
    ) -> Section:
        given = f"{size} {ON_GPU} {layers} --profile --micro-batches {micro_batches} --contenders {contenders}"
        return Section(name, [*step, *given.split()], seconds)

    def whole(name: str, seconds: int, size: str, settings: str = "") -> Section:
        command = ["benchmarks/whole_steps.py", *step[1:], *f"{size} --device cuda --micro-batches 64 -- {settings}".split()]
        return Section(name, command, seconds)

    return [
        shape(
            "Llama-3-8B", 140, LLAMA_8B, "published trl published@8 trl@8 packed@16384t packed@8192t padded@16384t packed", 16
        ),
        shape("Gemma-2-9B", 120, GEMMA_9B, "published trl packed@8192t published@4 trl@4 padded", 8),
        whole("steps of 8B, by themselves", 80, f"{LLAMA_8B} --dtype bfloat16"),
        Section("kernels", ["-m", "pytest", "-q", "-n", "6", "tests/gpu"], 150),
        shape(
            "Llama-3.2-1B", 90, LLAMA_1B, "published trl packed@16384t published@16 trl@16 liger@16 padded@16384t packed", 32
        ),
        whole("steps of Gemma-2, by themselves", 80, f"{GEMMA_9B} --dtype bfloat16"),
        whole("steps of 1B, by themselves", 60, f"{LLAMA_1B} --dtype float32"),
        whole("steps of 8B with LoRA", 60, f"{LLAMA_8B} --dtype bfloat16", LORA),
        Section("estimated memory", ["benchmarks/memory.py", "--device", "cuda"], 60),
        shape("Llama-3.2-1B, layers compiled", 90, LLAMA_1B, "packed@16384t padded@16384t", 32, "--compiled-layers"),
    ]


def file_of(section: Section, folder: Path, kind: str) -> Path:
    return folder / f"{re.sub('[^A-Za-z0-9.-]+', '-', section.name)}.{kind}"  # a name that any machine hands on


def run(section: Section, folder: Path, limit: float) -> Result:
    """The section's end, its output as far as it came, its figures as far as they were written."""
    log, figures = file_of(section, folder, "log"), file_of(section, folder, "json")
    command = list(section.command)
    if command[0] in WITH_FIGURES:
        command[1:1] = ["--json", str(figures)]
    figures.unlink(missing_ok=True)
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            status = None
            process.wait()
    seconds = time.perf_counter() - started
    output = "\n".join(line for line in log.read_text(errors="replace").splitlines() if line.strip())
    records = json.loads(figures.read_text()) if figures.is_file() else []
    return Result(section.name, " ".join(["python", *section.command]), status, round(seconds, 1), output, records)


def markdown(results: list[Result], machine: str, left_out: list[str]) -> str:
    """The results as a page: a line for each, then what each found, its end where it is long."""
    ends = {0: "done", None: "stopped at its time limit"}
    lines = ["# GPU proof", "", machine, "", "| section | end | seconds |", "|---|---|---|"]
    lines += [f"| {r.name} | {ends.get(r.status, f'status {r.status}')} | {r.seconds} |" for r in results]
    lines += [f"| {name} | no time left | 0 |" for name in left_out]
    for result in results:
        lines += ["", f"## {result.name}", "", *table(result.figures)]
        lines += ["```", f"$ {result.command}", *result.output.splitlines()[-40:], "```"]
    return "\n".join([*lines, ""])


def table(figures: list[dict[str, Any]]) -> list[str]:
    """Lines of a table that has all keys as columns, in the order in which they come."""
    if not figures:
        return []
    columns = list(dict.fromkeys(key for record in figures for key in record))
    rows = [[written(record.get(column)) for column in columns] for record in figures]
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)] + [""]


def written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    machine = "no GPU" if args.cpu else subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    results: list[Result] = []
    left_out: list[str] = []
    end = time.perf_counter() + WHOLE
    for section in sections(args):
        if args.only and section.name not in args.only:
            continue
        limit = min(section.seconds, end - time.perf_counter())
        if limit < SHORTEST:
            left_out.append(section.name)
            print(f"{section.name}: no time left", flush=True)
        else:
            print(f"{section.name}: at most {limit:.0f} s ...", flush=True)
            results.append(run(section, args.out, limit))
            print(f"{section.name}: status {results[-1].status}, {results[-1].seconds} s", flush=True)
        # After every section, so that a machine that is taken away leaves what there was.
        (args.out / "proof.json").write_text(json.dumps([result._asdict() for result in results], indent=2))
        (args.out / "proof.md").write_text(markdown(results, machine, left_out))
    sys.exit(bool(left_out) or any(result.status != 0 for result in results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu-proof", help="folder of proof.json and proof.md")
    parser.add_argument("--data", help="JSONL of chosen and rejected message lists")
    parser.add_argument("--tokenizer", help="folder or Hub name, with --data")
    parser.add_argument("--only", nargs="+", help="sections, by name")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on a CPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
