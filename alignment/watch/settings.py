"""Settings of preference tuning that SimPO's authors found to go wrong, or never used: for a dry run and for a run's start."""

from ..preference.configs import PairConfig

PAIRS_PER_STEP = 128  # the authors', in every run
FEWEST_PAIRS = 32  # a step
# At 1e-5, they say, whole models fall into repetition; they train at 3e-7 to 1e-6. ORPO, whose cross-entropy holds a model, at
# 8e-6, as its own authors do.
HIGH_RATE, HIGH_RATE_OF_ORPO = 5e-6, 1e-5


def settings_at_risk(args: PairConfig, *, is_whole: bool, rows_per_step: int) -> dict[str, str]:
    """What is outside of what the authors found to work: key -> a line with the way out.

    is_whole: no adapter is trained, which bears a higher rate. rows_per_step: pairs, over all processes.
    """
    found, rate = {}, args.learning_rate
    if is_whole and rate >= (HIGH_RATE_OF_ORPO if args.objective.scores_prompt else HIGH_RATE):
        found["learning_rate"] = f"learning_rate = {rate:g}: whole models fall into repetition towards 1e-5; try 3e-7 to 1e-6"
    if (ratio := getattr(args, "gamma_beta_ratio", None)) is not None and ratio > 1:
        found["gamma_beta_ratio"] = f"gamma_beta_ratio = {ratio:g}: the authors stay between 0 and 1"
    if rows_per_step < FEWEST_PAIRS:
        found["pairs_per_step"] = other_batch(rows_per_step)
    return found


def other_batch(rows_per_step: int) -> str:
    return (
        f"{rows_per_step} pairs a step: published settings belong to {PAIRS_PER_STEP}; "
        f"--total_train_batch_size={PAIRS_PER_STEP} makes it so on any number of processes"
    )
