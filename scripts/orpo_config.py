"""ORPOConfig: what an ORPO recipe says beside what all objectives over pairs share."""

from dataclasses import dataclass, field

from alignment.preference.configs import PairConfig, Reads
from alignment.report import objective as papers
from alignment.report.objective import Objective


@dataclass
class ORPOConfig(PairConfig):
    """Hyperparameters of ORPO (Hong et al. 2024, https://arxiv.org/abs/2403.07691)."""

    beta: float = field(default=0.1, metadata={"help": "Weight of the odds ratio's loss; the paper's lambda."})

    @property
    def reads(self) -> Reads:
        return Reads(("beta",), authors=(0.1, 2.0))

    @property
    def objective(self) -> Objective:
        return Objective(
            "ORPO", "Odds Ratio Preference Optimization",
            "NLL(prompt and chosen response) - beta * log sigmoid(log odds_w - log odds_l)", {"beta": self.beta},
            "the cross-entropy of prompt and chosen response, as in supervised fine-tuning, and beside it a penalty where the "
            "odds of the chosen response, p / (1 - p) of p = exp(mean log-probability per token), do not exceed those of the "
            "rejected one. No reference model is used.",
            "beta x mean log-probability per token, so they are negative", papers.ORPO, scores_prompt=True,
        )  # fmt: skip
