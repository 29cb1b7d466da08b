"""How many pairs a second become token ids: `prepare.to_tokens` against the published algorithm, row by row.

    python benchmarks/tokenization.py [--data PAIRS.jsonl --tokenizer FOLDER] [--rows N]

All get the same rendered pairs and must give the same tokens. They take turns; what is printed are medians, with the
slowest and the fastest repeat. `to_tokens` reads a data set and writes an Arrow file, each time into an empty cache;
the published algorithm is timed in the same way, inside `Dataset.map`, and as a bare loop that reads and writes
nothing. RAYON_NUM_THREADS=1 keeps the batched tokenizer to one thread.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from alignment.launch.opening import opening

with opening():
    import datasets
    from datasets import Dataset
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from alignment.data.chat import TEXT_COLUMNS, pair_texts
    from alignment.data.prepare import to_tokens
    from alignment.data.template import find_chat_template
    from alignment.data.tokenization import SIDES, LengthRules
    from tests import builders, reference

RULES = LengthRules(max_length=2048, max_prompt_length=1800, truncation_mode="keep_end", preprocessing="published")


def main() -> None:
    args = parse_arguments()
    tokenizer = load_tokenizer(args.tokenizer)
    texts = rendered_pairs(args.data, args.rows, tokenizer)
    dataset = Dataset.from_list(texts)
    datasets.disable_progress_bars()

    def batched(folder: str) -> Dataset:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        return to_tokens(dataset, tokenizer, RULES, num_proc=args.num_proc)

    def mapped(folder: str) -> Dataset:
        settings = {"tokenizer": tokenizer, "rules": RULES}
        return dataset.map(reference.tokenize_row, fn_kwargs=settings, cache_file_name=f"{folder}/rows.arrow")

    def bare(_folder: str) -> list[dict[str, list[int]]]:
        return [reference.tokenize_row(row, tokenizer, RULES) for row in texts]

    check_tokens(batched, bare)  # also warms both up
    bare_seconds, mapped_seconds, batched_seconds = take_turns([bare, mapped, batched], args.repeats)

    tokenizer_name = args.tokenizer or "the tokenizer of tests/builders.py"
    print(f"{len(texts)} pairs, {tokenizer_name}, num_proc {args.num_proc}; equal tokens")
    print(f"to_tokens                      {rates(batched_seconds, len(texts))}")
    for name, seconds in (("row by row, in Dataset.map", mapped_seconds), ("row by row, a bare loop", bare_seconds)):
        print(f"{name:30} {rates(seconds, len(texts))}; to_tokens is faster by {ratio(seconds, batched_seconds)}")
    print(machine())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSONL of chosen and rejected message lists; default: made-up pairs")
    parser.add_argument("--tokenizer", help="folder or Hub name; default: the tokenizer of tests/builders.py")
    parser.add_argument("--rows", type=int, default=2000, help="pairs to tokenize, the first of --data (default: %(default)s)")
    parser.add_argument("--num_proc", type=int, default=1, help="processes of to_tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each (default: %(default)s)")
    return parser.parse_args()


def load_tokenizer(path: str | None) -> PreTrainedTokenizerBase:
    if path is None:
        return builders.bpe_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template, _ = find_chat_template(tokenizer, path, recipe_template=None, preprocessing="published")
    return tokenizer


def rendered_pairs(path: str | None, count: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    if path is None:
        rows = builders.pairs(count)
    else:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()[:count]]
    turns = builders.split_pairs(rows)
    batch = {column: [row[column] for row in turns] for column in TEXT_COLUMNS}
    texts = pair_texts(batch, list(range(len(rows))), tokenizer, preprocessing="published", add_system=False)
    return [dict(zip(TEXT_COLUMNS, row, strict=True)) for row in zip(*(texts[key] for key in TEXT_COLUMNS), strict=True)]


def check_tokens(fast: Callable[[str], Dataset], plain: Callable[[str], list[dict[str, list[int]]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens, expected = fast(folder), plain(folder)
        for side in SIDES:
            assert tokens[f"{side}_input_ids"][:] == [row[f"{side}_input_ids"] for row in expected], f"{side} tokens differ"


def take_turns(functions: list[Callable[[str], Any]], repeats: int) -> list[list[float]]:
    """Seconds of every call, by function; each call gets an empty folder."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, seconds, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                function(folder)
                own.append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> str:
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def rates(seconds: list[float], rows: int) -> str:
    slowest, median, fastest = (rows / value for value in (max(seconds), statistics.median(seconds), min(seconds)))
    return f"{median:7,.0f} pairs/s ({slowest:,.0f} to {fastest:,.0f})"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    threads = os.environ.get("RAYON_NUM_THREADS", "all")
    packages = ("tokenizers", "transformers", "datasets")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    python = platform.python_version()
    return f"{os.cpu_count()} cores ({model}), {threads} tokenizer threads; Python {python}, {versions}"


if __name__ == "__main__":
    main()
