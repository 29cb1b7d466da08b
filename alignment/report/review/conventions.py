"""What a review takes for much, little and enough: conventions, none of them a law, and all of them here."""

import math

LEVEL = 0.95  # of every interval
DELTA = 0.03  # change of accuracy that matters, in shares of the held-out pairs
ORDER_PER_DELTA = 2.5  # what counts as delta on the finer measure: 0.075 at the default, where a normal accuracy moves by delta
FEWEST_PROMPTS = 20  # held-out; with fewer there is no verdict
COLLAPSE_NATS = math.log(2)  # fall of the chosen mean log-probability: each chosen token half as likely
STILL_NATS = 0.1  # change of the chosen mean log-probability that is called none
REPLY_RATIO_FALL = 0.1  # of the zlib ratio of sampled replies, which then repeat themselves
FEWEST_REPLIES = 20  # prompts with a reply before and after
REPLY_BYTES = 200  # a shorter text's zlib ratio measures its length
SATURATED_BELOW = 2.0  # in deltas: closer than that to 100 % at step 0, no accuracy can rise by what matters
LEAN_RANGE = (0.2, 0.8)  # step-0 accuracy between which the finer measure is used
LENGTH_EDGES = (0.1, 0.3, 0.7)  # bins of |log(chosen / rejected tokens)|
SAME_LENGTH = 0.1  # |log(chosen / rejected tokens)| up to which two responses are called equally long
FEWEST_MATCHED = 20  # pairs on the thinner sides of all bins together
POWER_FACTOR = 7.85  # (z of 97.5 % + z of 80 %) squared: 80 % power at 95 %
TRAINING_SATURATED = 0.99  # late training accuracy of a bare log
# Of float32, which what was logged was computed in; squares and sums of anything up to it are no trouble in float64.
LARGEST = 3.4e38


def accuracy_shift(delta: float, spread: float) -> float:
    """h: the shift of d that moves the accuracy of a normal d with this standard deviation by delta at most (at its centre)."""
    return delta * math.sqrt(2 * math.pi) * spread


def described(delta: float, spread: float | None) -> list[tuple[str, str]]:
    """What a reader has to know of the thresholds: name, and value with its meaning."""
    h = "" if spread is None else f" = {accuracy_shift(delta, spread):.3g} nats per token here"
    return [
        ("intervals", f"{LEVEL:.0%}; a p-value inverts the same statistic"),
        ("delta", f"{100 * delta:g} points of accuracy, the change that matters (--delta)"),
        ("h", f"delta x sqrt(2 pi) x standard deviation of d at step 0{h}: the shift that moves accuracy by delta at most"),
        ("fewest held-out prompts", f"{FEWEST_PROMPTS}"),
        ("collapse", f"chosen log-probability per token down by more than ln 2 = {COLLAPSE_NATS:.3f} nats, or the replies' "
                     f"zlib ratio by more than {REPLY_RATIO_FALL} ({FEWEST_REPLIES} prompts at least)"),
        ("no change of the chosen", f"within {STILL_NATS} nats per token"),
        ("saturated", f"accuracy at step 0 above {1 - SATURATED_BELOW * delta:.0%}"),
        ("leaning", f"step-0 accuracy from {LEAN_RANGE[0]:.0%} to {LEAN_RANGE[1]:.0%}; {ORDER_PER_DELTA * delta:.3g} standard "
                    "deviations of d in place of delta"),
        ("length-matched", f"bins at |log length ratio| = {', '.join(map(str, LENGTH_EDGES))}; at least {FEWEST_MATCHED} pairs "
                           "on the thinner sides"),
    ]  # fmt: skip
