"""DPOTrainer: DPO and its kin on SimPO's own path, so that two runs differ in one function."""

from typing import Any

from alignment.errors import UserError
from alignment.preference.losses import dpo_loss
from alignment.preference.scores import PairLosses, PairScores
from alignment.preference.trainer import PairTrainer

from .dpo_config import REFERENCE, DPOConfig


class DPOTrainer(PairTrainer):
    """Trains with DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), or its kin by loss_type; see PairTrainer.

    The reward of a response is beta times its log-ratio to the reference: the policy itself, before its first step.
    """

    args: DPOConfig

    def __init__(self, *args: Any, ref_model: Any = None, **kwargs: Any):
        if ref_model is not None:
            raise UserError(f"ref_model: {REFERENCE}")
        super().__init__(*args, **kwargs)

    def pair_losses(self, scores: PairScores) -> PairLosses:
        args = self.args
        chosen, rejected = scores.logps(per_token=args.per_token)
        reference_chosen, reference_rejected = scores.reference_logps(per_token=args.per_token)
        losses = dpo_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            beta=args.beta,
            loss_type=args.loss_type,
            label_smoothing=args.label_smoothing,
        )
        rewards = (args.beta * (chosen - reference_chosen).detach(), args.beta * (rejected - reference_rejected).detach())
        return PairLosses(losses, *rewards)
