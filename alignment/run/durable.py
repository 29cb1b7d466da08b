"""What every trainer here adds to the HF Trainer so that a run survives what happens to runs."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput

from ..errors import TrainingStopped
from ..launch.strategy import WHOLE_COPY, layout
from ..model.config_files import config_as_came, weights_alone, write_configs
from ..model.precision import Rounded, in_dtype
from ..model.tokenizer_files import save_tokenizer
from ..model.vocabulary import highest_id, refuse_unknown_ids, train_every_row
from .checkpoints import RECIPE_FILE, STAGING, Identity, numbered, prune, publish, seal, size
from .hub import push_checkpoint
from .resuming import AUTOMATIC, newest_whole
from .run_folder import umask, write_status
from .signals import RunInterrupted, StopSignals, outlast_signals

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
STATUS_S = 10.0  # between two looks at how far a run is


class EvaluationCut(Exception):
    """All processes agreed to leave an evaluation, because one of them was asked to stop."""


class DurableTrainer(Trainer):
    """A Trainer whose checkpoints are whole or absent, and which stops, on all processes at once, where it can go on.

    identity, stop: set by the pipeline; without them checkpoints name no run, and signals are not listened to.
    evaluation_due: the checkpoint that is resumed was saved in place of an evaluation, which then comes first.
    """

    identity: Identity | None = None
    evaluation_due = False
    is_stopping = False
    is_built = False
    push: Future | None = None  # of a checkpoint, in the background
    resumed: Path | None = None  # the checkpoint that `train` goes on from
    saved_at = 0.0  # monotonic clock
    saved_step = -1
    saves_in: str | None = None  # the type of a whole model's weights outside checkpoints; None: as they are
    saved_eos: str | None = None  # of the saved tokenizer, where it is another than in training
    rounded: Rounded | None = None  # what the weights were before they were rounded to `saves_in`
    unrounded_figures: Mapping[str, float] = MappingProxyType({})  # of an evaluation of those
    noted_at = 0.0  # in the status; monotonic clock
    sums_due: str | None = None  # the checkpoint whose sums are to be gone on with
    sample: Callable[[], None] | None = None  # in front of each evaluation in training; may raise EvaluationCut

    def __init__(self, *args: Any, **kwargs: Any):
        self.stop = StopSignals()
        super().__init__(*args, **kwargs)
        self.is_built = True
        self.config_as_came = config_as_came(self.model)
        train_every_row(self.model)
        self.refuse_unknown_ids()
        self.add_callback(StepEnds(self))
        self.take_early_stopping()

    def take_early_stopping(self) -> None:
        """What a recipe, or a callback of transformers', asks for: by a rule that outlasts a resume and knows several sets."""
        asked = [callback for callback in self.callback_handler.callbacks if type(callback) is EarlyStoppingCallback]
        for callback in asked:
            self.remove_callback(callback)
            self.add_callback(EarlyStopping(callback.early_stopping_patience, callback.early_stopping_threshold or 0.0))
        if getattr(self.args, "early_stopping_patience", None) is not None:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience, self.args.early_stopping_threshold))

    def refuse_unknown_ids(self) -> None:
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        highest = -1
        for data in (self.train_dataset, *evaluated):
            columns = [name for name in getattr(data, "column_names", None) or () if name.endswith("input_ids")]
            if isinstance(data, Dataset) and columns:
                highest = max(highest, highest_id(data, columns))
        if self.processing_class is not None:
            refuse_unknown_ids(self.model, self.processing_class, highest)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's; resume_from_checkpoint = True means the newest whole checkpoint.

        Raises RunInterrupted, with everything saved, if a process was asked to stop.
        """
        if resume_from_checkpoint is True:
            newest = newest_whole(Path(self.args.output_dir))
            resume_from_checkpoint = None if newest is None else str(newest.path)
        self.resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.saved_at = time.monotonic()
        self.sums_due = resume_from_checkpoint
        self.evaluation_due &= self.eval_dataset is not None  # the evaluation may have been switched off since
        if resume_from_checkpoint is not None:  # the one on start was before the first step
            self.args.eval_on_start = self.evaluation_due
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except EvaluationCut:  # the one that was due; the checkpoint says so still
            raise RunInterrupted(self.interruption()) from None
        if self.is_stopping:
            raise RunInterrupted(self.interruption())
        return output

    def interruption(self) -> str:
        name = self.stop.received.name if self.stop.received else "a signal to another process"
        return f"stopped by {name} after step {self.state.global_step} of {self.state.max_steps}; {self.way_on()}."

    def way_on(self) -> str:
        """What the next start goes on from, if anything."""
        step = self.state.global_step
        if self.saved_step != step:
            return "nothing was trained in this attempt" if step == self._initial_global_step else "it could not be saved"
        if self.args.save_only_model:
            return (
                "save_only_model keeps its weights and nothing to go on from: --resume_from_checkpoint=never starts the run "
                "again from step 0"
            )
        again = "" if self.args.resume_from_checkpoint in AUTOMATIC else ", without resume_from_checkpoint,"
        return f"its checkpoint is whole, and the same command{again} goes on from step {step}"

    def agree(self, *wishes: bool) -> list[bool]:
        """Whether any process has each wish. To be called by all of them, at the same point."""
        if self.args.world_size == 1:
            return list(wishes)
        return (self.accelerator.reduce(torch.tensor(wishes, device=self.args.device).float()) > 0).tolist()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, where a checkpoint of the last step was resumed, or of the one that training stopped at."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationCut:
            self.evaluation_due = self.is_stopping = True
            self.control.should_training_stop = True
            self._save_checkpoint(self.model, trial=None)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.restore_since_log()  # still due, if no step was left to train
        return super()._finalize_training(*args, **kwargs)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drops and description == "Training"  # every held-out row counts
        try:
            return outlast_signals(super()._get_dataloader(dataset, description, *args, **kwargs))
        finally:
            self.args.dataloader_drop_last = drops

    # ---- Evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, leaving the random numbers of training where they were."""
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            if self.sample is not None and self.is_in_train:
                self.sample()
            metrics = super().evaluate(*args, **kwargs)
        if self.evaluation_due:
            self.evaluation_due = self.args.eval_on_start = False
            self._determine_best_metric(metrics=metrics, trial=None)
            self.find_best()
        return metrics

    def find_best(self) -> None:
        """Where the best checkpoint is. The Trainer knows only where it was written, and only if its evaluation came before."""
        best = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best.is_dir():
            self.state.best_model_checkpoint = str(best.resolve())

    # ---- Checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written, and where the Trainer looks for old ones to delete: it finds none."""
        return str(Path(self.args.output_dir, STAGING))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write, describe, then rename into place; what fails leaves the older checkpoints as they were.

        Raises TrainingStopped if it fails and the recipe, or the strategy, cannot go on without.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, target = Path(self._get_output_dir(trial), name), Path(self.args.output_dir, name)
        self.saved_at = time.monotonic()  # of the attempt: the next one can wait as long, if it fails
        if self.saved_step == self.state.global_step:
            return
        first = self.is_world_process_zero()
        problem = self.no_room() if first else None
        for part in (lambda: self.write(staged, target, trial), lambda: self.publish(staged, target)):
            if self.agree(bool(problem))[0]:
                break
            problem = self.attempt(part)
        if self.agree(bool(problem))[0]:
            self.give_up_saving(staged, problem or "it failed on another process")
            return
        self.saved_step = self.state.global_step
        self.find_best()
        if first:
            run_id = self.identity and self.identity.run_id
            prune(Path(self.args.output_dir), self.args.save_total_limit, run_id, self.state.best_model_checkpoint)
            self.note_progress()
        if first and self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            is_free = self.push is None or self.push.done()
            if is_free or self.args.hub_always_push:
                self.push = push_checkpoint(self.args, target, self.push)

    def leave(self) -> NoReturn:
        """Save the present step, if it is not saved, where training has ended and the run has not; then raise RunInterrupted.

        On all processes.
        """
        self.is_stopping = True
        if self.rounded is not None:
            self.rounded.undo()
        self._save_checkpoint(self.model, trial=None)
        raise RunInterrupted(self.interruption()) from None

    def note_progress(self) -> None:
        """How far the run is, in its status."""
        self.noted_at = time.monotonic()
        if self.identity and self.is_world_process_zero():
            facts = {"step": self.state.global_step, "saved_step": max(self.saved_step, 0)}
            write_status(Path(self.args.output_dir), "training", **facts, max_steps=self.state.max_steps)

    def attempt(self, part: Callable[[], None]) -> str | None:
        """Do a part of saving; what was wrong, if the other processes can be told.

        Raises TrainingStopped where they cannot, because they are waiting inside the same part.
        """
        try:
            part()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
            if self.args.world_size > 1 and (layout(self.accelerator) != WHOLE_COPY or self.state.best_global_step):
                raise TrainingStopped(self.unsaved(str(error))) from error
            return str(error) or type(error).__name__
        return None

    def write(self, staged: Path, target: Path, trial: Any) -> None:
        """The Trainer's files; the recipe; and the best checkpoint under the name that it is going to have."""
        if self.is_world_process_zero():
            shutil.rmtree(staged.parent, ignore_errors=True)
        super()._save_checkpoint(self.model, trial)
        if not self.is_world_process_zero():
            return
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(target.resolve())
            self.state.save_to_json(str(staged / TRAINER_STATE))
        if self.identity:
            (staged / RECIPE_FILE).write_text(self.identity.recipe, encoding="utf-8")

    def publish(self, staged: Path, target: Path) -> None:
        if self.is_world_process_zero():
            seal(staged, self.facts())
            publish(staged, target)

    def facts(self) -> dict[str, Any]:
        """What the manifest says beside the files."""
        identity = self.identity._asdict() if self.identity else {}
        return {
            "step": self.state.global_step,
            "resumable": not self.args.save_only_model,
            "evaluation_due": self.evaluation_due,
            **{key: value for key, value in identity.items() if key != "recipe"},
        }

    def no_room(self) -> str | None:
        """Why a checkpoint does not fit on the disk, as far as can be told before it is written."""
        output_dir = Path(self.args.output_dir)
        written = [size(folder) for folder in numbered(output_dir).values()]
        needed, free = max(written, default=self.expected_size()), shutil.disk_usage(output_dir).free
        if needed <= free:
            return None
        return f"it needs about {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left"

    def expected_size(self) -> int:
        """Bytes of a first checkpoint: weights, and two float32 moments of each trained parameter."""
        trained = get_model_param_count(self.model, trainable_only=True)
        saved = trained if getattr(self.model, "peft_config", None) else get_model_param_count(self.model)
        return 4 * saved + 8 * trained

    def give_up_saving(self, staged: Path, problem: str) -> None:
        if self.is_world_process_zero():
            shutil.rmtree(staged.parent, ignore_errors=True)
        if self.args.on_save_failure == "stop" and not self.is_stopping:
            raise TrainingStopped(self.unsaved(problem))
        logger.error("%s Training goes on, because on_save_failure = continue.", self.unsaved(problem))

    def unsaved(self, problem: str) -> str:
        left = sorted(numbered(Path(self.args.output_dir)))
        kept = f"The last whole checkpoint is that of step {left[-1]}." if left else "There is no older checkpoint."
        return f"step {self.state.global_step}: the checkpoint could not be saved: {problem}. {kept}"

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the Trainer calls this before the checkpoint is whole; `_save_checkpoint` pushes it afterwards."""

    def _finish_current_push(self) -> None:
        """Before `push_to_hub`, which a push of a checkpoint must not overtake; the end of training waits for none."""
        if self.push is not None and not self.is_in_train:
            wait([self.push], timeout=60 * self.args.hub_minutes)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing while the trainer is built: a Hub that is down keeps no run from training. Each push asks for it."""
        if self.is_built:
            super().init_hf_repo(token, private)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights first, then what is read beside them; a pickle of the arguments, with hub_token in it, not at all."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        model = self.bare_model()
        if model is not self.model and state_dict is None:
            state_dict = self.model.state_dict()
        is_checkpoint = folder.parent == Path(self._get_output_dir(None))
        dtype = None if is_checkpoint or isinstance(model, PeftModel) else self.saves_in
        if dtype is not None:
            state_dict = in_dtype(model.state_dict() if state_dict is None else state_dict, getattr(torch, dtype), model)
        with weights_alone(model):
            model.save_pretrained(folder, state_dict=state_dict)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o666 & ~umask())  # safetensors leaves 0600, whatever the user's umask lets others read
        self.save_beside(folder, dtype)

    def save_beside(self, folder: Path, dtype: str | None = None) -> None:
        """What is read beside the weights. dtype: theirs, where it is not the model's."""
        write_configs(self.bare_model(), folder, self.config_as_came, dtype=dtype)
        if self.processing_class is not None:
            save_tokenizer(self.processing_class, folder, eos_token=self.saved_eos)

    def bare_model(self) -> PreTrainedModel | PeftModel:
        """The model below what a strategy wraps around it."""
        is_bare = isinstance(self.model, (PreTrainedModel, PeftModel))
        return self.model if is_bare else self.accelerator.unwrap_model(self.model)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also what has been summed up since the last log, which a resumed run goes on with."""
        super()._save_rng_state(output_dir)
        since_log = {
            "loss": float(self._tr_loss).hex(),
            "total_loss": self._total_loss_scalar.hex(),
            "last_logged_step": self._globalstep_last_logged,
            "processes": self.args.world_size,
            "sums": self.sums_since_log(),
        }
        path = Path(output_dir, f"since_last_log_{self.args.process_index}.json")
        path.write_text(json.dumps(since_log), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self.restore_since_log()

    def restore_since_log(self) -> None:
        checkpoint, self.sums_due = self.sums_due, None
        path = Path(checkpoint or "", f"since_last_log_{self.args.process_index}.json")
        since_log = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if since_log.get("processes") == self.args.world_size:  # sums of other processes do not add up to these
            self._tr_loss += float.fromhex(since_log["loss"])
            if "total_loss" in since_log:
                self._total_loss_scalar += float.fromhex(since_log["total_loss"])
                self.loss_is_whole = True
            self._globalstep_last_logged = since_log["last_logged_step"]
            self.restore_sums(since_log["sums"])

    def sums_since_log(self) -> dict[str, Any]:
        """What this process has summed up since the last log, exact, as JSON; a trainer with running means overrides this."""
        return {}

    def restore_sums(self, sums: dict[str, Any]) -> None:
        """Take back what `sums_since_log` gave."""


class EarlyStopping(TrainerCallback):
    """Stops training after `patience` evaluations in a row that are not better than the best before by more than `threshold`.

    Counted in the log, so that a resumed run goes on counting; transformers' own starts anew, and takes each of several
    evaluation sets for an evaluation that lacks the metric.
    """

    def __init__(self, patience: int, threshold: float):
        self.patience = patience
        self.threshold = threshold

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Also where a run is resumed at the step that it had stopped at."""
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.metric_for_best_model is None:
            return
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        sign = 1 if args.greater_is_better else -1
        by_step = {record["step"]: sign * record[name] for record in state.log_history if name in record}
        if by_step and max(by_step) == state.global_step:
            count = without_progress(list(by_step.values()), self.threshold)
            if count >= self.patience:
                control.should_training_stop = True
                logger.info("Stopping early, at step %d of %d: %s was no better in the last %s.", state.global_step,
                            state.max_steps, name, "evaluation" if count == 1 else f"{count} evaluations")  # fmt: skip


def without_progress(figures: list[float], threshold: float) -> int:
    """How many of the last figures, the higher the better, were not above the best before them by more than the threshold."""
    best, count = -math.inf, 0
    for figure in figures:
        count = 0 if figure - best > threshold else count + 1
        best = max(best, figure)
    return count


class StepEnds(TrainerCallback):
    """At the end of each step: stop or save, if it is time, on all processes alike.

    A step that ends an epoch is saved behind what the epoch's end logs and evaluates: a run that is resumed there does not
    come through that end again.
    """

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer
        self.save_waits = False  # for the end of the epoch

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_here = state.global_step in numbered(Path(args.output_dir))  # what was resumed may lie elsewhere
        self.trainer.saved_step = state.global_step if self.trainer.agree(is_here)[0] else -1
        self.trainer.find_best()
        self.trainer.note_progress()
        saves = args.save_strategy != "no" and (args.save_strategy != "steps" or state.save_steps < state.max_steps)
        if not saves and args.save_minutes is None:
            logger.warning(
                "Nothing will be saved before the end (save_strategy: %s, save_steps: %s): whatever stops the run but a signal "
                "loses all of it. --save_minutes=30 keeps checkpoints.", args.save_strategy.value, args.save_steps,
            )  # fmt: skip

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.is_in_train and time.monotonic() - self.trainer.noted_at > STATUS_S:
            self.trainer.note_progress()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        due = args.save_minutes is not None and time.monotonic() - trainer.saved_at >= 60 * args.save_minutes
        stop, save = trainer.agree(trainer.stop.received is not None, due and state.is_world_process_zero)
        control.should_save |= stop or save
        if stop:
            trainer.is_stopping = control.should_training_stop = True
            trainer.evaluation_due, control.should_evaluate = control.should_evaluate, False
        if control.should_training_stop or control.should_epoch_stop or ends_epoch(state):
            self.save_waits, control.should_save = control.should_save, False

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.agree(self.trainer.stop.received is not None)[0]:
            raise EvaluationCut

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.is_stopping:
            is_end = ends_epoch(state) or state.global_step >= state.max_steps
            control.should_log &= is_end
            trainer.evaluation_due |= control.should_evaluate and is_end
            control.should_evaluate = False
            if control.should_log:
                trainer.saved_step = -1  # saved without that log, if a step's evaluation was cut
        control.should_save |= trainer.is_stopping or self.save_waits
        self.save_waits = False


def ends_epoch(state: TrainerState) -> bool:
    """Whether the last step was the last of an epoch."""
    return state.epoch is not None and state.epoch.is_integer()
