"""Settings that are allowed, and known to go wrong: a line for each that this run has, with the way out."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..preference.configs import PairConfig
from ..recipe.configs import ModelArguments, RunArguments
from ..recipe.values import text
from ..watch.settings import FEWEST_PAIRS, PAIRS_PER_STEP, other_batch, settings_at_risk
from .disk import Disk
from .lengths import PairFacts
from .model import Skeleton
from .steps import Schedule

SPACING = 1.2e-4  # of bfloat16 numbers near 0.02, a usual weight; a step below half of it rounds to nothing
MANY_CUT = 0.1  # of all pairs
LOPSIDED = 0.65  # share of pairs in which the same side is the longer


def setting_warnings(
    args: RunArguments, model_args: ModelArguments, skeleton: Skeleton, schedule: Schedule, meant: Mapping[str, Any]
) -> Iterator[str]:
    """Of the recipe alone."""
    is_whole, rate = not model_args.use_peft, args.learning_rate
    if isinstance(args, PairConfig):
        yield from settings_at_risk(args, is_whole=is_whole, rows_per_step=schedule.rows_per_step).values()
        if schedule.rows_per_step >= FEWEST_PAIRS and schedule.rows_per_step != PAIRS_PER_STEP:
            yield other_batch(schedule.rows_per_step)
    if is_whole and skeleton.dtype.itemsize == 2 and rate < SPACING / 2:
        name = str(skeleton.dtype).removeprefix("torch.")
        yield (
            f"torch_dtype = {name}: an AdamW step of {rate:g} rounds to nothing in such parameters; torch_dtype: null trains "
            "float32 ones under bf16: true"
        )
    if not meant["use_cpu"] and not (args.bf16 or args.fp16) and skeleton.dtype.itemsize == 4:
        yield "neither bf16 nor fp16: a GPU computes float32 several times slower; add bf16: true"
    if not args.gradient_checkpointing and skeleton.parameters > 10**9:
        yield "gradient_checkpointing is off: every layer's activations stay in memory; add gradient_checkpointing: true"
    yield from schedule_warnings(args, schedule)


def schedule_warnings(args: RunArguments, schedule: Schedule) -> Iterator[str]:
    steps, strategy = schedule.steps, text(args.eval_strategy)
    if args.warmup_steps >= steps:
        yield f"warmup_steps = {args.warmup_steps:g}: the run has {steps} steps, so that it never leaves the warm-up"
    if strategy == "steps" and args.eval_steps and args.eval_steps > steps:
        yield f"eval_steps = {args.eval_steps:g}: the run has {steps} steps, so that it is evaluated at its end alone"
    if args.logging_steps > steps:
        yield f"logging_steps = {args.logging_steps:g}: the run has {steps} steps, so that none is logged on the way"
    if schedule.checkpoints <= 1 and steps > 1:
        yield "nothing is saved before the end: what stops the run costs all of it; --save_steps=0.25 saves four times"


def data_warnings(train: PairFacts, shared: int | None) -> Iterator[str]:
    """Of the pairs that are left."""
    if train.identical:
        yield f"{train.identical:,} training pairs prefer nothing: both responses are the same tokens"
    if train.truncated > MANY_CUT * train.pairs:
        yield f"{train.truncated / train.pairs:.0%} of the training pairs are cut; raise max_length, or leave out the longest"
    if shared:
        yield f"{shared:,} held-out pairs have a prompt that is trained on: their figures will look too good"
    for side, share in (("chosen", train.chosen_longer), ("rejected", train.rejected_longer)):
        if share > LOPSIDED:
            yield (
                f"the {side} response is the longer one in {share:.0%} of the training pairs: look at the lengths of what the "
                "model writes; length alone tells the two apart"
            )


def disk_warnings(disk: Disk) -> Iterator[str]:
    if disk.most > disk.free:
        yield (
            f"output_dir has {disk.free / 1e9:.0f} GB free on this machine and the run writes up to {disk.most / 1e9:.0f} GB; "
            "lower save_total_limit, or choose another disk"
        )
