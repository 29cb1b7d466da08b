"""What a program hands to a trainer -> the token ids of its pairs: message lists, text or tokens, in whatever format a data
set gives them out.
"""

import logging
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..recipe.configs import DataArguments, ModelArguments, Run, RunArguments
from .chat import SIDES, TEXT_COLUMNS
from .files import dataset_records, kept_rows
from .mixing import check_rows, refuse_bad_rows
from .prepare import to_tokens
from .rows import TEMPLATE_COLUMNS
from .splits import PAIRS
from .tokenization import TOKEN_COLUMNS

logger = logging.getLogger(__name__)


def pair_tokens(name: str, data: Any, tokenizer: PreTrainedTokenizerBase, args: RunArguments) -> Dataset:
    """Rows of token ids, with `index`; what is tokenized already is left as it is.

    name: the argument that `data` was, for messages. data: a `datasets.Dataset` with the columns prompt, chosen and rejected,
    as texts or as lists of {role, content}, of which the tokenizer's chat template makes text as for a recipe's rows; or with
    token ids. Raises UserError for anything else, and for rows that a recipe's run would refuse.
    """
    refuse_other_types(name, data)
    data = data.with_format(None)
    columns = set(data.column_names)
    if columns >= {*TOKEN_COLUMNS, "index"}:
        return data
    if columns >= set(SIDES) and all(is_list(data, side) for side in SIDES):
        return messages_to_tokens(name, data, tokenizer, args)
    if not columns >= set(TEXT_COLUMNS):
        raise UserError(
            f"{name} has the columns {sorted(columns)}; needed are prompt, chosen and rejected, as text or as lists of "
            f"{{role, content}}, or token ids in {', '.join((*TOKEN_COLUMNS, 'index'))}"
        )
    return to_tokens(data, tokenizer, args.length_rules, num_proc=args.dataset_num_proc)


def refuse_other_types(name: str, data: Any) -> None:
    if isinstance(data, Dataset):
        return
    kind = type(data).__name__
    if isinstance(data, dict):
        raise UserError(f"{name} is a {kind} of {', '.join(map(str, data))}; give one of them")
    if isinstance(data, datasets.IterableDataset) or not hasattr(data, "__len__"):
        raise UserError(
            f"{name} is a {kind}, of which nobody knows the rows before they come; steps, records and resuming need them. Give "
            "datasets.Dataset.from_list(list(stream.take(N))), or a recipe, which keeps rows on the disk"
        )
    raise UserError(f"{name} is a {kind}; give a datasets.Dataset: datasets.Dataset.from_list([row for row in rows])")


def is_list(data: Dataset, column: str) -> bool:
    return not isinstance(data.features[column], datasets.Value)


def messages_to_tokens(name: str, data: Dataset, tokenizer: PreTrainedTokenizerBase, args: RunArguments) -> Dataset:
    """By the rules for a recipe's rows; a line says what was found in them."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{name} holds conversations, and the tokenizer has no chat template: set tokenizer.chat_template, or give text"
        )
    kept = kept_rows(f"{name} {data._fingerprint}", lambda: dataset_records(data, name, (*TEXT_COLUMNS, *TEMPLATE_COLUMNS)))
    part = check_rows(name, kept, SIDES, args.dataset_num_proc)
    exact = args.preprocessing == "exact"
    refuse_bad_rows([part], keep_malformed=not exact or args.bad_rows == "drop")
    rows = part.well_formed() if exact else part.rows
    run_ = Run(ModelArguments(), DataArguments(), args, recipe="")
    tokens, _, notes = PAIRS.tokenize(name, rows, tokenizer, run_)
    for note in notes:
        logger.info("%s: %s", name, note)
    return tokens
