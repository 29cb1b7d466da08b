"""Score a recipe's held-out pairs by any model or adapter: `python scripts/score_pairs.py MODEL RECIPE.yaml [--key=value ...]`.

Leaves eval_pairs.jsonl, as a run's own evaluation does, which scripts/review_run.py reads and compares.
"""

import argparse
from pathlib import Path

from alignment.launch.opening import opening

METHODS = ("simpo", "dpo", "orpo")


def parser() -> argparse.ArgumentParser:
    given = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        usage="%(prog)s MODEL RECIPE.yaml [--before MODEL] [--output FOLDER] [--method METHOD] [--key=value ...]",
        epilog="Other options replace keys of the recipe, as in --use_cpu or --per_device_eval_batch_size=4.",
        allow_abbrev=False,
    )
    given.add_argument("model", metavar="MODEL", help="folder or Hub name of a model, an adapter or a checkpoint")
    given.add_argument("recipe", metavar="RECIPE.yaml", type=Path, help="whose held-out pairs, lengths and rewards are meant")
    given.add_argument("--before", metavar="MODEL", help="what MODEL was before training: scored as step 0")
    given.add_argument("--output", metavar="FOLDER", type=Path, help="where records go (default: scored/NAME_OF_MODEL)")
    given.add_argument("--method", choices=METHODS, help="whose rewards (default: as the recipe says, else simpo)")
    return given


if __name__ == "__main__":
    args, options = parser().parse_known_args()
    with opening():
        from alignment.afterwards.command import command
        from alignment.afterwards.scoring import score_pairs
        from alignment.data.splits import PAIRS
        from alignment.pipeline import Method
        from scripts.dpo_config import DPOConfig
        from scripts.dpo_trainer import DPOTrainer
        from scripts.orpo_config import ORPOConfig
        from scripts.orpo_trainer import ORPOTrainer
        from scripts.simpo_config import SimPOConfig
        from scripts.simpo_trainer import SimPOTrainer
    methods = {
        "simpo": Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS),
        "dpo": Method(config=DPOConfig, trainer=DPOTrainer, data=PAIRS),
        "orpo": Method(config=ORPOConfig, trainer=ORPOTrainer, data=PAIRS),
    }
    with command("Nothing was written; the same command begins again."):
        wanted = {key: value for key, value in vars(args).items() if key not in ("model", "recipe")}
        score_pairs(methods, args.model, args.recipe, options, **wanted)
