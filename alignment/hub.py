"""Pushing to the Hub, which may be down, slow or closed to this token: it never costs a run anything that was trained."""

import logging
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import transformers.trainer
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .checkpoints import numbered
from .errors import TrainingStopped, UserError
from .signals import RunInterrupted, StopSignals

logger = logging.getLogger(__name__)

ANSWER_S = 30.0  # how long a start waits for the Hub
PAUSES_S = (2.0, 8.0, 32.0, 128.0)  # between the attempts of the last push
LEFT_OUT = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", "training_args.bin")  # of a run's folder; "*" also stands for slashes
# What makes a model out of a checkpoint's files.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "*token*", "*.jinja", "*.model", "vocab.*", "merges.txt",
)  # fmt: skip


class NotPushed(TrainingStopped):
    """The run is finished and saved; only its push failed, and the same command does that alone."""


def check_hub(args: TrainingArguments) -> None:
    """Ask for the repository, which is made if there is none; one that does not answer now is asked again later.

    Raises UserError if its name is none, or if the Hub says that this token may not write there.
    """

    def ask() -> None:
        huggingface_hub.auth_check(create_repository(args), write=True, token=args.hub_token)

    try:
        in_background(ask).result(timeout=ANSWER_S)
    except HFValidationError as error:
        raise UserError(f"hub_model_id = {repository_name(args)!r}: {error}") from error
    except Exception as error:  # whatever it is, it must not keep a run from training
        if status_code(error) in (401, 403):
            raise UserError(
                f"push_to_hub = True: the Hub does not let this token write to {repository_name(args)!r} "
                f"({reason(error, args)}). Give one that may (`hf auth login`, HF_TOKEN or --hub_token), another "
                "--hub_model_id, or --push_to_hub=false"
            ) from None
        logger.warning(
            "The Hub could not be asked for %s: %s. Training goes on; the push at the end asks again.",
            repository_name(args),
            reason(error, args),
        )


def push_checkpoint(args: TrainingArguments, checkpoint: Path, before: Future | None) -> Future:
    """Start sending a whole checkpoint, as hub_strategy says, once the push `before` is over. A failure is only logged."""

    def send() -> None:
        if before is not None:
            wait([before])
        try:
            upload(args, checkpoint, f"Training in progress, {checkpoint.name}", allow_patterns=list(MODEL_FILES))
            upload_state(args, checkpoint)
        except Exception as error:  # on a thread of its own; the push at the end meets it again
            logger.warning(
                "%s was not pushed to the Hub: %s. Training goes on; the push at the end sends what is missing.",
                checkpoint.name,
                reason(error, args),
            )

    return in_background(send)


def push_run(args: TrainingArguments, stop: StopSignals, before: Future | None = None) -> None:
    """Send a finished run's folder, again after a pause where that may help, for hub_minutes in all.

    before: a push that is still on its way, and that must not overwrite this one later.
    Raises NotPushed if it stays without success, RunInterrupted if a signal comes first.
    """
    deadline = time.monotonic() + 60 * args.hub_minutes
    attempt = before
    for pause in (0.0, *PAUSES_S):
        if before is not None and not awaited(before, deadline, stop):
            break
        wait_until(lambda start=time.monotonic() + pause: time.monotonic() >= start, deadline, stop)
        if stop.received or time.monotonic() >= deadline:
            break
        attempt = in_background(lambda: upload_run(args))
        if not awaited(attempt, deadline, stop):
            break
        error = attempt.exception()
        if error is None:
            logger.info("Pushed to the Hub: %s.", repository_name(args))
            return
        logger.warning("Not pushed to the Hub: %s.", reason(error, args))
        if not may_pass(error):
            break
    saved = f"this run is finished, and all of it is saved in {args.output_dir}"
    again = f"The same command does that alone; or\n{hf_upload(args)}"
    if stop.received:
        raise RunInterrupted(f"stopped by {stop.received.name}: {saved}, but not pushed to the Hub. {again}")
    error = attempt.exception() if attempt is not None and attempt.done() else None
    why = reason(error, args) if error else f"it took longer than hub_minutes = {args.hub_minutes:g}"
    raise NotPushed(f"{saved}, but it could not be pushed to the Hub: {why}. {again}")


def hf_upload(args: TrainingArguments) -> str:
    """The shell command that does what push_run does, token and checkpoints aside."""
    options = [f"--exclude={pattern}" for pattern in LEFT_OUT]
    options += [f"--revision={args.hub_revision}"] if args.hub_revision else []
    options += ["--private"] if args.hub_private_repo else []
    return shlex.join(["hf", "upload", repository_name(args), args.output_dir, ".", *options])


# ---- Requests ----


def repository_name(args: TrainingArguments) -> str:
    return args.hub_model_id or Path(args.output_dir).absolute().name


def create_repository(args: TrainingArguments) -> str:
    """Its full name, whether it was there or not."""
    # The Trainer's client, which tells the Hub what pushes.
    repository = transformers.trainer.hf_api().create_repo(
        repository_name(args), token=args.hub_token, private=args.hub_private_repo, exist_ok=True
    )
    return repository.repo_id


def upload(args: TrainingArguments, folder: Path, message: str, **choice: Any) -> None:
    transformers.trainer.hf_api().upload_folder(
        repo_id=create_repository(args),
        folder_path=str(folder),
        commit_message=message,
        token=args.hub_token,
        revision=args.hub_revision,
        **choice,
    )


def upload_state(args: TrainingArguments, checkpoint: Path) -> None:
    """A checkpoint to resume from, where hub_strategy wants one."""
    if args.hub_strategy == HubStrategy.CHECKPOINT:  # what an older one had beside it would make it a damaged one
        upload(args, checkpoint, checkpoint.name, path_in_repo="last-checkpoint", delete_patterns="*")
    elif args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
        upload(args, checkpoint, checkpoint.name, path_in_repo=checkpoint.name)


def upload_run(args: TrainingArguments) -> None:
    """The folder, and the checkpoints that belong on the Hub; of files that are there already only hashes are sent."""
    output_dir = Path(args.output_dir)
    upload(args, output_dir, "End of training", ignore_patterns=list(LEFT_OUT))
    checkpoints = [checkpoint for _, checkpoint in sorted(numbered(output_dir).items())]
    for checkpoint in checkpoints if args.hub_strategy == HubStrategy.ALL_CHECKPOINTS else checkpoints[-1:]:
        upload_state(args, checkpoint)


def status_code(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def may_pass(error: BaseException) -> bool:
    """Not what the Hub refuses, save for too many requests, and for a commit that came in between."""
    code = status_code(error)
    return code is None or code >= 500 or code in (408, 409, 412, 429)


def reason(error: BaseException, args: TrainingArguments) -> str:
    """One line without a token, whatever the Hub answered."""
    line = " ".join(str(error).split()) or type(error).__name__
    for token in filter(None, (args.hub_token, huggingface_hub.get_token())):
        line = line.replace(token, "***")
    return line


# ---- Threads ----


def in_background(work: Callable[[], None]) -> Future:
    """Do it on a thread that does not keep the process from ending, as an executor's would."""
    outcome = Future()

    def carry_out() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    Thread(target=carry_out, daemon=True).start()
    return outcome


def awaited(work: Future, deadline: float, stop: StopSignals) -> bool:
    """Whether it was done before the deadline, and before a signal."""
    wait_until(work.done, deadline, stop)
    return work.done()


def wait_until(condition: Callable[[], bool], deadline: float, stop: StopSignals) -> None:
    while not condition() and not stop.received and time.monotonic() < deadline:
        time.sleep(0.05)
