"""Train a language model on preference pairs with SimPO: `accelerate launch ... scripts/run_simpo.py RECIPE.yaml`."""

from alignment.data.splits import PAIRS
from alignment.pipeline import Method, main
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer

if __name__ == "__main__":
    main(Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS))
