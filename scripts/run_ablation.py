"""Run a matrix of recipes, compare what they became and decide: `python scripts/run_ablation.py MATRIX.yaml`."""

from pathlib import Path

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from alignment.ablation.experiment import main
        from alignment.data.splits import CONVERSATIONS, PAIRS
        from alignment.pipeline import Method
        from scripts.dpo_config import DPOConfig
        from scripts.dpo_trainer import DPOTrainer
        from scripts.orpo_config import ORPOConfig
        from scripts.orpo_trainer import ORPOTrainer
        from scripts.sft_config import SFTConfig
        from scripts.sft_trainer import SFTTrainer
        from scripts.simpo_config import SimPOConfig
        from scripts.simpo_trainer import SimPOTrainer
    methods = {
        "simpo": Method(SimPOConfig, SimPOTrainer, PAIRS),
        "dpo": Method(DPOConfig, DPOTrainer, PAIRS),
        "orpo": Method(ORPOConfig, ORPOTrainer, PAIRS),
        "sft": Method(SFTConfig, SFTTrainer, CONVERSATIONS),
    }
    main(methods, entry_points=Path(__file__).resolve().parent)
