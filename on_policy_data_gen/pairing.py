"""Scored responses -> pairs. Pure functions."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from alignment.data.prompts import row_seed

DUPLICATE = "responses that repeat another"
UNSCORED = "responses too long for the reward model"
TIE = "pairs of equal rewards"
MARGIN = "pairs outside min_margin and max_margin"
NONE_LEFT = "prompts without a pair"


class PairRule(NamedTuple):
    """Which responses of a prompt become pairs, by their rewards; margins are differences of rewards."""

    name: str
    min_margin: float
    max_margin: float | None
    seed: int

    def allows(self, margin: float) -> bool:
        return margin >= self.min_margin and (self.max_margin is None or margin <= self.max_margin)


class Pair(NamedTuple):
    """Places of two responses in a prompt's list."""

    chosen: int
    rejected: int


def choose_pairs(
    prompt_id: str, responses: Sequence[str], rewards: Sequence[float | None], rule: PairRule
) -> tuple[list[Pair], Counter]:
    """The pairs of one prompt, and counts of what was left out. A reward that is None was not given."""
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    for place, response in enumerate(responses):
        counts[DUPLICATE] += response in first
        first.setdefault(response, place)
    counts[UNSCORED] = sum(reward is None for reward in rewards)
    ranked = sorted((place for place in first.values() if rewards[place] is not None), key=lambda place: -rewards[place])
    pairs = []
    for pair in candidates(prompt_id, ranked, rewards, rule):
        margin = rewards[pair.chosen] - rewards[pair.rejected]
        if margin == 0:
            counts[TIE] += 1
        elif not rule.allows(margin):
            counts[MARGIN] += 1
        else:
            pairs.append(pair)
    counts[NONE_LEFT] = not pairs
    return pairs, +counts


def candidates(prompt_id: str, ranked: Sequence[int], rewards: Sequence[float], rule: PairRule) -> list[Pair]:
    """What the rule proposes, of places from the highest reward to the lowest."""
    if len(ranked) < 2:
        return []
    best, *others = ranked
    if rule.name == "all_pairs":
        return [Pair(*pair) for pair in combinations(ranked, 2)]
    if rule.name == "best_random":
        lower = [place for place in others if rewards[place] < rewards[best]]
        return [Pair(best, random.Random(row_seed(rule.seed, prompt_id)).choice(lower or others))]
    if rule.name == "margin":
        within = [place for place in others if rewards[place] < rewards[best] and rule.allows(rewards[best] - rewards[place])]
        return [Pair(best, (within or others)[-1])]
    return [Pair(best, others[-1])]


def held_out(prompt_ids: Sequence[str], share: float, seed: int) -> set[str]:
    """The prompts of the test split: a share of them, by their hashes; where any are held out, at least one, and not all."""
    count = min(max(1, round(share * len(prompt_ids))), len(prompt_ids) - 1) if share > 0 and prompt_ids else 0
    return set(sorted(prompt_ids, key=lambda prompt_id: row_seed(seed, prompt_id))[:count])
