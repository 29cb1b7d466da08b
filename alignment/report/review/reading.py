"""What a run left, read: a run folder of this suite, another trainer's output folder, or a bare log."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...errors import UserError
from .logs import Log, LogSignals, log_signals, raw_records, read_log, read_preferences, text_of
from .pairs import Pairs, is_number, pairs_of, whole_rows
from .signals import Replies, Signals, replies_of, signals_of

HELD_OUT_FILE, PROBE_FILE, SAMPLES_FILE = "eval_pairs.jsonl", "probe_pairs.jsonl", "samples.jsonl"
WARNINGS_FILE = "warnings.jsonl"
LOGS = ("metrics.jsonl", "trainer_state.json", "checkpoint-*/trainer_state.json", "trainer_log.jsonl")
# What runs of one cell may differ in: the seed, and where and how a run was carried out.
NOT_OF_A_CELL = (
    "seed", "data_seed", "output_dir", "run_name", "logging_dir", "hub_model_id", "report_to", "disable_tqdm", "log_level",
    "save_steps", "save_strategy", "save_total_limit", "save_minutes", "resume_from_checkpoint", "push_to_hub",
    "sample_prompts", "sample_max_new_tokens", "sample_temperature",
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One run. name: unique among those that are read together. log: None for a folder that has pairs and no log."""

    name: str
    path: Path
    log: Log | None = None
    held_out_log: Log | None = None  # a separate one
    held_out: Pairs | None = None
    probe: Pairs | None = None
    replies: Replies | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def objective(self) -> str | None:
        """Its name, as the run recorded it."""
        objective = self.environment.get("objective")
        return objective.get("name") if isinstance(objective, dict) else None

    @property
    def seed(self) -> int | None:
        return self.recipe.get("seed")

    @property
    def gamma(self) -> float | None:
        """The margin, in units of reward, that a loss -log sigmoid(margin - gamma) asks for; None where the loss is another."""
        recipe = self.recipe
        beta, ratio = recipe.get("beta") or 0.0, recipe.get("gamma_beta_ratio", 0.0)
        if recipe.get("loss_type") not in ("sigmoid", "alphapo") or recipe.get("label_smoothing"):
            return None
        return beta * ratio if is_number(beta) and is_number(ratio) else None

    @property
    def cell(self) -> str | None:
        """Equal for runs of one recipe but for the seed; None without a recipe."""
        kept = {key: value for key, value in self.recipe.items() if key not in NOT_OF_A_CELL}
        return json.dumps([self.objective, kept], sort_keys=True, default=str) if kept else None

    def log_signals(self) -> LogSignals | None:
        if self.log is None and self.held_out_log is None:
            return None
        return log_signals(self.log or Log(()), self.held_out_log)

    def signals(self) -> Signals:
        return signals_of(
            self.held_out,
            self.probe,
            gamma=self.gamma,
            replies=self.replies,
            log=self.log_signals(),
            is_chosen_step=bool(self.recipe.get("load_best_model_at_end") or self.environment.get("is_chosen_step")),
        )


def read_runs(paths: Sequence[Path], eval_log: Path | None = None) -> list[Reading]:
    """Each path's run. Raises UserError for a path that holds none, and for an eval_log of several runs."""
    if eval_log is not None and len(paths) > 1:
        raise UserError(f"--eval_log {eval_log}: belongs to one run, and {len(paths)} were given; review them one by one")
    return [read_run(path, name, eval_log) for path, name in zip(paths, names_of(paths), strict=True)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart. Raises UserError for one that stands twice."""
    parts = [path.resolve().parts for path in paths]
    for number, path in enumerate(paths):
        if parts[number] in parts[:number]:
            raise UserError(f"{path}: given twice")
    depth = 1
    while len({each[-depth:] for each in parts}) < len(parts):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def read_run(path: Path, name: str | None = None, eval_log: Path | None = None) -> Reading:
    """A run folder or a bare log. Raises UserError where no pairs were trained on, or none of it was recorded."""
    reading = read_any_run(path, name, eval_log)
    if reading.held_out is None and reading.held_out_log is None and reading.log and not reading.log.has_preferences:
        read_preferences(find_log(path) if path.is_dir() else path)
    return reading


def read_any_run(path: Path, name: str | None = None, eval_log: Path | None = None) -> Reading:
    """As `read_run`, of a run that need not have trained on pairs."""
    name = name or path.resolve().name
    held_out_log = None if eval_log is None else read_preferences(eval_log, unprefixed="eval")
    if path.is_file():
        return Reading(name, path, read_log(path), held_out_log)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder or log")
    log_path = find_log(path)
    notes: list[str] = []
    held_out, probe = (read_pairs(path / file, notes) for file in (HELD_OUT_FILE, PROBE_FILE))
    if log_path is None and held_out is None:
        raise UserError(f"{path}: no run was logged here: neither {', '.join(LOGS)} nor {HELD_OUT_FILE}")
    recipe, environment = read_yaml(path / "recipe.yaml"), read_json(path / "environment.json")
    status = read_json(path / "_run" / "status.json").get("state", "finished")
    if status != "finished":
        notes.append(f"this run is not finished: {status}")
    log = None if log_path is None else read_log(log_path)
    if log is not None and not log.has_preferences:
        notes.append(f"{log_path.name}: no preference metric in {len(log.records)} records")
    replies = read_replies(path / SAMPLES_FILE, notes)
    notes += [f"warned at step {row['step']}: {row['text']}" for row in read_warnings(path / WARNINGS_FILE)]
    return Reading(name, path, log, held_out_log, held_out, probe, replies, recipe, environment, tuple(notes))


def find_log(folder: Path) -> Path | None:
    """Of what a trainer leaves, the fullest; of checkpoints the newest."""
    for pattern in LOGS:
        if found := list(folder.glob(pattern)):
            return max(found, key=step_of)
    return None


def step_of(path: Path) -> int:
    """Of a file in a checkpoint's folder. Not its time, which a copy need not keep."""
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def read_pairs(path: Path, notes: list[str]) -> Pairs | None:
    if not path.exists():
        return None
    rows, malformed = raw_records(text_of(path))
    whole = whole_rows(rows, str(path))
    malformed += len(rows) - len(whole)
    pairs = pairs_of(whole)
    if malformed:
        notes.append(f"{path.name}: {malformed} malformed lines left out")
    if pairs is None:
        notes.append(f"{path.name}: no pair was scored after the last step")
    return pairs


def read_replies(path: Path, notes: list[str]) -> Replies | None:
    """Of a samples.jsonl: rows with step, prompt, response, and tokens where they were counted. Step 0 against the last."""
    if not path.exists():
        return None
    rows, malformed = raw_records(text_of(path))
    if malformed:
        notes.append(f"{path.name}: {malformed} malformed lines left out")
    rows = [row for row in rows if is_number(row.get("step")) and "prompt" in row and isinstance(row.get("response"), str)]
    last = max((row["step"] for row in rows), default=0)
    if last == 0:
        return None
    by_prompt = [{json.dumps(row["prompt"]): row for row in rows if row["step"] == step} for step in (0, last)]
    pairs = [(by_prompt[0][prompt], after) for prompt, after in by_prompt[1].items() if prompt in by_prompt[0]]
    before, after = [old["response"] for old, _ in pairs], [new["response"] for _, new in pairs]
    counted = all(is_number(row.get("tokens")) for pair in pairs for row in pair)
    tokens = ([old["tokens"] for old, _ in pairs], [new["tokens"] for _, new in pairs]) if counted else None
    return replies_of(before, after, tokens)


def read_warnings(path: Path) -> list[dict[str, Any]]:
    """What the run itself warned of: step, warning (its name) and text."""
    rows = raw_records(text_of(path))[0] if path.exists() else []
    return [row for row in rows if {"step", "text"} <= set(row)]


def read_yaml(path: Path) -> dict[str, Any]:
    """A run's recipe; empty where there is none. Raises UserError for one that is damaged."""
    if not path.exists():
        return {}
    try:
        return mapping(yaml.safe_load(text_of(path)), path)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return mapping(json.loads(text_of(path)), path)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def mapping(value: Any, path: Path) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: is {value!r:.80}, not keys with values")
    return value
