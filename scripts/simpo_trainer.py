"""SimPOTrainer: the paper on a page. All else, from rows to steps to records, is PairTrainer's."""

from torch import Tensor

from alignment.preference.losses import alphapo_reward, simper_loss, simpo_loss
from alignment.preference.scores import PairLosses, PairScores
from alignment.preference.trainer import PairTrainer

from .simpo_config import SimPOConfig


class SimPOTrainer(PairTrainer):
    """Trains with SimPO (Meng et al. 2024, https://arxiv.org/abs/2405.14734), or its kin by loss_type; see PairTrainer.

    The reward of a response is beta times its mean log-probability per token, so that length earns nothing and no
    reference model is needed; the chosen one must beat the rejected one by a margin gamma = gamma_beta_ratio x beta.
    """

    args: SimPOConfig

    def pair_losses(self, scores: PairScores) -> PairLosses:
        return PairLosses(*self.simpo_loss(scores.chosen_mean_logp, scores.rejected_mean_logp))

    def simpo_loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, chosen rewards and rejected rewards, each (B,), of (B,) mean log-probabilities; see preference.losses."""
        args, chosen, rejected = self.args, policy_chosen_logps, policy_rejected_logps
        if args.loss_type == "simper":
            return simper_loss(chosen, rejected), chosen.detach().exp(), rejected.detach().exp()
        if args.loss_type == "alphapo":
            chosen, rejected = (alphapo_reward(logps, alpha=args.alpha) for logps in (chosen, rejected))
        losses = simpo_loss(
            chosen,
            rejected,
            beta=args.beta,
            gamma_beta_ratio=args.gamma_beta_ratio,
            loss_type="hinge" if args.loss_type == "hinge" else "sigmoid",
            label_smoothing=args.label_smoothing,
        )
        return losses, args.beta * chosen.detach(), args.beta * rejected.detach()
