"""What a machine with one GPU has to show, in at most nine minutes and without a network: one JSON and one Markdown file.

    make gpu-proof [PROOF="--data PAIRS.jsonl --tokenizer FOLDER --out FOLDER"]
    python benchmarks/gpu_proof.py --cpu        # the same, small, to see that it runs

Sections come in the order of their worth, each a process with a time limit of its own; what is there when one is stopped is
kept. Without --data, pairs are random tokens. A machine that cannot install anything needs as wheels what setup.cfg names
and its image lacks, at least transformers, trl, accelerate, datasets, peft and liger_kernel in the versions of
constraints.txt and setup.cfg, and what these need (`pip download --only-binary=:all:` on one that can).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LLAMA_8B = "--hidden 4096 --layers 32 --heads 32 --kv-heads 8 --intermediate 14336 --vocab 128256"
LLAMA_1B = "--hidden 2048 --layers 16 --heads 32 --kv-heads 8 --intermediate 8192 --vocab 128256"
GEMMA_9B = (
    "--model-type gemma2 --hidden 3584 --layers 42 --heads 16 --kv-heads 8 --intermediate 14336 --vocab 256000 --attn eager"
)
TINY = "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --intermediate 128 --vocab 600"
ON_GPU = "--device cuda --dtype bfloat16 --repeats 2 --fused-layers --recompute-layers 0"


class Section(NamedTuple):
    """A command of this repository's, and how many seconds it may take."""

    name: str
    command: list[str]
    seconds: int


class Result(NamedTuple):
    """What became of a section; status as processes have it, None where it was stopped."""

    name: str
    command: str
    status: int | None
    seconds: float
    output: str


def sections(args: argparse.Namespace) -> list[Section]:
    step = ["benchmarks/train_step.py", *(["--data", args.data, "--tokenizer", args.tokenizer] if args.data else [])]
    if args.cpu:
        few = "--repeats 1 --micro-batches 1 --contenders published packed@2000t --recompute-layers 1"
        tiny = ["benchmarks/train_step.py", *TINY.split(), *few.split()]
        return [Section("kernels", ["-m", "pytest", "-q", "tests/gpu"], 150), Section("llama, tiny", tiny, 150)]

    def shape(name: str, seconds: int, size: str, contenders: str, micro_batches: int) -> Section:
        given = f"{size} {ON_GPU} --micro-batches {micro_batches} --contenders {contenders}"
        return Section(name, [*step, *given.split()], seconds)

    def whole(name: str, seconds: int, size: str, settings: str) -> Section:
        command = ["benchmarks/whole_steps.py", *step[1:], *f"{size} --device cuda --micro-batches 64 -- {settings}".split()]
        return Section(name, command, seconds)

    return [
        shape(
            "Llama-3-8B", 140, LLAMA_8B, "published trl published@8 trl@8 padded@16384t packed packed@8192t packed@16384t", 16
        ),
        shape("Llama-3.2-1B", 90, LLAMA_1B, "published trl published@16 trl@16 padded@16384t packed packed@16384t", 32),
        shape("Gemma-2-9B", 130, GEMMA_9B, "published trl padded packed@8192t", 8),
        whole("steps of 1B, by themselves", 70, f"{LLAMA_1B} --dtype float32", ""),
        whole("steps of 8B, by themselves", 110, f"{LLAMA_8B} --dtype bfloat16", ""),
        Section("kernels", ["-m", "pytest", "-q", "-n", "6", "tests/gpu"], 150),
    ]


def run(section: Section, folder: Path) -> Result:
    """The section's end, its output as far as it came."""
    log = folder / f"{re.sub('[^A-Za-z0-9.-]+', '-', section.name)}.log"  # a name that any machine hands on
    started = time.perf_counter()
    with log.open("w") as file:
        command = [sys.executable, *section.command]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=section.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            status = None
            process.wait()
    seconds = time.perf_counter() - started
    output = "\n".join(line for line in log.read_text(errors="replace").splitlines() if line.strip())
    return Result(section.name, " ".join(["python", *section.command]), status, round(seconds, 1), output)


def markdown(results: list[Result], machine: str) -> str:
    """The results as a page: a line for each, then what each printed, its end where it is long."""
    ends = {0: "done", None: "stopped at its time limit"}
    lines = ["# GPU proof", "", machine, "", "| section | end | seconds |", "|---|---|---|"]
    lines += [f"| {r.name} | {ends.get(r.status, f'status {r.status}')} | {r.seconds} |" for r in results]
    for result in results:
        lines += ["", f"## {result.name}", "", "```", f"$ {result.command}", *result.output.splitlines()[-40:], "```"]
    return "\n".join([*lines, ""])


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    machine = "no GPU" if args.cpu else subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    results: list[Result] = []
    for section in sections(args):
        if args.only and section.name not in args.only:
            continue
        print(f"{section.name}: at most {section.seconds} s ...", flush=True)
        results.append(run(section, args.out))
        # After every section, so that a machine that is taken away leaves what there was.
        (args.out / "proof.json").write_text(json.dumps([result._asdict() for result in results], indent=2))
        (args.out / "proof.md").write_text(markdown(results, machine))
        print(f"{section.name}: status {results[-1].status}, {results[-1].seconds} s", flush=True)
    sys.exit(any(result.status != 0 for result in results))


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
