"""SimPOConfig: what a SimPO recipe says beside what all objectives over pairs share."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from alignment.errors import Problem
from alignment.preference.configs import PairConfig, Reads
from alignment.report import objective as papers
from alignment.report.objective import Objective

BETAS = (2.0, 10.0)  # the authors'
READS = {
    "sigmoid": Reads(("beta", "gamma_beta_ratio", "label_smoothing"), authors=BETAS),
    "hinge": Reads(("beta", "gamma_beta_ratio", "label_smoothing"), authors=BETAS),
    "alphapo": Reads(("beta", "gamma_beta_ratio", "label_smoothing", "alpha"), authors=BETAS),
    "simper": Reads(()),
}


@dataclass
class SimPOConfig(PairConfig):
    """Hyperparameters of SimPO (Meng et al. 2024, https://arxiv.org/abs/2405.14734) and its reference-free kin."""

    own_keys: ClassVar = ("beta", "gamma_beta_ratio", "label_smoothing", "alpha")
    loss_types: ClassVar = tuple(READS)

    beta: float = field(default=2.0, metadata={"help": "Scale of the reward, beta x mean log-probability."})
    gamma_beta_ratio: float = field(
        default=0.25, metadata={"help": "Target margin over beta: gamma = gamma_beta_ratio x beta."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of pairs assumed to be labelled the wrong way round (not by hinge)."}
    )
    loss_type: Literal["sigmoid", "hinge", "alphapo", "simper"] = field(
        default="sigmoid",
        metadata={"help": "sigmoid (the paper's), hinge, or a reference-free kin: alphapo (Gupta 2025), simper (Xiao 2025)."},
    )
    alpha: float = field(
        default=0.25, metadata={"help": "alphapo: shape of the reward, (1 - exp(-alpha x)) / alpha of x; 0 is SimPO's, x."}
    )

    @property
    def reads(self) -> Reads:
        return READS[self.loss_type]

    @property
    def objective(self) -> Objective:
        margin = "beta * (reward_w - reward_l - gamma_beta_ratio)"
        loss = f"relu(1 - {margin})" if self.loss_type == "hinge" else f"-log sigmoid({margin})"
        smoothed = self.loss_type != "hinge" and self.label_smoothing > 0
        parameters = {"beta": self.beta, "gamma_beta_ratio": self.gamma_beta_ratio}
        parameters |= {"label_smoothing": self.label_smoothing} if smoothed else {}
        if self.loss_type == "simper":
            return Objective(
                "SimPER", "Simple alignment with Perplexity optimization", "exp(mean logp_l) - exp(mean logp_w)", {},
                "the inverse perplexity of the chosen response is raised and that of the rejected one lowered. No reference "
                "model is used, and nothing is there to be tuned.",
                "exp(mean log-probability per token), inverse perplexities between 0 and 1", papers.SIMPER,
            )  # fmt: skip
        if self.loss_type == "alphapo":
            return Objective(
                "AlphaPO", "SimPO with a reward of another shape", loss, {**parameters, "alpha": self.alpha},
                "the reward of a response is beta times (1 - p^-alpha) / alpha of p, the exponential of its mean "
                "log-probability per token; no reference model is used, and the chosen response must beat the rejected one by "
                "a margin gamma.",
                "beta x (1 - exp(-alpha x)) / alpha of x, the mean log-probability per token, so they are negative",
                papers.ALPHAPO,
            )  # fmt: skip
        return Objective(
            "SimPO", "Simple Preference Optimization", loss.replace("reward", "mean logp"), parameters,
            "the reward of a response is beta times its mean log-probability per token, no reference model is used, and the "
            "chosen response must beat the rejected one by a margin gamma.",
            "beta x mean log-probability per token, so they are negative", papers.SIMPO,
        )  # fmt: skip

    def remarks(self) -> list[Problem]:
        if self.loss_type == "hinge" and self.label_smoothing > 0:
            ignored = Problem("label_smoothing", self.label_smoothing, "ignored by the hinge loss, as in the published code")
            return [*super().remarks(), ignored]
        return super().remarks()
