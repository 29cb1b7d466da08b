"""Train a language model on preference pairs with SimPO: `accelerate launch ... scripts/run_simpo.py RECIPE.yaml`."""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from alignment.data.splits import PAIRS
        from alignment.pipeline import Method, main
        from scripts.simpo_config import SimPOConfig
        from scripts.simpo_trainer import SimPOTrainer
    main(Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS))
