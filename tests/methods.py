"""The methods that train on pairs, by name, as their entry points start them."""

from alignment.data.splits import PAIRS
from alignment.pipeline import Method
from scripts.dpo_config import DPOConfig
from scripts.dpo_trainer import DPOTrainer
from scripts.orpo_config import ORPOConfig
from scripts.orpo_trainer import ORPOTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer

METHODS = {
    "simpo": Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS),
    "dpo": Method(config=DPOConfig, trainer=DPOTrainer, data=PAIRS),
    "orpo": Method(config=ORPOConfig, trainer=ORPOTrainer, data=PAIRS),
}
