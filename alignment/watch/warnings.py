"""Warnings while a run trains, once each: into its log, and into warnings.jsonl for its card and its review."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..preference.reference import PROBE
from ..preference.trainer import PairTrainer
from ..report.review.pairs import Pairs, pairs_of
from ..report.review.reading import HELD_OUT_FILE, PROBE_FILE, WARNINGS_FILE
from ..run.durable import DurableTrainer
from ..run.records import replace_jsonl
from .rules import Still, fallen, fallen_in_log, right_ones, spike, stands_still

logger = logging.getLogger(__name__)

STANDING = "_run/held_out_right.jsonl"  # step -> which held-out pairs were right, packed, for what a resumed run compares with
SLOWER = "Lower learning_rate (whole models: 3e-7 to 1e-6)"


class Warnings(TrainerCallback):
    """Looks at each record and each evaluation, on the main process. A resumed run does not repeat what it said before.

    at_start: name -> line, of settings.
    """

    def __init__(self, trainer: DurableTrainer, at_start: Mapping[str, str]):
        self.trainer, self.at_start = trainer, at_start
        self.folder = Path(trainer.args.output_dir)
        self.said: list[dict[str, Any]] = []
        self.earlier: dict[int, np.ndarray] = {}

    def warn(self, name: str, text: str) -> None:
        """Once for each name in a run's life. A full disk costs the record."""
        if any(row["warning"] == name for row in self.said):
            return
        step = self.trainer.state.global_step
        logger.warning("Step %d: %s.", step, text)
        self.said.append({"step": step, "warning": name, "text": text})
        self.keep(self.folder / WARNINGS_FILE, self.said)

    def keep(self, path: Path, rows: list[dict[str, Any]]) -> None:
        try:
            replace_jsonl(path, rows)
        except OSError as error:
            logger.warning("%s cannot be written (%s).", path, error.strerror)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        # As of the checkpoint: what was said behind it will be said again.
        self.said = rows_up_to(state.global_step, self.folder / WARNINGS_FILE)
        self.keep(self.folder / WARNINGS_FILE, self.said)
        self.earlier = {row["step"]: unpacked(row) for row in rows_up_to(state.global_step, self.folder / STANDING)}
        for name, text in self.at_start.items():
            self.warn(name, text)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        latest = state.log_history[-1]
        if "grad_norm" in latest and (found := spike(values(state, "grad_norm"))):
            self.warn(
                "gradient_spike",
                f"the gradient's norm is {latest['grad_norm']:.3g}, {found[0]:.0f} times the median of those logged before "
                f"({found[1]:.3g}). If it comes again, lower learning_rate or max_grad_norm, or look for rows unlike all "
                "others (--dry_run shows lengths and doubles)",
            )
        if "logps/chosen" in latest and self.only_logs() and (change := fallen_in_log(values(state, "logps/chosen"))):
            self.warn("chosen_fell", told_fall(change, "in training", "since its first record"))

    def only_logs(self) -> bool:
        """Whether there are no pairs that are scored again and again, and what is logged are means per token."""
        return isinstance(self.trainer, PairTrainer) and not self.trainer.held_out_sets() and self.trainer.objective.per_token

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero or state.global_step == 0 or not isinstance(self.trainer, PairTrainer):
            return
        held_out, probe = self.pairs("eval", HELD_OUT_FILE), self.pairs(PROBE, PROBE_FILE)
        looked_at, what = (held_out, "held-out") if held_out else (probe, "probe")
        if looked_at and (change := fallen(looked_at)):
            bounds = f"{change.low:.2f} to {change.high:.2f}"
            self.warn("chosen_fell", told_fall(change.value, f"of {change.n} {what} pairs", f"since step 0 ({bounds})"))
        if held_out and probe:
            self.compare(held_out, probe, state.global_step)

    def compare(self, held_out: Pairs, probe: Pairs, step: int) -> None:
        if held_out.before is not None and not held_out.has_reference:  # a log-ratio orders nothing at step 0
            self.earlier.setdefault(0, held_out.before.margin > 0)
        known = {each: right for each, right in self.earlier.items() if len(right) == len(held_out)}
        if found := stands_still(held_out, probe, known, step):
            self.warn("held_out_stands_still", told_standstill(found))
        self.earlier[step] = right_ones(held_out)
        self.keep(self.folder / STANDING, [packed(each, right) for each, right in sorted(self.earlier.items()) if each])

    def pairs(self, of: str, file: str) -> Pairs | None:
        """As the review will read them, in one order at every step."""
        rows = self.trainer.pair_records(of)
        return pairs_of(sorted(rows, key=lambda row: (row["step"], row["index"]))) if rows else None


def told_fall(change: float, where: str, since: str) -> str:
    return (
        f"the chosen responses {where} are less than half as likely per token as before: {change:.2f} nats {since}. Some "
        f"decline is usual, this is not. {SLOWER}, or add sft_weight; look at replies (sample_prompts) before you go on"
    )


def told_standstill(found: Still) -> str:
    change, low, high = (100 * value for value in found.change[:3])
    return (
        f"{found.probe.value:.0%} of {found.probe.n} training pairs are in the right order and {found.held_out.value:.0%} of "
        f"{found.held_out.n} held-out ones, {change:+.1f} points since step {found.since} ({low:+.1f} to {high:+.1f}): further "
        "steps learn these pairs by heart. Fewer epochs, a lower learning_rate or rank, or more pairs; "
        "early_stopping_patience ends a run here"
    )


def values(state: TrainerState, key: str) -> list[float]:
    return [record[key] for record in state.log_history if key in record]


def rows_up_to(step: int, path: Path) -> list[dict[str, Any]]:
    """What a run that goes on from a step finds of itself; nothing, at its start."""
    if step == 0 or not path.is_file():
        return []
    return [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if row["step"] <= step]


def packed(step: int, right: np.ndarray) -> dict[str, Any]:
    return {"step": step, "pairs": len(right), "right": np.packbits(right).tobytes().hex()}


def unpacked(row: dict[str, Any]) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), dtype=np.uint8), count=row["pairs"])
    return bits.astype(bool)
