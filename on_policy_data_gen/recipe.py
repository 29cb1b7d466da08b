"""All stages of one recipe, one after the other, each going on from where it is."""

from pathlib import Path

from .annotation import annotate
from .configs import OnPolicyArguments, PairArguments, PolicyArguments, PromptArguments, RewardArguments
from .joining import JOINED, post_process
from .responses import decode
from .reward_models import reward_config

KINDS = (PromptArguments, PolicyArguments, RewardArguments, PairArguments, OnPolicyArguments)


def run_recipe(
    prompts: PromptArguments,
    policy: PolicyArguments,
    rewards: RewardArguments,
    pairs: PairArguments,
    own: OnPolicyArguments,
) -> None:
    """Prompts -> output_SEED.json -> all_outputs.json -> _rm.json, _bin.json and the data set in output_dir/pairs."""
    reward_config(rewards)  # no days of sampling for a reward model that is not there
    output = Path(own.output_dir)
    decode(prompts, policy, own.seeds, output)
    post_process(output)
    annotate(rewards, pairs, output / f"{JOINED}.json", output)
