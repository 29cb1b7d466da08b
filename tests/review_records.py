"""Record sets of runs whose truth is known, as files and as columns."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from alignment.report.review.pairs import Pairs, Scores


def columns(
    before: np.ndarray,
    after: np.ndarray,
    *,
    chosen_change: float | np.ndarray = 0.0,
    lengths: tuple[np.ndarray, np.ndarray] | None = None,
    prompts: np.ndarray | None = None,
    beta: float = 2.0,
    has_reference: bool = False,
    keys: tuple[str, ...] | None = None,
) -> Pairs:
    """Pairs of these d, (n,) each. Rewards are beta times the mean log-probability, or its change for a reference."""
    n = len(before)
    chosen = -1.2 + 0.1 * np.sin(np.arange(n))
    later = chosen + chosen_change
    first, last = (chosen, chosen - before), (later, later - after)
    zero = (first[0], first[1]) if has_reference else (0.0, 0.0)
    scores = [Scores(*side, *(beta * (logp - base) for logp, base in zip(side, zero, strict=True))) for side in (first, last)]
    tokens = lengths or (np.full(n, 20.0), np.full(n, 20.0))
    return Pairs(
        np.arange(n) if prompts is None else prompts, *tokens, scores[1], scores[0], 100, has_reference=has_reference, keys=keys
    )


def rows_of(pairs: Pairs, name: str = "eval") -> list[dict[str, Any]]:
    """As a run writes them: step 0, then the last step. Pairs of two runs with one name are the same pairs."""

    def sha(text: object) -> str:
        return hashlib.sha256(f"{name} {text}".encode()).hexdigest()

    rows = []
    for step, scores in ((0, pairs.before), (100, pairs.after)):
        for place in range(len(pairs)):
            values = {"step": step, "index": place}
            values |= {"prompt_sha256": sha(f"p{pairs.prompts[place]}"), "chosen_sha256": sha(f"c{place}")}
            values |= {"rejected_sha256": sha(f"r{place}"), "chosen_truncated": False, "rejected_truncated": False}
            for side in ("chosen", "rejected"):
                tokens, mean_logp = int(getattr(pairs, f"{side}_tokens")[place]), float(getattr(scores, side)[place])
                values |= {f"{side}_tokens": tokens, f"{side}_logp": mean_logp * tokens, f"{side}_mean_logp": mean_logp}
                values[f"{side}_reward"] = float(getattr(scores, f"{side}_reward")[place])
                if pairs.has_reference:
                    values[f"reference_{side}_logp"] = float(getattr(pairs.before, side)[place]) * tokens
            rows.append(values)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def log_records() -> list[dict[str, Any]]:
    train = [
        {"step": step, "loss": 1.0, "rewards/margins": step / 50, "rewards/accuracies": 0.5 + step / 250,
         "rewards/chosen": -1 - step / 100, "rewards/rejected": -1 - step / 40}
        for step in range(10, 101, 10)
    ]  # fmt: skip
    held_out = [
        {"step": step, "eval_rewards/margins": step / 80, "eval_rewards/accuracies": 0.6 + step / 1000,
         "probe_rewards/margins": step / 60, "probe_rewards/accuracies": 0.6 + step / 400}
        for step in (0, 100)
    ]  # fmt: skip
    return train + held_out


def save_run(
    folder: Path, held_out: Pairs, probe: Pairs | None = None, *, objective: str = "SimPO", name: str = "eval", **recipe: Any
) -> Path:
    """A run folder as a run leaves it, without the model."""
    folder.mkdir(parents=True)
    write_jsonl(folder / "eval_pairs.jsonl", rows_of(held_out, name))
    if probe is not None:
        write_jsonl(folder / "probe_pairs.jsonl", rows_of(probe, "probe"))
    write_jsonl(folder / "metrics.jsonl", log_records())
    keys = {"loss_type": "sigmoid", "beta": 2.0, "gamma_beta_ratio": 0.5, "seed": 42, "output_dir": str(folder), **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"objective": {"name": objective}}), encoding="utf-8")
    return folder
