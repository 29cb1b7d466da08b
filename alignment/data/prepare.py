"""Datasets of conversations -> datasets of text -> datasets of token ids, computed once and kept on disk."""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from . import chat, template, tokenization
from .mixing import FINDINGS, damaged, refuse_cut
from .tokenization import LengthRules

logger = logging.getLogger(__name__)

# Half the width of what datasets would infer, and no time spent on inferring it.
TOKEN_FEATURES = Features(
    {f"{side}_input_ids": List(Value("int32")) for side in tokenization.SIDES}
    | {f"{side}_{column}": Value("int32") for side in tokenization.SIDES for column in ("prompt_length", "length")}
    | {f"{side}_truncated": Value("bool") for side in tokenization.SIDES}
    | {"length": Value("int32"), "index": Value("int32"), "truncated": Value("bool"), "eos_added": Value("bool")}
)
NOTED = Features({"add_eos": Value("bool"), "place": Value("string"), "findings": FINDINGS})
PAIR_FEATURES = Features(dict.fromkeys(chat.TEXT_COLUMNS, Value("string")) | {"system_added": Value("bool")} | NOTED)
MESSAGE_FEATURES = Features({"text": Value("string")} | NOTED)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides what the tokenizer and its template produce."""
    vocabulary = tokenization.plain_backend(tokenizer).to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    settings = [vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map]  # a template may read any of these
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def cached_map(
    dataset: Dataset,
    function: Callable[..., dict[str, list[Any]]],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    *,
    num_proc: int | None,
    desc: str,
    with_indices: bool = True,
    features: Features | None = None,
) -> Dataset:
    """`Dataset.map` in batches, into a file named after the rows, the tokenizer, the settings and the code that made it.

    Nothing else enters the name, so that a run with another beta finds the file.
    """
    code = inspect.getsource(inspect.getmodule(function)) + inspect.getsource(template)
    parts = [dataset._fingerprint, tokenizer_identity(tokenizer), repr(sorted(settings.items())), function.__name__, code]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    mapped = dataset.map(
        function,
        batched=True,
        with_indices=with_indices,
        fn_kwargs={"tokenizer": tokenizer, **settings},
        remove_columns=dataset.column_names,
        num_proc=worker_count(num_proc, len(dataset)),
        cache_file_name=str(cache_folder() / f"{name}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=name,
        features=features,
        desc=desc,
    )
    refuse_cut(mapped, dataset)
    return mapped


def cache_folder() -> Path:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "simpo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def damage(error: Exception) -> str | None:
    """The message for an error that came from torn files of the datasets cache; None for another."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    if isinstance(error, UserError) and not isinstance(cause, OSError | pa.ArrowException):
        return None
    torn = [path for path in sorted(Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")) if is_torn(path)]
    return damaged(torn, " ".join(str(cause).split())) if torn else None


def is_torn(path: Path) -> bool:
    if ".incomplete" in str(path):  # being written by somebody
        return False
    try:
        with pa.memory_map(str(path)) as source:
            pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException):
        return True
    return False


def worker_count(num_proc: int | None, rows: int) -> int | None:
    """None for one process: a second one costs its start, worth it from about a thousand rows each."""
    workers = min(num_proc or 1, rows // 1000)
    return workers if workers > 1 else None


def to_pair_texts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    preprocessing: str,
    add_system: bool,
    num_proc: int | None,
    date: str | None = None,
) -> Dataset:
    settings = {"preprocessing": preprocessing, "add_system": add_system, "date": date}
    return to_texts(dataset, chat.pair_texts, tokenizer, settings, PAIR_FEATURES, num_proc)


def to_message_texts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    preprocessing: str,
    add_system: bool,
    num_proc: int | None,
    date: str | None = None,
) -> Dataset:
    settings = {"preprocessing": preprocessing, "add_system": add_system, "date": date}
    return to_texts(dataset, chat.message_texts, tokenizer, settings, MESSAGE_FEATURES, num_proc)


def to_texts(
    dataset: Dataset,
    function: Callable[..., dict[str, list[Any]]],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    features: Features,
    num_proc: int | None,
) -> Dataset:
    if not template.reads_clock(tokenizer):
        settings = {**settings, "date": None}  # or tomorrow's run would render everything again
    desc = "Applying the chat template"
    return cached_map(dataset, function, tokenizer, settings, num_proc=num_proc, desc=desc, features=features)


def to_tokens(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, rules: LengthRules, *, num_proc: int | None) -> Dataset:
    """Text pairs -> token ids, without the pairs of which a side has no token left to score (0 / 0 would be NaN)."""
    tokens = cached_map(
        dataset,
        tokenization.tokenize_pairs,
        tokenizer,
        {"rules": rules},
        num_proc=num_proc,
        desc="Tokenizing",
        features=TOKEN_FEATURES,
    )
    scorable = np.flatnonzero(response_lengths(tokens).min(axis=0) > 0)
    if len(scorable) == 0:
        raise UserError(
            f"none of {len(tokens)} pairs has a token left to score on both sides; raise max_length "
            f"({rules.max_length}) or look at the data"
        )
    return tokens if len(scorable) == len(tokens) else tokens.select(scorable)


def to_sequences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None, preprocessing: str = "published"
) -> Dataset:
    """Texts -> token ids, for supervised training."""
    return cached_map(
        dataset,
        tokenization.tokenize_texts,
        tokenizer,
        {"preprocessing": preprocessing},
        num_proc=num_proc,
        desc="Tokenizing",
        with_indices=False,
    )


def sequence_lengths(tokens: Dataset) -> np.ndarray:
    return np.array([len(ids) for ids in tokens["input_ids"]])


def response_lengths(tokens: Dataset) -> np.ndarray:
    """(2, rows): tokens of the chosen and of the rejected responses that something predicts."""
    keys = [f"{side}_{column}" for side in tokenization.SIDES for column in ("length", "prompt_length")]
    columns = tokens.select_columns(keys).with_format("numpy")[:]
    # Nothing predicts the first token of a sequence, which is a response's where the prompt is empty.
    return np.stack([columns[f"{side}_length"] - (columns[f"{side}_prompt_length"] == 0) for side in tokenization.SIDES])


def pair_tokens(tokens: Dataset) -> np.ndarray:
    """(rows,): tokens of each pair when both sides share their prompt."""
    columns = tokens.select_columns(["chosen_prompt_length", "chosen_length", "rejected_length"]).with_format("numpy")[:]
    return sum(columns.values())


def longest_pair(tokens: Dataset) -> int:
    return int(pair_tokens(tokens).max())


def describe_tokens(tokens: Dataset, dropped: int, rules: LengthRules) -> str:
    """One clause on a split's tokens: lengths, cuts, and how often the chosen response is the longer."""
    table = tokens.select_columns(["chosen_prompt_length", "chosen_length", "rejected_length", "truncated"]).with_format(
        "numpy"
    )[:]
    spans = ", ".join(
        f"{name} {spread(table[column])}"
        for name, column in (
            ("prompt", "chosen_prompt_length"),
            ("chosen", "chosen_length"),
            ("rejected", "rejected_length"),
        )
    )
    longer = np.mean(table["chosen_length"] > table["rejected_length"])
    notes = [
        f"tokens (median / 95 % / max): {spans}",
        f"{int(table['truncated'].sum()):,} rows truncated to {rules.max_length}",
        f"chosen is the longer in {longer:.0%}",
    ]
    if same := same_responses(tokens):
        notes.append(f"chosen and rejected are the same tokens in {same:,} rows")
    if dropped:
        notes.append(f"{dropped:,} rows dropped (no response token left)")
    return "; ".join(notes)


def same_responses(tokens: Dataset) -> int:
    """Pairs in which nothing is preferred: what a template leaves out, or a cut, makes the same of different texts."""
    lengths = tokens.select_columns(["chosen_length", "rejected_length"]).with_format("numpy")[:]
    alike = np.flatnonzero(lengths["chosen_length"] == lengths["rejected_length"])
    rows = tokens.select_columns([f"{side}_input_ids" for side in tokenization.SIDES]).select(alike)
    return sum(row["chosen_input_ids"] == row["rejected_input_ids"] for row in rows)


def spread(lengths: np.ndarray) -> str:
    return f"{np.median(lengths):.0f} / {np.percentile(lengths, 95):.0f} / {lengths.max()}"


def describe_published(texts: Dataset, tokens: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """How many rows each oddity of the published rules touches."""
    alone = chat.render([{"role": "assistant", "content": chat.PROBE}], tokenizer)
    header_scored = bool(chat.without_bos(alone, tokenizer).partition(chat.PROBE)[0].strip())
    touched = {
        "assistant header scored with the response": len(tokens) if header_scored else 0,
        "empty system turn added": sum(texts["system_added"][:]),
        "eos added behind the template's own end": sum(tokens["eos_added"][:]),
        "cut to fixed parts of max_length": sum(tokens["truncated"][:]),
    }
    counts = ", ".join(f"{what} in {rows:,} rows" for what, rows in touched.items())
    return f"published rules: {counts} (preprocessing: exact does none of this)"
