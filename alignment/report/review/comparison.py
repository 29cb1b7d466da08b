"""Several runs on the held-out pairs that they share, paired, by d and by each run's own reward."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ...errors import UserError
from .pairs import Pairs
from .reading import Reading
from .statistics import Estimate, ShareChange, around, change_of_share, holm, mean_of, variance_of_mean


@dataclass(frozen=True)
class Shared:
    """Two runs' pairs, matched by hash and in one order; how many each has that the other lacks."""

    first: Pairs
    second: Pairs
    first_alone: int
    second_alone: int


@dataclass(frozen=True)
class Comparison:
    """first - second on shared pairs, at each run's last step.

    by_d, by_reward: difference of accuracies; `gained` are pairs that the first has right and the second wrong.
    adjusted_*: p by Holm, over the comparisons that are made together. d, chosen, rejected: difference of means, nats per
    token, over the `agreeing` pairs whose token counts agree; None where there are none.
    """

    first: str
    second: str
    n: int
    first_alone: int
    second_alone: int
    by_d: ShareChange
    by_reward: ShareChange
    agreeing: int
    d: Estimate | None
    chosen: Estimate | None
    rejected: Estimate | None
    single_seeds: bool
    adjusted_d: float = 1.0
    adjusted_reward: float = 1.0


@dataclass(frozen=True)
class Cell:
    """Runs of one recipe that differ in their seed, with the spread of their held-out accuracies."""

    runs: tuple[str, ...]
    seeds: tuple[int | None, ...]
    accuracies: tuple[float, ...]  # by d
    own_accuracies: tuple[float, ...]
    pairs: tuple[int, ...]  # held out

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the accuracy by d over seeds; None of one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None


def match(first: Pairs, second: Pairs) -> Shared | None:
    """The pairs that both have; None where hashes are not known or none is shared. A pair that repeats is matched in order."""
    if first.keys is None or second.keys is None:
        return None
    places: dict[tuple[str, int], int] = {key: place for place, key in enumerate(numbered(second.keys))}
    found = [(place, places[key]) for place, key in enumerate(numbered(first.keys)) if key in places]
    if not found:
        return None
    here, there = np.array(found).T
    return Shared(first.take(here), second.take(there), len(first) - len(found), len(second) - len(found))


def numbered(keys: Sequence[str]) -> list[tuple[str, int]]:
    seen: dict[str, int] = {}
    numbered_keys = []
    for key in keys:
        seen[key] = seen.get(key, -1) + 1
        numbered_keys.append((key, seen[key]))
    return numbered_keys


def compare(first: Reading, second: Reading, *, single_seeds: bool = True) -> Comparison | None:
    """Two runs on their shared held-out pairs; None where they share none."""
    shared = first.held_out and second.held_out and match(first.held_out, second.held_out)
    if not shared:
        return None
    one, other, prompts = shared.first.after, shared.second.after, shared.first.prompts
    agree = (shared.first.chosen_tokens == shared.second.chosen_tokens) & (
        shared.first.rejected_tokens == shared.second.rejected_tokens
    )

    def mean_difference(of_first: np.ndarray, of_second: np.ndarray) -> Estimate | None:
        return mean_of((of_first - of_second)[agree], prompts[agree]) if agree.any() else None

    return Comparison(
        first.name,
        second.name,
        len(prompts),
        shared.first_alone,
        shared.second_alone,
        by_d=change_of_share(other.d > 0, one.d > 0, prompts),
        by_reward=change_of_share(other.margin > 0, one.margin > 0, prompts),
        agreeing=int(agree.sum()),
        d=mean_difference(one.d, other.d),
        chosen=mean_difference(one.chosen, other.chosen),
        rejected=mean_difference(one.rejected, other.rejected),
        single_seeds=single_seeds,
    )


def compare_all(runs: Sequence[Reading], couples: Collection[tuple[str, str]] | None = None) -> list[Comparison]:
    """Every two runs that share pairs, with Holm's correction over them; runs of one cell are its spread, and not compared.

    couples: names of those that are to be compared, in the order of the runs; None: all.
    """
    cells = [run.cell for run in runs]
    found = [
        comparison
        for first, second in combinations(runs, 2)
        if first.cell is None or first.cell != second.cell
        if couples is None or (first.name, second.name) in couples
        if (comparison := compare(first, second, single_seeds=is_single(cells, first, second)))
    ]
    by_d, by_reward = (holm([getattr(each, name).change.p for each in found]) for name in ("by_d", "by_reward"))
    return [
        Comparison(**{**vars(each), "adjusted_d": of_d, "adjusted_reward": of_reward})
        for each, of_d, of_reward in zip(found, by_d, by_reward, strict=True)
    ]


def is_single(cells: Sequence[str | None], *pair: Reading) -> bool:
    """Whether either of two runs is the only one of its cell here: then nothing tells the recipe from its seed."""
    return any(run.cell is None or cells.count(run.cell) < 2 for run in pair)


# ---- Seeds ----


def cells_of(runs: Sequence[Reading]) -> list[Cell]:
    """Runs by recipe, in their order; a run without a recipe or without held-out pairs stands alone or is left out."""
    groups: dict[str, list[Reading]] = {}
    for run in runs:
        if run.held_out is not None:
            groups.setdefault(run.cell or f"{run.path}", []).append(run)
    return [
        Cell(
            tuple(run.name for run in group),
            tuple(run.seed for run in group),
            tuple(float((run.held_out.after.d > 0).mean()) for run in group),
            tuple(float((run.held_out.after.margin > 0).mean()) for run in group),
            tuple(len(run.held_out) for run in group),
        )
        for group in groups.values()
    ]


def compare_cells(first: Sequence[Reading], second: Sequence[Reading], *, by_reward: bool) -> Estimate:
    """Difference of accuracies, seeds averaged, first - second, on the pairs that all runs share; by d, or by own reward.

    Of single seeds it is Bonett and Price's paired change. Otherwise the variance is that of the pairs' averages plus that of
    the seeds, pooled over both cells, with Satterthwaite's degrees of freedom: of recipes, on pairs and seeds like these.
    Raises UserError where the runs share no pair.
    """
    runs = [*first, *second]
    tables = shared_by_all(runs)
    measure = "margin" if by_reward else "d"
    right = np.array([getattr(table.after, measure) > 0 for table in tables])  # (runs, n)
    ours, theirs, prompts = right[: len(first)], right[len(first) :], tables[0].prompts
    if len(runs) == 2:
        return change_of_share(theirs[0], ours[0], prompts).change
    difference = ours.mean(0) - theirs.mean(0)
    from_pairs, count, _ = variance_of_mean(difference, prompts)
    squares = sum(((each.mean(1) - each.mean()) ** 2).sum() for each in (ours, theirs))
    seeds_df = len(runs) - 2
    from_seeds = squares / seeds_df * (1 / len(first) + 1 / len(second))
    variance = from_pairs + from_seeds
    parts = from_pairs**2 / max(count - 1, 1) + from_seeds**2 / seeds_df
    df = variance**2 / parts if parts > 0 else min(count - 1, seeds_df)
    return around(float(difference.mean()), float(np.sqrt(variance)), df, len(prompts), count)


def shared_by_all(runs: Sequence[Reading]) -> list[Pairs]:
    """The pairs of each run that all of them have, in one order. Raises UserError where there are none."""
    if unknown := [run.name for run in runs if run.held_out is None or run.held_out.keys is None]:
        raise UserError(f"{unknown[0]}: no held-out pairs with hashes, by which another run's are matched")
    keys = [numbered(run.held_out.keys) for run in runs]
    common = set(keys[0]).intersection(*keys[1:])
    if not common:
        raise UserError(f"{', '.join(run.name for run in runs)}: these runs share no held-out pair")
    order = [key for key in keys[0] if key in common]
    places = [{key: place for place, key in enumerate(each)} for each in keys]
    return [run.held_out.take(np.array([place[key] for key in order])) for run, place in zip(runs, places, strict=True)]
