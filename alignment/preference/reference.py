"""What the policy said of every pair before its first step: the reference of DPO, and what its end is compared with.

Scored once, by the forward that trains, and kept in the run's folder and in its checkpoints: no second model is ever held.
"""

import hashlib
import logging
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..data.prepare import pair_tokens
from ..data.splits import fingerprint
from ..errors import UserError
from ..model.config_files import whole_model
from ..run.checkpoints import RECIPE_FILE, Damaged, seal, verify
from ..run.durable import DurableTrainer, EvaluationCut
from ..run.resuming import recipe_differences
from ..run.run_folder import umask
from .collate import Batch, PaddedCollator
from .configs import PairConfig
from .fidelity import PAIRS, evaluating, settle_scoring
from .scores import PairScores

logger = logging.getLogger(__name__)

REFERENCE, STEP_0 = "reference", "step_0"  # folders in _run and in every checkpoint, with a reference or without
TRAIN, PROBE = "train", "probe"
COLUMNS = ("index", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")


class StepZero(NamedTuple):
    """The policy's scores of one data set before its first step: COLUMNS, each (rows,), and the SHA-256 of its tokens."""

    data: str
    columns: dict[str, Tensor]

    def by_index(self, device: torch.device) -> Tensor:
        """(2, largest index + 1): summed log-probabilities of the chosen and the rejected responses."""
        index, logps = self.columns["index"], torch.stack([self.columns["chosen_logp"], self.columns["rejected_logp"]])
        table = logps.new_full((2, int(index.max()) + 1), torch.nan)
        table[:, index] = logps
        return table.to(device)


class ScoredFirst(DurableTrainer):
    """A DurableTrainer that scores pairs before its first step, and remembers what it found.

    The subclass has `concatenated_forward`; args.objective.has_reference makes it score the training pairs too.
    """

    args: PairConfig
    max_tokens: int | None  # of a batch; None: args.eval_batch_size pairs

    def __init__(self, *args: Any, **kwargs: Any):
        self.step_zero: dict[str, StepZero] = {}  # TRAIN or PROBE, and the held-out sets by the prefix of their metrics
        self.reference_tables: dict[str, Tensor] = {}  # by the SHA-256 of the data
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Behind every other callback: FSDP 2 leaves the last layers gathered after a forward, and shards are checked before.
        self.remove_callback(BeforeTheFirstStep)
        self.add_callback(BeforeTheFirstStep(self))
        return super().train(*args, **kwargs)

    @property
    def has_reference(self) -> bool:
        return self.args.objective.has_reference

    def held_out_sets(self) -> dict[str, Dataset]:
        """The held-out sets, by the prefix of their metrics."""
        if isinstance(self.eval_dataset, dict):
            return {f"eval_{name}": rows for name, rows in self.eval_dataset.items()}
        return {} if self.eval_dataset is None else {"eval": self.eval_dataset}

    def to_score(self) -> dict[str, Dataset]:
        if self.has_reference:
            return {TRAIN: self.train_dataset} | self.held_out_sets()  # the probe's pairs are training pairs
        probe = self.probe_rows()
        return ({} if probe is None else {PROBE: probe}) | self.held_out_sets() if self.args.score_step_0 else {}

    def probe_rows(self) -> Dataset | None:
        """Some training pairs, the same ones each time, that are scored as the held-out ones are; at most as many as those."""
        rows, held_out = self.train_dataset, next(iter(self.held_out_sets().values()), None)
        count = 0 if rows is None or held_out is None else min(self.args.train_probe, len(held_out), len(rows))
        return rows.select(sorted(random.Random(self.args.seed).sample(range(len(rows)), count))) if count else None

    # ---- Before the first step ----

    def settle_scoring(self, rows: Dataset) -> None:
        """Compare the scoring forward with the model's own on a few of the rows."""
        args, model = self.args, self.bare_model()
        settle_scoring(
            self.model_wrapped,
            whole_model(model),
            list(rows.select(range(min(PAIRS, len(rows))))),
            self.data_collator,
            pad=self.processing_class.pad_token_id or 0,
            half=args.bf16 or args.fp16 or model.dtype != torch.float32,
            device=args.device,
        )

    def begin(self) -> None:
        """Score, or read what was scored. On all processes, with the model as it is trained.

        Raises UserError if the checkpoint that is resumed lacks what the objective needs.
        """
        self.settle_scoring(self.train_dataset)
        folder, wanted = self.step_zero_folder(), self.to_score()
        if self.state.global_step > 0:
            self.step_zero = load_step_zero(self.resumed / folder.name) if self.resumed else {}
            if self.has_reference and TRAIN not in self.step_zero:
                raise UserError(
                    f"{self.resumed}: it has no reference log-probabilities, and its policy is not at step 0 any more. Start "
                    "afresh with --resume_from_checkpoint=never, or go on with the run that wrote it."
                )
        elif wanted:
            data = {name: fingerprint(rows) for name, rows in wanted.items()}
            if self.agree(self.is_world_process_zero() and is_of_run(folder, self.origin(), self.recipe_text(), data))[0]:
                self.step_zero = load_step_zero(folder)
                logger.info("%s: scored before, by an attempt that did not reach its first checkpoint.", folder)
            else:
                for name, rows in wanted.items() if self.has_reference else ():
                    refuse_shared_index(rows, name)
                self.step_zero = {
                    name: StepZero(data[name], self.score(rows, f"{name}, before the first step"))
                    for name, rows in wanted.items()
                }
        if self.step_zero and self.is_world_process_zero():
            self.keep(folder)
        self.reference_tables.clear()

    def step_zero_folder(self) -> Path:
        return Path(self.args.output_dir, "_run", REFERENCE if self.has_reference else STEP_0)

    def origin(self) -> dict[str, Any]:
        """What the scores come from, beside the data: the weights, and how they were loaded and divided."""
        return {} if self.identity is None else {"base": self.identity.base, "start": self.identity.start}

    def recipe_text(self) -> str | None:
        return self.identity and self.identity.recipe

    def keep(self, folder: Path) -> None:
        """Write the scores into the run's folder, where they are not there. A full disk costs the copy, not the run."""
        if digest(load_step_zero(folder)) == digest(self.step_zero):
            return
        staged = folder.with_name(f"{folder.name}.new")
        try:
            shutil.rmtree(staged, ignore_errors=True)
            save_step_zero(staged, self.step_zero, self.recipe_text())
            seal(staged, {**self.origin(), "data": {name: scored.data for name, scored in self.step_zero.items()}})
            shutil.rmtree(folder, ignore_errors=True)
            staged.rename(folder)
        except (OSError, SafetensorError) as error:
            logger.warning("%s could not be written (%s); checkpoints hold the same.", folder, error)

    def score(self, rows: Dataset, what: str) -> dict[str, Tensor]:
        """COLUMNS of all pairs, in their order, by the policy as it is now, dropout off; each process scores a share.

        Raises EvaluationCut if a process was asked to stop.
        """
        is_padded = isinstance(self.data_collator, PaddedCollator)
        batches = scoring_batches(rows, self.args.eval_batch_size, self.max_tokens, is_padded=is_padded)
        mine = batches[self.args.process_index :: self.args.world_size]
        model = self._wrap_model(self.model, training=False)
        found = torch.zeros(len(COLUMNS), len(rows), dtype=torch.float64, device=self.args.device)
        dtype = torch.float32
        shown = self.is_world_process_zero() and not self.args.disable_tqdm
        bar = tqdm(total=len(rows), desc=f"Scoring {what}", unit="pair", disable=not shown)
        with bar, evaluating(model), self.compute_loss_context_manager():
            for number in range(-(-len(batches) // self.args.world_size)):
                # A process with fewer batches scores one of them again: collectives come in equal numbers.
                numbers = mine[number] if number < len(mine) else batches[0]
                batch: Batch = self._prepare_inputs(self.data_collator([rows[place] for place in numbers]))
                scores = self.concatenated_forward(model, batch)._asdict() | {"index": batch["index"]}
                if number < len(mine):
                    found[:, numbers] = torch.stack([scores[name].double() for name in COLUMNS])
                dtype = scores["chosen_logp"].dtype
                bar.update(len(numbers) * self.args.world_size)  # about: other processes have batches of their own
                if self.agree(self.stop.received is not None)[0]:
                    raise EvaluationCut
        found = self.accelerator.reduce(found, reduction="sum").cpu()
        dtypes = {name: dtype if name.endswith("logp") else torch.int64 for name in COLUMNS}
        return {name: column.to(dtypes[name]).clone() for name, column in zip(COLUMNS, found, strict=True)}

    # ---- Afterwards ----

    def with_reference(self, scores: PairScores, index: Tensor, rows: Dataset | None) -> PairScores:
        """The scores of pairs of a data set, and the reference's beside them, where the objective has one.

        Before the first step the policy is the reference. Raises UserError for pairs that were not scored then.
        """
        if not self.has_reference:
            return scores
        table = self.reference_table(rows)
        if table is not None:
            chosen, rejected = table[:, index.to(table.device)].to(index.device)
        elif self.state.global_step == 0 and not self.step_zero:
            chosen, rejected = scores.chosen_logp.detach(), scores.rejected_logp.detach()
        else:
            raise UserError(
                "these pairs have no reference log-probabilities, because they were not scored before the first step; give "
                "them to the trainer as eval_dataset when it begins"
            )
        return scores._replace(reference_chosen_logp=chosen, reference_rejected_logp=rejected)

    def reference_table(self, rows: Dataset | None) -> Tensor | None:
        key = "" if rows is None else rows._fingerprint
        if key not in self.reference_tables and self.step_zero:
            data = self.step_zero[TRAIN].data if rows is self.train_dataset else fingerprint(rows)
            scored = next((scored for scored in self.step_zero.values() if scored.data == data), None)
            self.reference_tables[key] = scored and scored.by_index(self.args.device)
        return self.reference_tables.get(key)

    # ---- Checkpoints ----

    def write(self, staged: Path, target: Path, trial: Any) -> None:
        super().write(staged, target, trial)
        if self.step_zero and self.is_world_process_zero():
            save_step_zero(staged / self.step_zero_folder().name, self.step_zero, recipe=None)

    def facts(self) -> dict[str, Any]:
        scored = {self.step_zero_folder().name: digest(self.step_zero)} if self.step_zero else {}
        return super().facts() | scored


class BeforeTheFirstStep(TrainerCallback):
    """Scores when the model is divided and loaded as it will be trained."""

    def __init__(self, trainer: ScoredFirst):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.begin()


def refuse_shared_index(rows: Dataset, name: str) -> None:
    """Raises UserError for pairs that their index does not tell apart."""
    index, count = np.unique(np.array(rows["index"][:]), return_counts=True)
    if (count > 1).any():
        raise UserError(f"several pairs of {name} have the index {index[count > 1][0]}: a reference is found by the index")


def scoring_batches(rows: Dataset, size: int, budget: int | None, *, is_padded: bool) -> list[list[int]]:
    """Numbers of the rows of each batch: as many as an evaluation takes, or by tokens as micro-batches, longest first."""
    if budget is None:
        return [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
    tokens = 2 * np.array(rows["length"][:]) if is_padded else pair_tokens(rows)
    batches: list[list[int]] = []
    room = 0
    for number in (-tokens).argsort(kind="stable").tolist():
        taken = tokens[batches[-1][0]] if batches and is_padded else tokens[number]  # padded rows are as long as the longest
        if taken > room:
            batches.append([])
            taken, room = tokens[number], budget
        batches[-1].append(number)
        room -= taken
    return batches


# ---- Files ----


def digest(sets: dict[str, StepZero]) -> str | None:
    """SHA-256 of all scores and of what they are of."""
    if not sets:
        return None
    hashed = hashlib.sha256()
    for name, scored in sorted(sets.items()):
        hashed.update(f"{name} {scored.data}\n".encode())
        for column in COLUMNS:
            hashed.update(scored.columns[column].numpy().tobytes())
    return hashed.hexdigest()


def save_step_zero(folder: Path, sets: dict[str, StepZero], recipe: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, scored in sets.items():
        path = folder / f"{name}.safetensors"
        save_file(scored.columns, path, metadata={"data": scored.data})
        path.chmod(0o666 & ~umask())  # safetensors leaves 0600, whatever the user's umask lets others read
    if recipe is not None:
        (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")


def load_step_zero(folder: Path) -> dict[str, StepZero]:
    """What a folder holds; nothing, where it is not there or cannot be read."""
    sets = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                sets[path.stem] = StepZero(file.metadata()["data"], load_file(path))
    except (OSError, SafetensorError):
        return {}
    return sets


def is_of_run(folder: Path, origin: dict[str, Any], recipe: str | None, data: dict[str, str]) -> bool:
    """Whether a folder was scored from the same weights and data by the same recipe, and is as it was written."""
    try:
        facts = verify(folder).manifest
    except Damaged:
        return False
    if not origin or recipe is None or facts != {**origin, "data": data} or not (folder / RECIPE_FILE).is_file():
        return False
    before = (folder / RECIPE_FILE).read_text(encoding="utf-8")
    return not recipe_differences(yaml.safe_load(before), yaml.safe_load(recipe))
