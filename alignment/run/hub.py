"""Pushing to the Hub, which may be down, slow or closed to this token: it never costs a run anything that was trained."""

import glob
import logging
import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import transformers.trainer
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..errors import TrainingStopped, UserError
from .checkpoints import numbered
from .signals import RunInterrupted, StopSignals

logger = logging.getLogger(__name__)

ANSWER_S = 30.0  # how long a start waits for the Hub
PAUSES_S = (2.0, 8.0, 32.0, 128.0)  # between the attempts of the last push
GRACE_S = 20.0  # for the end of a process that leaves a request behind
THREAD = "push"
RUNS_WAYS_OUT = "HF_TOKEN or --hub_token), another --hub_model_id, or --push_to_hub=false"
LEFT_OUT = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", "training_args.bin")  # of a run's folder; "*" also stands for slashes
# What makes a model out of a checkpoint's files.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "*token*", "*.jinja", "*.model", "vocab.*", "merges.txt",
)  # fmt: skip


class Destination(Protocol):
    """Where a folder is sent, in the words of TrainingArguments; hub_token None: what `hf auth login` or HF_TOKEN gave."""

    output_dir: str | None
    hub_model_id: str | None
    hub_token: str | None
    hub_private_repo: bool | None
    hub_revision: str | None
    hub_minutes: float


def check_hub(args: TrainingArguments) -> None:
    """`refuse_closed_hub` before a run; one that does not answer now is asked again later."""
    if (why := refuse_closed_hub(args, "push_to_hub = True", RUNS_WAYS_OUT)) is not None:
        logger.warning(
            "The Hub could not be asked for %s: %s. Training goes on, and the push at the end asks again.",
            repository_name(args), why,
        )  # fmt: skip


def refuse_closed_hub(args: Destination, place: str, ways_out: str) -> str | None:
    """Ask for the repository, which is made if there is none. Returns why it could not be asked, if so.

    place: the setting that asks for it. ways_out: where else a token may come from, and what else can be done.

    Raises UserError if its name is none, or if the Hub says that this token may not write there.
    """

    def ask() -> None:
        huggingface_hub.auth_check(create_repository(args), write=True, token=args.hub_token)

    asked = in_background(ask)
    wait([asked], timeout=ANSWER_S)
    error = asked.exception() if asked.done() else TimeoutError(f"no answer in {ANSWER_S:g} seconds")
    if isinstance(error, HFValidationError):
        raise UserError(f"hub_model_id = {repository_name(args)!r}: {error}")
    if status_code(error) in (401, 403):
        raise UserError(
            f"{place}: the Hub does not let this token write to {repository_name(args)!r} "
            f"({reason(error, args)}). Give one that may (`hf auth login`, {ways_out}"
        )
    return None if error is None else reason(error, args)


def push_checkpoint(args: TrainingArguments, checkpoint: Path, before: Future | None) -> Future:
    """Start sending a whole checkpoint, as hub_strategy says, once the push `before` is over. A failure is only logged."""

    def send() -> None:
        if before is not None:
            wait([before])
        upload(args, checkpoint, f"Training in progress, {checkpoint.name}", allow_patterns=list(MODEL_FILES))
        upload_state(args, checkpoint)

    def tell(push: Future) -> None:
        if error := push.exception():
            logger.warning(
                "%s was not pushed to the Hub: %s. Training goes on, and the push at the end sends what is missing.",
                checkpoint.name,
                reason(error, args),
            )

    push = in_background(send)
    push.add_done_callback(tell)
    return push


def push_run(args: Destination, stop: StopSignals, before: Future | None = None, only: Sequence[str] | None = None) -> None:
    """Send a finished run's folder, again after a pause where that may help, for hub_minutes in all.

    before: a push that is still on its way, and that must not overwrite this one later. only: files of the folder, by their
    paths in it; None: all that a run leaves but LEFT_OUT, and checkpoints as hub_strategy says.
    Raises TrainingStopped if it stays without success, RunInterrupted if a signal comes first.
    """
    deadline = time.monotonic() + 60 * args.hub_minutes
    why = too_long = f"it took longer than hub_minutes = {args.hub_minutes:g}"
    is_free = before is None or awaited(before, deadline, stop)
    for pause in (0.0, *PAUSES_S) if is_free else ():
        if not paused(pause, deadline, stop):
            break
        attempt = in_background(lambda: upload_run(args) if only is None else upload_files(args, only))
        if not awaited(attempt, deadline, stop):
            why = too_long
            break
        error = attempt.exception()
        if error is None:
            logger.info("Pushed to the Hub: %s.", repository_name(args))
            return
        why = reason(error, args)
        logger.warning("Not pushed to the Hub: %s.", why)
        if not may_pass(error):
            break
    saved = f"this run is finished, and all of it is saved in {args.output_dir}"
    again = f"The same command does only that; or\n{hf_upload(args, only)}"
    if stop.received:
        raise RunInterrupted(f"stopped by {stop.received.name}: {saved}, but not pushed to the Hub. {again}")
    raise TrainingStopped(f"{saved}, but it could not be pushed to the Hub: {why}. {again}")


def hf_upload(args: Destination, only: Sequence[str] | None = None) -> str:
    """The shell command that does what push_run does, token and checkpoints aside."""
    chosen = [f"--include={glob.escape(path)}" for path in only or ()]
    options = chosen or [f"--exclude={pattern}" for pattern in LEFT_OUT]
    options += [f"--revision={args.hub_revision}"] if args.hub_revision else []
    options += ["--private"] if args.hub_private_repo else []
    return shlex.join(["hf", "upload", repository_name(args), args.output_dir, ".", *options])


# ---- Requests ----


def repository_name(args: Destination) -> str:
    return args.hub_model_id or Path(args.output_dir).absolute().name


def create_repository(args: Destination) -> str:
    """Its full name, whether it was there or not; and the branch that hub_revision names."""
    client = transformers.trainer.hf_api()  # the Trainer's, which tells the Hub what pushes
    name = client.create_repo(repository_name(args), token=args.hub_token, private=args.hub_private_repo, exist_ok=True).repo_id
    if args.hub_revision is not None:
        client.create_branch(name, branch=args.hub_revision, token=args.hub_token, exist_ok=True)
    return name


def upload(args: Destination, folder: Path, message: str, **choice: Any) -> None:
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


def upload_files(args: Destination, paths: Sequence[str]) -> None:
    """These files of the folder, and no others."""
    upload(args, Path(args.output_dir), "Model, tokenizer and card", allow_patterns=[glob.escape(path) for path in paths])


def status_code(error: BaseException | None) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def may_pass(error: BaseException) -> bool:
    """Whether the next attempt may do better: not after what was refused, save for its moment."""
    code = status_code(error)
    if code is None:
        return not isinstance(error, ValueError | OfflineModeIsEnabled)
    return code >= 500 or code in (408, 409, 412, 429)  # the last but one: somebody else's commit came in between


def reason(error: BaseException, args: Destination) -> str:
    """One line without a token, whatever the Hub answered."""
    line = " ".join(str(error).split()) or type(error).__name__
    for token in filter(None, (args.hub_token, huggingface_hub.get_token())):
        line = line.replace(token, "***")
    return line


# ---- Threads ----


def in_background(work: Callable[[], None]) -> Future:
    """Do it on a thread of its own. A pool's, because it does not keep the process from ending as an executor's would."""
    outcome = Future()
    pool = ThreadPool(1, initializer=lambda: setattr(threading.current_thread(), "name", THREAD))
    pool.apply_async(work, callback=outcome.set_result, error_callback=outcome.set_exception)
    pool.close()
    return outcome


def awaited(work: Future, deadline: float, stop: StopSignals) -> bool:
    """Whether it was done before the deadline, and before a signal."""
    while not work.done() and not stop.received and time.monotonic() < deadline:
        wait([work], timeout=0.1)
    return work.done()


def paused(seconds: float, deadline: float, stop: StopSignals) -> bool:
    """Whether that left time before the deadline, and no signal came."""
    end = time.monotonic() + seconds
    while not stop.received and time.monotonic() < end < deadline:
        time.sleep(0.1)
    return not stop.received and end < deadline


def bounded(status: int) -> int:
    """The status, to exit with. Done the hard way where a request without an answer keeps the interpreter from ending."""
    if any(thread.name == THREAD for thread in threading.enumerate()):
        last_resort = threading.Timer(GRACE_S, os._exit, [status])
        last_resort.daemon = True
        last_resort.start()
    return status
