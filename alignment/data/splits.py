"""From what a recipe says about data to the token ids of its splits, prepared once and found again."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..launch.turns import one_process_at_a_time
from ..model.loading import load_tokenizer
from ..recipe.configs import DataArguments, ModelArguments, Run
from . import chat, prepare, template
from .mixing import SplitReport, count_reasons, flaws_of, get_datasets, listing
from .sources import TEST, TRAIN
from .tokenization import SIDES

logger = logging.getLogger(__name__)

# What is known of a pair beside its tokens, for the records of evaluations.
TRUNCATED = tuple(f"{side}_truncated" for side in SIDES)
PAIR_IDENTITY = (*(f"{column}_sha256" for column in chat.TEXT_COLUMNS), *TRUNCATED)


@dataclass(frozen=True)
class DataKind:
    """The rows that a method trains on, and how they become tokens: a split's rows -> tokens, the texts of these, and notes."""

    columns: tuple[str, ...]
    tokenize: Callable[[str, Dataset, PreTrainedTokenizerBase, Run], tuple[Dataset, Dataset, list[str]]]


def ready_tokenizer(run_: Run) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that is trained on, and that is saved with the model."""
    return templated_tokenizer(run_.model_args, run_.data_args, preprocessing=run_.training_args.preprocessing)


def templated_tokenizer(model_args: ModelArguments, data_args: DataArguments, *, preprocessing: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template that these arguments choose, and its settings."""
    tokenizer, source = tokenizer_and_source(model_args, data_args, preprocessing=preprocessing)
    logger.info("Chat template: %s.", source)
    return tokenizer


def tokenizer_and_source(
    model_args: ModelArguments, data_args: DataArguments, *, preprocessing: str
) -> tuple[PreTrainedTokenizerBase, str]:
    """`templated_tokenizer`, and where its template comes from."""
    tokenizer = load_tokenizer(model_args, data_args)
    found, source = template.find_chat_template(
        tokenizer,
        model_args.model_name_or_path,
        recipe_template=data_args.chat_template,
        preprocessing=preprocessing,
    )
    tokenizer.chat_template = template.with_settings(found, data_args.chat_template_kwargs, tokenizer)
    return tokenizer, source


class Prepared(NamedTuple):
    """One split. A row of tokens has the number of its text in `index`, where it is one of a pair."""

    tokens: Dataset
    texts: Dataset
    report: SplitReport
    notes: list[str]
    """Lines about its tokens; the first one is there for every split."""


def tokenized_splits(
    kind: DataKind, tokenizer: PreTrainedTokenizerBase, run_: Run, names: Collection[str] = (TRAIN, TEST)
) -> dict[str, Dataset]:
    """Token ids of the splits "train" and, where there is held-out data, "test", as far as `names` has them; a line about each.

    Raises UserError if they would train or evaluate nothing, or if what an earlier run left in the cache is damaged.
    """
    splits = prepared_splits(kind, tokenizer, run_, names)
    for name, split in splits.items():
        logger.info("%s: %s; %s", name, split.report, split.notes[0])
        for note in [*split.notes[1:], *split.report.places]:
            logger.info("%s: %s", name, note)
    return {name: split.tokens for name, split in splits.items()}


def prepared_splits(
    kind: DataKind, tokenizer: PreTrainedTokenizerBase, run_: Run, names: Collection[str] = (TRAIN, TEST)
) -> dict[str, Prepared]:
    """Token ids of each split, with what they were made of and what is to be said about them.

    Raises UserError as tokenized_splits.
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
            for name, rows in ((name, rows) for name, rows in conversations.items() if name in names):
                tokens, texts, notes = kind.tokenize(name, rows, tokenizer, run_)
                splits[name] = Prepared(tokens, texts, reports[name], notes)
    except Exception as error:  # what reads a torn file fails in its own way
        if message := prepare.damage(error):
            raise UserError(message) from error
        raise
    stop_tokenizer_threads()
    if TRAIN in splits:
        args.refuse_zero_steps(len(splits[TRAIN].tokens))
    if args.do_eval and len(splits[TEST].tokens) == 0:
        raise UserError("test has no row left to evaluate on; --do_eval=false trains without")
    return splits


def stop_tokenizer_threads() -> None:
    """To be called before a process forks: in its child, the tokenizer would wait for threads that were left behind."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def tokenize_pair_rows(
    name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run_: Run
) -> tuple[Dataset, Dataset, list[str]]:
    args = run_.training_args
    if args.preprocessing == "published":
        chat.check_published_template(tokenizer, date=run_.date)
    texts = prepare.to_pair_texts(rows, tokenizer, **text_settings(run_))
    usable, found = usable_rows(name, texts, tokenizer, run_)
    texts, rows = (each if len(usable) == len(each) else each.select(usable) for each in (texts, rows))
    if name.startswith(TRAIN):
        log_samples(texts)
    tokens = prepare.to_tokens(texts, tokenizer, args.length_rules, num_proc=run_.workers)
    if name.startswith(TRAIN) and 0 < len(tokens) == prepare.same_responses(tokens):
        raise UserError(
            f"{name}: chosen and rejected are the same tokens in every row ({len(tokens):,}), so that their gradients cancel; "
            "look at what was made of the two columns, and whether max_length cuts them where they begin to differ"
        )
    tokens = with_hashes(tokens, rows)  # of training pairs too: some are recorded, as the probe
    notes = [prepare.describe_tokens(tokens, dropped=len(texts) - len(tokens), rules=args.length_rules)]
    if args.preprocessing == "published":
        notes.append(prepare.describe_published(texts, tokens, tokenizer))
    return tokens, texts, notes + found


def tokenize_conversation_rows(
    name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, run_: Run
) -> tuple[Dataset, Dataset, list[str]]:
    texts = prepare.to_message_texts(rows, tokenizer, **text_settings(run_))
    usable, found = usable_rows(name, texts, tokenizer, run_)
    texts = texts if len(usable) == len(texts) else texts.select(usable)
    tokens = prepare.to_sequences(texts, tokenizer, num_proc=run_.workers, preprocessing=run_.training_args.preprocessing)
    notes = [f"tokens (median / 95 % / max): {prepare.spread(prepare.sequence_lengths(tokens))}", *found]
    return tokens, texts, notes


def text_settings(run_: Run) -> dict[str, Any]:
    return {
        "preprocessing": run_.training_args.preprocessing,
        "add_system": run_.data_args.auto_insert_empty_system_msg,
        "num_proc": run_.workers,
        "date": run_.date,
    }


def usable_rows(name: str, texts: Dataset, tokenizer: PreTrainedTokenizerBase, run_: Run) -> tuple[list[int], list[str]]:
    """Numbers of the rows that the template renders as it should, and a line for each thing found in some, and where first.

    Raises UserError for a template that fails in all rows, and in `exact` for rows in which it fails, unless they are dropped.
    """
    args, flaws = run_.training_args, flaws_of(texts)
    faults = [flaw for flaw in flaws if flaw.reason not in chat.REMARKS]
    bad = {flaw.index for flaw in faults}
    exact = args.preprocessing == "exact"
    reasons = {flaw.reason for flaw in faults}
    if len(bad) == len(texts) and reasons == {chat.EMPTY}:
        raise UserError(f"{listing(faults)}; {name} has no other row")
    if len(bad) == len(texts) and (exact or reasons <= chat.MISUSED):
        first = faults[0].message
        advice = template.other_template() if exact else chat.way_out(tokenizer, run_.date)
        told = "" if "Set chat_template" in first else f". {advice}"
        raise UserError(f"the chat template fails in every row of {name}, first in {first}{told}")
    if faults and exact and args.bad_rows == "refuse":
        raise UserError(f"{listing(faults)}; bad_rows: drop leaves them out")
    what = "dropped" if exact else "tolerated"
    first = {flaw.reason: flaw.message for flaw in reversed(flaws)}
    notes = [
        f"{reason}: {count:,} rows{'' if reason in chat.REMARKS else f' {what}'}, first {first[reason]}"
        for reason, count in count_reasons({(flaw.index, flaw.reason): flaw for flaw in flaws}.values()).items()
    ]
    return [number for number in range(len(texts)) if not exact or number not in bad], notes


def with_hashes(tokens: Dataset, rows: Dataset) -> Dataset:
    """With the SHA-256 of each pair's prompt and responses, by which another run, of whatever model, finds the pair again."""
    as_given = rows.select(tokens["index"][:]).select_columns(list(chat.TEXT_COLUMNS))
    hashes: dict[str, list[str]] = {column: [] for column in chat.TEXT_COLUMNS}
    for batch in as_given.iter(1000):  # a column by itself would be read row by row, six times as long
        for column, conversations in batch.items():
            hashes[column] += map(turns_hash, conversations)
    for column, found in hashes.items():
        tokens = tokens.add_column(f"{column}_sha256", np.array(found))
    return tokens


def turns_hash(turns: template.Turns) -> str:
    """Of roles and contents as the data set has them, before any template or truncation."""
    plain = json.dumps([[turn["role"], turn["content"]] for turn in turns], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def log_samples(texts: Dataset) -> None:
    """The first training pair as the model will read it, the surest way to see a template mistake."""
    logger.info("First training pair:\n%s", "\n".join(f"[{key}] {texts[0][key]!r}" for key in chat.TEXT_COLUMNS))


PAIRS = DataKind(columns=("chosen", "rejected"), tokenize=tokenize_pair_rows)
CONVERSATIONS = DataKind(columns=("messages",), tokenize=tokenize_conversation_rows)


def fingerprint(rows: Dataset) -> str:
    """SHA-256 of all rows in their order, wherever they were read from and however they are stored."""
    rows = rows.remove_columns([column for column in PAIR_IDENTITY if column in rows.column_names])  # no run trains on them
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
