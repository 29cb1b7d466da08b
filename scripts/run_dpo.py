"""Train a language model on preference pairs with DPO: `accelerate launch ... scripts/run_dpo.py RECIPE.yaml`."""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from alignment.data.splits import PAIRS
        from alignment.pipeline import Method, main
        from scripts.dpo_config import DPOConfig
        from scripts.dpo_trainer import DPOTrainer
    main(Method(config=DPOConfig, trainer=DPOTrainer, data=PAIRS))
