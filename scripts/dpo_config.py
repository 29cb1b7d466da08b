"""DPOConfig: what a DPO recipe says beside what all objectives over pairs share, in the handbook's keys and in TRL's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from alignment.preference.configs import PairConfig, Reads
from alignment.recipe.values import Mismatch, read_as
from alignment.report import objective as papers
from alignment.report.objective import Objective

READS = {
    "sigmoid": Reads(("beta", "label_smoothing", "length_normalized"), 0.1, (0.01, 0.5)),
    "hinge": Reads(("beta", "length_normalized"), 0.1, (0.01, 0.5)),
    "ipo": Reads(("beta",), 0.1, (0.01, 1.0)),
    "robust": Reads(("beta", "label_smoothing", "length_normalized"), 0.1, (0.01, 0.5)),
}
NORMALIZED = {"beta": 5.0, "authors": (2.0, 10.0)}
FORMULAS = {
    "sigmoid": "-log sigmoid(beta * (ratio_w - ratio_l))",
    "hinge": "relu(1 - beta * (ratio_w - ratio_l))",
    "ipo": "(ratio_w - ratio_l - 1 / (2 beta))^2",
    "robust": "((s - 1) log sigmoid(beta d) + s log sigmoid(-beta d)) / (1 - 2 s), d = ratio_w - ratio_l, s = label_smoothing",
}
NAMES = {
    "sigmoid": ("DPO", "Direct Preference Optimization", papers.DPO),
    "hinge": ("DPO-hinge", "Direct Preference Optimization with SLiC's hinge", papers.SLIC),
    "ipo": ("IPO", "Identity Preference Optimization", papers.IPO),
    "robust": ("Robust-DPO", "Direct Preference Optimization for noisy labels", papers.ROBUST_DPO),
}
ELSEWHERE = "it is of TRL's DPOTrainer"
REFERENCE = "the reference is the policy itself at step 0, scored once; another model, or one that moves, is not supported"


@dataclass
class DPOConfig(PairConfig):
    """Hyperparameters of DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) and of its kin by loss_type."""

    own_keys: ClassVar = ("label_smoothing", "length_normalized")
    loss_types: ClassVar = tuple(READS)
    refused_keys: ClassVar = {
        **dict.fromkeys(
            ("ref_model", "ref_model_init_kwargs", "model_adapter_name", "ref_adapter_name", "sync_ref_model",
             "ref_model_mixup_alpha", "ref_model_sync_steps", "force_use_ref_model", "reference_free"), REFERENCE,
        ),
        **dict.fromkeys(
            ("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting", "discopop_tau", "padding_free",
             "pad_token", "pad_to_multiple_of", "precompute_ref_batch_size", "activation_offloading", "use_liger_kernel_loss"),
            ELSEWHERE,
        ),
    }  # fmt: skip
    # What `rewrite` reads, for the schema: type and meaning.
    rewritten_keys: ClassVar = {
        "loss_type": (str | list[str], "[X, sft] with loss_weights, as TRL spells it, adds sft_weight."),
        "loss_weights": (list[float] | None, "TRL's: 1 for the loss, and the weight of sft."),
        "rpo_alpha": (float | None, "trl 0.9's name of sft_weight."),
        "precompute_ref_log_probs": (bool, "Ignored: here they always are."),
    }

    beta: float | None = field(
        default=None,
        metadata={
            "help": "Scale of the reward, beta x log-ratio to the reference; IPO's tau. null: 0.1, or 5 if length_normalized."
        },
    )
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = field(
        default="sigmoid", metadata={"help": "sigmoid (the paper's), hinge (SLiC), ipo (on means per token), or robust."}
    )
    length_normalized: bool = field(
        default=False, metadata={"help": "Log-ratios per token, as Tulu 3 has them; beta 2 to 5 then. Not of ipo, which is so."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "sigmoid, robust: share of pairs assumed to be labelled the wrong way round."}
    )

    @property
    def reads(self) -> Reads:
        reads = READS[self.loss_type]
        return reads._replace(**NORMALIZED) if self.length_normalized and "length_normalized" in reads.keys else reads

    @property
    def per_token(self) -> bool:
        return self.length_normalized or self.loss_type == "ipo"

    @property
    def objective(self) -> Objective:
        name, title, paper = NAMES[self.loss_type]
        if self.length_normalized:
            name, title = f"Length-normalized {name}", f"{title}, per token"
            paper = papers.TULU_3 if self.loss_type == "sigmoid" else paper
        parameters = {"beta": self.beta}
        parameters |= {"label_smoothing": self.label_smoothing} if "label_smoothing" in self.reads.keys else {}
        ratio = "mean log-ratio per token" if self.per_token else "log-ratio"
        formula = FORMULAS[self.loss_type].replace("ratio", "mean ratio" if self.per_token else "ratio")
        return Objective(
            name, title, formula, parameters,
            f"the reward of a response is beta times its {ratio}: how much likelier it is to the policy than to the reference, "
            "which is the policy itself before its first step; the chosen response's is raised over the rejected one's.",
            f"beta x {ratio} to the reference, so they begin at 0", paper, has_reference=True, per_token=self.per_token,
        )  # fmt: skip

    @staticmethod
    def rewrite(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """TRL 1.16's and trl 0.9's spellings as ours, and a line about each. Raises Mismatch where they cannot be read so."""
        given, notices = dict(given), []
        if "loss_type" in given or "loss_weights" in given:
            given |= read_losses(given.get("loss_type", "sigmoid"), given.pop("loss_weights", None), notices)
        if "rpo_alpha" in given:
            alpha = read_as(float | None, given.pop("rpo_alpha")) or 0.0
            if "sft_weight" in given:
                raise Mismatch("rpo_alpha or sft_weight, its other spelling; keep one of them")
            given["sft_weight"] = alpha
            notices.append(
                f"rpo_alpha is read as sft_weight = {alpha}: the DPO loss + that x the cross-entropy of the chosen "
                "responses; trl 0.9 weighed the DPO loss by it instead"
            )
        if "precompute_ref_log_probs" in given:
            read_as(bool, given.pop("precompute_ref_log_probs"))
            notices.append("precompute_ref_log_probs is ignored: here they always are")
        return given, notices


def read_losses(loss_type: Any, weights: Any, notices: list[str]) -> dict[str, Any]:
    """`loss_type: X`, `[X]`, or `[X, sft]` with `loss_weights: [1, w]`, where X may be sigmoid_norm."""
    is_list = isinstance(loss_type, list) or "," in str(loss_type) or str(loss_type).startswith("[")
    names: Sequence[str] = read_as(list[str], loss_type) if is_list else [loss_type]
    shares = [1.0] * len(names) if weights is None else read_as(list[float], weights)
    if len(shares) != len(names) or shares[:1] != [1.0] or names[1:] not in ([], ["sft"]):
        raise Mismatch(f"loss_type [X] or [X, sft] with loss_weights [1, w], not {list(names)} with {shares}")
    read = {"loss_type": names[0]} | ({"sft_weight": shares[1]} if len(names) > 1 else {})
    if names[0] == "sigmoid_norm":
        read |= {"loss_type": "sigmoid", "length_normalized": True}
    if is_list or names[0] == "sigmoid_norm":
        notices.append("loss_type is read as " + ", ".join(f"{key} = {value}" for key, value in read.items()))
    return read
