"""The third stage: every response scored, pairs made of them, and the data set: _rm.json, _bin.json, pairs."""

from pathlib import Path

from alignment.errors import UserError

from .configs import PairArguments, RewardArguments
from .pair_data import Provenance, make_pairs
from .scoring import read_responses, score
from .stages import FOLDER, read_record


def annotate(reward_args: RewardArguments, pair_args: PairArguments, generation_file: Path, output: Path) -> None:
    """Score what is not scored, on all devices of the launch, then pair it."""
    rows, counts = read_responses(generation_file)
    stem, beside = generation_file.stem.removesuffix("_rm"), generation_file.parent / FOLDER
    scores_lie_in = beside
    known = {row.rewards is not None for row in rows}
    if len(known) > 1:
        raise UserError(f"{generation_file}: some rows have all_rm_scores and some do not; remove or complete them")
    if known == {False}:
        rows, scores_lie_in = score(reward_args, rows, stem, output), output / FOLDER
    records = Provenance(read_record(beside, stem) or {}, read_record(scores_lie_in, f"{stem}_rm") or {})
    make_pairs(rows, pair_args, records, counts, stem, output)
