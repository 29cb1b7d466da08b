"""Tune a language model on conversations, the stage before SimPO: `accelerate launch ... scripts/run_sft.py RECIPE.yaml`."""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from alignment.data.splits import CONVERSATIONS
        from alignment.pipeline import Method, main
        from scripts.sft_config import SFTConfig
        from scripts.sft_trainer import SFTTrainer
    main(Method(config=SFTConfig, trainer=SFTTrainer, data=CONVERSATIONS))
