"""The same pairs before the first step and behind the last one, as columns."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError

IDENTITY = ("prompt_sha256", "chosen_sha256", "rejected_sha256")
SCORES = ("chosen_mean_logp", "rejected_mean_logp", "chosen_reward", "rejected_reward")
NEEDED = ("step", "index", "chosen_tokens", "rejected_tokens", *SCORES)
Row = dict[str, Any]


class Scores(NamedTuple):
    """What a run said of n pairs at one step; each (n,). Log-probabilities in nats per token; rewards are the run's own."""

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_reward: np.ndarray
    rejected_reward: np.ndarray

    @property
    def d(self) -> np.ndarray:
        """Chosen minus rejected mean log-probability per token: one measure, whatever the objective."""
        return self.chosen - self.rejected

    @property
    def margin(self) -> np.ndarray:
        """Chosen minus rejected reward, the run's own measure."""
        return self.chosen_reward - self.rejected_reward

    def take(self, places: np.ndarray) -> "Scores":
        return Scores(*(column[places] for column in self))


@dataclass(frozen=True)
class Pairs:
    """n pairs, looked at twice; each column (n,).

    prompts: int, equal for pairs of one prompt. keys: what another run's pairs are matched by, where hashes are known.
    before: None for a run that did not score its pairs before the first step.
    """

    prompts: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    after: Scores
    before: Scores | None = None
    last_step: int | None = None
    truncated: np.ndarray | None = None
    has_reference: bool = False
    keys: tuple[str, ...] | None = None
    indices: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, places: np.ndarray) -> "Pairs":
        """The pairs at these places, in this order."""
        return Pairs(
            self.prompts[places],
            self.chosen_tokens[places],
            self.rejected_tokens[places],
            self.after.take(places),
            self.before and self.before.take(places),
            self.last_step,
            None if self.truncated is None else self.truncated[places],
            self.has_reference,
            self.keys and tuple(self.keys[place] for place in places),
            self.indices and tuple(self.indices[place] for place in places),
        )


def is_number(value: Any) -> bool:
    """A finite one, that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def whole_rows(rows: Sequence[Row], where: str) -> list[Row]:
    """Those with a finite number in every column that a review needs. Raises UserError where none of them has."""
    whole = [row for row in rows if all(is_number(row.get(name)) for name in NEEDED)]
    if rows and not whole:
        missing = sorted({name for row in rows for name in NEEDED if not is_number(row.get(name))})
        raise UserError(f"{where}: rows lack {', '.join(missing)}; a review reads them as a run of this suite writes them")
    return whole


def pairs_of(rows: Sequence[Row]) -> Pairs | None:
    """The whole rows of an eval_pairs.jsonl or probe_pairs.jsonl, matched by index; None where there are none of a last step.

    A pair that one of the two looks lacks is left out.
    """
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return None
    last = {row["index"]: row for row in rows if row["step"] == steps[-1]}
    first = {row["index"]: row for row in rows if row["step"] == 0} if steps[0] == 0 and steps[-1] > 0 else {}
    shared = [index for index in last if index in first] if first else list(last)
    if not shared or steps[-1] == 0:
        return None
    after, before = [last[index] for index in shared], [first[index] for index in shared] if first else None
    is_known = all(isinstance(row.get(name), str) for row in after for name in IDENTITY)
    prompt_names = [row["prompt_sha256"] if isinstance(row.get("prompt_sha256"), str) else row["index"] for row in after]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(prompt_names))}
    return Pairs(
        prompts=np.array([numbers[name] for name in prompt_names]),
        chosen_tokens=column(after, "chosen_tokens"),
        rejected_tokens=column(after, "rejected_tokens"),
        after=scores_of(after),
        before=scores_of(before) if before else None,
        last_step=steps[-1],
        truncated=np.array([bool(row.get("chosen_truncated") or row.get("rejected_truncated")) for row in after]),
        has_reference="reference_chosen_logp" in after[0],
        keys=tuple("|".join(row[name] for name in IDENTITY) for row in after) if is_known else None,
        indices=tuple(shared),
    )


def scores_of(rows: Sequence[Row]) -> Scores:
    return Scores(*(column(rows, name) for name in SCORES))


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)
