"""Scored responses -> _bin.json and the data set: train and test by prompt, scores kept, as run_simpo.py reads it."""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, List, Value
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from alignment.data.mixing import counts_text
from alignment.data.tokenization import encode_texts
from alignment.errors import UserError, reason_of
from alignment.model.tokenizer_files import load_as_written
from alignment.run.run_folder import today

from .card import Count, data_card, paired_with, prompt_text, sampled_with, scored_with, statistics
from .configs import PairArguments
from .pairing import Pair, PairRule, choose_pairs, held_out
from .scoring import Scored, conversation, published_row, responses_hash
from .stages import finish, stage, write_rows

logger = logging.getLogger(__name__)

DATA_SET = "pairs"
TURNS = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "prompt_id": Value("string"),
        "prompt": Value("string"),
        "chosen": TURNS,
        "rejected": TURNS,
        "chosen_score": Value("float64"),
        "rejected_score": Value("float64"),
        "all_generated_responses": List(Value("string")),
        "all_rm_scores": List(Value("float64")),
    }
)


class Provenance(NamedTuple):
    """What is known of scored responses, for the card: the records of the stages before, {} where another program made them."""

    joined: dict[str, Any]
    scored: dict[str, Any]


def make_pairs(
    rows: Sequence[Scored], args: PairArguments, known: Provenance, counts: Counter, stem: str, output: Path
) -> None:
    """STEM_bin.json and the data set, by one process. counts: what was left out before."""
    final, folder = output / f"{stem}_bin.json", output / DATA_SET
    settings = {
        **asdict(args),
        "rewards_sha256": hashlib.sha256(json.dumps([row.rewards for row in rows]).encode()).hexdigest(),
        "responses_sha256": responses_hash(rows),
    }
    with stage(output, final.stem, settings, date=today(), makes=[final, folder]) as begun:
        if begun is None:
            logger.info("%s: is finished.", folder)
            return
        finish(begun, lambda: write_pairs(rows, args, known, counts, final, folder))


def write_pairs(
    rows: Sequence[Scored], args: PairArguments, known: Provenance, counts: Counter, final: Path, folder: Path
) -> dict[str, Any]:
    """Returns the counts of the card. Raises UserError if a split has no pair."""
    pairs, left_out = paired_rows(rows, PairRule(args.pair_rule, args.min_margin, args.max_margin, args.pair_seed))
    if not pairs:
        raise UserError(f"{folder}: no pair is left ({counts_text(left_out)})")
    test_ids = held_out(list(dict.fromkeys(row["prompt_id"] for row in pairs)), args.test_size, args.pair_seed)
    splits = {"train": [row for row in pairs if row["prompt_id"] not in test_ids]}
    splits |= {"test": [row for row in pairs if row["prompt_id"] in test_ids]} if test_ids else {}
    before = known.joined.get("counts", {})
    told = {"prompts with scored responses": len(rows), "pairs": len(pairs)}
    told |= {f"left out or remarkable: {what}": count for what, count in {**before, **counts, **left_out}.items()}
    unit, count = measure(known)
    trained_on = {*map(prompt_text, splits["train"])}
    card = data_card(
        folder=str(folder),
        made_by=[*sampled_with(known.joined.get("sampling", {})), *scored_with(known.scored), *paired_with(args)],
        counts=told,
        unit=unit,
        splits={name: statistics(own, count, trained_on if name != "train" else ()) for name, own in splits.items()},
    )
    write_rows(final, pairs)
    save_splits(folder, splits, card)
    logger.info("%s: %s.", folder, ", ".join(f"{name} {len(own):,} pairs" for name, own in splits.items()))
    if left_out:
        logger.info("left out: %s.", counts_text(left_out))
    return {"counts": told}


def paired_rows(rows: Sequence[Scored], rule: PairRule) -> tuple[list[dict[str, Any]], Counter]:
    pairs, left_out = [], Counter()
    for row in tqdm(rows, desc="Pairing", unit=" prompts"):
        chosen, counts = choose_pairs(row.prompt.id, row.responses, row.rewards, rule)
        left_out += counts
        pairs += [pair_row(row, pair) for pair in chosen]
    return pairs, left_out


def pair_row(row: Scored, pair: Pair) -> dict[str, Any]:
    return {
        **published_row(row, row.rewards),
        "chosen": conversation(row.prompt, row.responses[pair.chosen]),
        "rejected": conversation(row.prompt, row.responses[pair.rejected]),
        "chosen_score": row.rewards[pair.chosen],
        "rejected_score": row.rewards[pair.rejected],
    }


def measure(known: Provenance) -> tuple[str, Count]:
    """What lengths are counted in: tokens of the policy where it is known, else of the reward model, else words."""
    sampling = [record["settings"] for record in known.joined.get("sampling", {}).values()]
    candidates = [(each["tokenizer_name_or_path"] or each["model"], each["model_revision"]) for each in sampling[:1]]
    if known.scored:
        candidates.append((known.scored["settings"]["reward_model"], known.scored["settings"]["reward_revision"]))
    for name, revision in candidates:
        try:
            tokenizer = load_as_written(name, revision, trust_remote_code=False)
        except (OSError, ValueError) as error:  # of an adapter, which has its base's; the card does without
            logger.info("%s: no tokenizer to count lengths with (%s).", name, reason_of(error))
            continue
        return f"tokens of `{name}`", partial(token_counts, tokenizer)
    return "words", word_counts


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    return [len(ids) for ids in encode_texts(tokenizer, texts)]


def word_counts(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def save_splits(folder: Path, splits: dict[str, list[dict[str, Any]]], card: str) -> None:
    """The data set and its README.md, written aside and then put in place in one move."""
    draft = folder.with_name(f".{folder.name}.new")
    for leftover in (draft, folder):  # of a command that was killed here
        if leftover.exists():
            shutil.rmtree(leftover)
    saved = {name: Dataset.from_list([as_saved(row) for row in rows], features=FEATURES) for name, rows in splits.items()}
    DatasetDict(saved).save_to_disk(draft)
    (draft / "README.md").write_text(card, encoding="utf-8")
    draft.rename(folder)


def as_saved(row: dict[str, Any]) -> dict[str, Any]:
    """A column has one type. Where a prompt is several turns it is null, and is all turns of chosen but the last."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else None
    return {**{key: row[key] for key in FEATURES}, "prompt": prompt}
