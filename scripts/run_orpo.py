"""Train a language model on preference pairs with ORPO: `accelerate launch ... scripts/run_orpo.py RECIPE.yaml`."""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from alignment.data.splits import PAIRS
        from alignment.pipeline import Method, main
        from scripts.orpo_config import ORPOConfig
        from scripts.orpo_trainer import ORPOTrainer
    main(Method(config=ORPOConfig, trainer=ORPOTrainer, data=PAIRS))
