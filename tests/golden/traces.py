"""The published traces, and what it means to follow one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.comparing import OF_OPERANDS

DATA = Path(__file__).parent / "data"
BASELINES = {"dpo": "dpo", "ipo": "dpo", "orpo": "orpo"}  # first part of a run's name -> method; the others are SimPO's

# `loss` is rounded to 4 decimals in the published traces; `logits` average over padding there, which is not reproduced.
CLOSE = ("rewards", "logps", "loss", "sft_loss", "nll_loss", "log_odds_ratio", "log_odds_chosen")
TOLERANCES = {
    **{f"{prefix}{name}": 2e-4 for name in CLOSE for prefix in ("", "eval_") if f"{prefix}{name}" != "loss"},
    "grad_norm": 1e-3,
}


def published(folder: str, name: str) -> list[dict]:
    return json.loads((DATA / folder / f"{name}.json").read_text(encoding="utf-8"))


def method_of(name: str) -> str:
    return BASELINES.get(name.split("-")[0], "simpo")


def traced(log: list[dict[str, Any]], name: str) -> list[tuple[dict, dict]]:
    """Records of a run and those of the published trace, in pairs."""
    expected = [record for record in published("traces", name) if "train_loss" not in record]
    # The evaluation after training stands behind the last step's.
    records = [record for record in log if "train_loss" not in record][: len(expected)]
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    return list(zip(records, expected, strict=True))


def assert_follows(log: list[dict[str, Any]], name: str) -> None:
    # Log-ratios start at 0, and log-odds lie around it: what is below 1 is compared by its distance.
    near_zero = 1e-7 if method_of(name) == "simpo" else 2e-4
    for record, wanted in traced(log, name):
        checked = 0
        for key, value in wanted.items():
            if is_tie(key, wanted):
                continue  # rounding decides which side of 0 a pair is on
            if (tolerance := TOLERANCES.get(key.split("/")[0])) is not None:
                distance = near_zero if abs(value) < 1 else 1e-7
                assert record[key] == pytest.approx(value, rel=tolerance, abs=distance), f"step {wanted['step']}, {key}"
                checked += 1
        assert checked >= 6
        if "loss" in wanted:
            # Half a unit of the fourth decimal, and what a float32 sum in another order strays by: IPO's losses are near 20.
            assert record["loss"] == pytest.approx(wanted["loss"], abs=5e-5 + OF_OPERANDS * (1 + abs(wanted["loss"])))


def is_tie(key: str, wanted: dict) -> bool:
    """Whether a share of pairs is asked for while all log-ratios are 0, before the first step has changed anything."""
    return key == "rewards/accuracies" and wanted["rewards/margins"] == 0
