"""Train a language model on preference pairs with DPO: `accelerate launch ... scripts/run_dpo.py RECIPE.yaml`."""

from alignment.data.splits import PAIRS
from alignment.pipeline import Method, main
from scripts.dpo_config import DPOConfig
from scripts.dpo_trainer import DPOTrainer

if __name__ == "__main__":
    main(Method(config=DPOConfig, trainer=DPOTrainer, data=PAIRS))
