"""ORPOTrainer: ORPO on SimPO's own path, so that two runs differ in one function."""

import torch.nn.functional as F

from alignment.preference.losses import log_odds_ratio, orpo_loss
from alignment.preference.scores import PairLosses, PairScores
from alignment.preference.trainer import PairTrainer

from .orpo_config import ORPOConfig


class ORPOTrainer(PairTrainer):
    """Trains with ORPO (Hong et al. 2024, https://arxiv.org/abs/2403.07691); see PairTrainer.

    Its cross-entropy runs over prompt and response of the chosen row, as its authors' code and TRL's have it.
    """

    args: ORPOConfig

    def pair_losses(self, scores: PairScores) -> PairLosses:
        beta, chosen, rejected = self.args.beta, scores.chosen_mean_logp, scores.rejected_mean_logp
        log_odds = log_odds_ratio(chosen, rejected).detach()
        return PairLosses(
            orpo_loss(chosen, rejected, beta=beta),
            beta * chosen.detach(),
            beta * rejected.detach(),
            {"log_odds_ratio": F.logsigmoid(log_odds), "log_odds_chosen": log_odds},
        )
