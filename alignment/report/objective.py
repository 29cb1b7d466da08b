"""What a run optimizes, in words and numbers: for its first lines, its card, its curves and its environment.json."""

from typing import Any, NamedTuple


class Paper(NamedTuple):
    """Where an objective comes from."""

    url: str
    bibtex: str


class Objective(NamedTuple):
    """One loss over preference pairs, and what it asks of the trainer."""

    name: str
    title: str  # what the name stands for
    formula: str  # of one pair; w is its chosen response, l its rejected one
    parameters: dict[str, Any]  # the formula's
    paragraph: str = ""  # for the card
    reward: str | None = None  # what rewards/* are
    paper: Paper | None = None
    has_reference: bool = False
    per_token: bool = True  # logps/* are means over a response's tokens, or sums
    scores_prompt: bool = False  # the chosen row's prompt is predicted too

    def __str__(self) -> str:
        parameters = "".join(f", {key} = {value}" for key, value in self.parameters.items())
        reference = "the policy at step 0" if self.has_reference else "none"
        rewards = f"; rewards: {self.reward}" if self.reward else ""
        return f"{self.name}, loss = {self.formula}{parameters}; reference: {reference}{rewards}"

    @property
    def tag(self) -> str:
        return self.name.lower().replace(" ", "-")

    def record(self) -> dict[str, Any]:
        """For environment.json."""
        reference = "the policy at step 0" if self.has_reference else None
        return {"name": self.name, "loss": self.formula, **self.parameters, "reference": reference, "rewards": self.reward}


SIMPO = Paper(
    "https://arxiv.org/abs/2405.14734",
    """\
@inproceedings{meng2024simpo,
  title     = {SimPO: Simple Preference Optimization with a Reference-Free Reward},
  author    = {Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}""",
)
ALPHAPO = Paper(
    "https://arxiv.org/abs/2501.03884",
    """\
@article{gupta2025alphapo,
  title   = {AlphaPO: Reward Shape Matters for LLM Alignment},
  author  = {Gupta, Aman and others},
  journal = {arXiv preprint arXiv:2501.03884},
  year    = {2025}
}""",
)
SIMPER = Paper(
    "https://arxiv.org/abs/2502.00883",
    """\
@article{xiao2025simper,
  title   = {SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters},
  author  = {Xiao, Teng and others},
  journal = {arXiv preprint arXiv:2502.00883},
  year    = {2025}
}""",
)
DPO = Paper(
    "https://arxiv.org/abs/2305.18290",
    """\
@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano
               and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}""",
)
SLIC = Paper(
    "https://arxiv.org/abs/2305.10425",
    """\
@article{zhao2023slic,
  title   = {SLiC-HF: Sequence Likelihood Calibration with Human Feedback},
  author  = {Zhao, Yao and others},
  journal = {arXiv preprint arXiv:2305.10425},
  year    = {2023}
}""",
)
IPO = Paper(
    "https://arxiv.org/abs/2310.12036",
    """\
@inproceedings{azar2024general,
  title     = {A General Theoretical Paradigm to Understand Learning from Human Preferences},
  author    = {Azar, Mohammad Gheshlaghi and others},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year      = {2024}
}""",
)
ROBUST_DPO = Paper(
    "https://arxiv.org/abs/2403.00409",
    """\
@inproceedings{chowdhury2024provably,
  title     = {Provably Robust DPO: Aligning Language Models with Noisy Feedback},
  author    = {Ray Chowdhury, Sayak and Kini, Anush and Natarajan, Nagarajan},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}""",
)
TULU_3 = Paper(
    "https://arxiv.org/abs/2411.15124",
    """\
@article{lambert2024tulu3,
  title   = {Tulu 3: Pushing Frontiers in Open Language Model Post-Training},
  author  = {Lambert, Nathan and others},
  journal = {arXiv preprint arXiv:2411.15124},
  year    = {2024}
}""",
)
ORPO = Paper(
    "https://arxiv.org/abs/2403.07691",
    """\
@inproceedings{hong2024orpo,
  title     = {ORPO: Monolithic Preference Optimization without Reference Model},
  author    = {Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle = {Empirical Methods in Natural Language Processing},
  year      = {2024}
}""",
)
