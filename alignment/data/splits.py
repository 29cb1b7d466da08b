"""From what a recipe says about data to the token ids of its splits, prepared once and found again."""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..launch.turns import one_process_at_a_time
from ..model.loading import load_tokenizer
from ..recipe.configs import Run
from . import chat, prepare
from .mixing import get_datasets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataKind:
    """The rows that a method trains on, and how they become tokens."""

    columns: tuple[str, ...]
    tokenize: Callable[[str, Dataset, PreTrainedTokenizerBase, Run], tuple[Dataset, list[str]]]


def ready_tokenizer(run_: Run) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that is trained on, and that is saved with the model."""
    tokenizer = load_tokenizer(run_.model_args, run_.data_args)
    tokenizer.chat_template, source = chat.find_chat_template(
        tokenizer,
        run_.model_args.model_name_or_path,
        recipe_template=run_.data_args.chat_template,
        preprocessing=run_.training_args.preprocessing,
    )
    logger.info("Chat template: %s.", source)
    return tokenizer


def tokenized_splits(kind: DataKind, tokenizer: PreTrainedTokenizerBase, run_: Run) -> dict[str, Dataset]:
    """Token ids of the splits "train" and, where there is held-out data, "test"; one line about each.

    Raises UserError if they would train or evaluate nothing, or if what an earlier run left in the cache is damaged.
    """
    args = run_.training_args
    seed = args.seed if args.data_seed is None else args.data_seed
    if (run_.workers or 1) > 1:
        stop_tokenizer_threads()
    if PartialState().local_process_index > 0:
        time.sleep(1)  # let the process go first whose progress is shown
    tokenizer_name = prepare.tokenizer_identity(tokenizer)
    settings = (run_.data_args, kind.columns, args.preprocessing, args.bad_rows, seed, args.do_eval, tokenizer_name)
    lock_name = f"{hashlib.sha256(repr(settings).encode()).hexdigest()[:32]}.lock"
    splits = {}
    try:
        with one_process_at_a_time(prepare.cache_folder() / lock_name, "preparing the same data"):
            conversations, reports = get_datasets(
                run_.data_args,
                columns=kind.columns,
                preprocessing=args.preprocessing,
                bad_rows=args.bad_rows,
                seed=seed,
                do_eval=args.do_eval,
                num_proc=run_.workers,
            )
            for name, rows in conversations.items():
                splits[name], notes = kind.tokenize(name, rows, tokenizer, run_)
                logger.info("%s: %s; %s", name, reports[name], notes[0])
                for note in notes[1:]:
                    logger.info("%s: %s", name, note)
    except (OSError, pa.ArrowException, UserError) as error:
        if message := prepare.damage(error):
            raise UserError(message) from error
        raise
    stop_tokenizer_threads()
    args.refuse_zero_steps(len(splits["train"]))
    if args.do_eval and len(splits["test"]) == 0:
        raise UserError("test has no row left to evaluate on; --do_eval=false trains without")
    return splits


def stop_tokenizer_threads() -> None:
    """To be called before a process forks: in its child, the tokenizer would wait for threads that were left behind."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def tokenize_pair_rows(name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run_: Run) -> tuple[Dataset, list[str]]:
    args = run_.training_args
    if args.preprocessing == "published":
        chat.check_published_template(tokenizer)
    texts = prepare.to_pair_texts(
        rows,
        tokenizer,
        preprocessing=args.preprocessing,
        add_system=run_.data_args.auto_insert_empty_system_msg,
        num_proc=run_.workers,
    )
    if name == "train":
        log_samples(texts)
    tokens = prepare.to_tokens(texts, tokenizer, args.length_rules, num_proc=run_.workers)
    notes = [prepare.describe_tokens(tokens, dropped=len(texts) - len(tokens), rules=args.length_rules)]
    if args.preprocessing == "published":
        notes.append(prepare.describe_published(texts, tokens, tokenizer))
    return tokens, notes


def tokenize_conversation_rows(
    name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run_: Run
) -> tuple[Dataset, list[str]]:
    texts = prepare.to_message_texts(
        rows,
        tokenizer,
        preprocessing=run_.training_args.preprocessing,
        add_system=run_.data_args.auto_insert_empty_system_msg,
        num_proc=run_.workers,
    )
    preprocessing = run_.training_args.preprocessing
    tokens = prepare.to_sequences(texts, tokenizer, num_proc=run_.workers, preprocessing=preprocessing)
    return tokens, [f"tokens (median / 95 % / max): {prepare.spread(prepare.sequence_lengths(tokens))}"]


def log_samples(texts: Dataset) -> None:
    """The first training pair as the model will read it, the surest way to see a template mistake."""
    logger.info("First training pair:\n%s", "\n".join(f"[{key}] {texts[0][key]!r}" for key in chat.TEXT_COLUMNS))


PAIRS = DataKind(columns=("chosen", "rejected"), tokenize=tokenize_pair_rows)
CONVERSATIONS = DataKind(columns=("messages",), tokenize=tokenize_conversation_rows)


def fingerprint(rows: Dataset) -> str:
    """SHA-256 of all rows in their order, wherever they were read from and however they are stored."""
    digest = hashlib.sha256(repr(rows.features).encode())
    for table in rows.with_format("arrow").iter(1000):
        table = table.take(pa.array(range(len(table))))  # a slice's last byte of bits would hold those of the next rows too
        for column in table.combine_chunks().itercolumns():
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(
                sink, pa.schema([("column", column.type)])
            ) as stream:  # offsets start anew, unlike in memory
                stream.write_table(pa.table({"column": column}))
            digest.update(sink.getvalue())
    return digest.hexdigest()
