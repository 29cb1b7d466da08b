"""What an evaluation can be told, beside what every sampling can."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from alignment.errors import Problem
from alignment.recipe.values import expanded
from on_policy_data_gen.configs import path_problems, refuse

from .benchmarks import FORMATS


@dataclass
class EvaluationArguments:
    """Which questions are answered, and where the answers go."""

    benchmark: Literal["alpacaeval2", "arenahard", "mt-bench"] | None = field(
        default=None, metadata={"help": "Whose questions are read and whose answers are written."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "The benchmark's questions: its own file, as it is published. Nothing is downloaded."}
    )
    output: str | None = field(
        default=None, metadata={"help": "File of the answers: .json for alpacaeval2, .jsonl for the others."}
    )
    generator: str | None = field(
        default=None, metadata={"help": "The model's name in the answers; null: the output's name without its ending."}
    )
    seed: int = field(default=42, metadata={"help": "Seed; each answer's own is derived from it."})
    category_temperatures: dict[str, float] | None = field(
        default=None, metadata={"help": "Temperatures of the questions of some categories; temperature is for all others."}
    )
    token_counter: Literal["model", "o200k_base"] = field(
        default="model",
        metadata={
            "help": "Whose tokens arenahard's token_len counts: the model's own, or tiktoken's o200k_base, as the published "
            "answers have it (tiktoken fetches it once)."
        },
    )

    def __post_init__(self) -> None:
        missing = [key for key in ("benchmark", "prompts", "output") if getattr(self, key) is None]
        problems = [Problem(key, None, "is missing") for key in missing]
        problems += path_problems(self, "prompts") + path_problems(self, "output", expand=expanded)
        for category, temperature in (self.category_temperatures or {}).items():
            if temperature < 0:
                problems.append(Problem(f"category_temperatures.{category}", temperature, "must be 0 or more"))
        if self.benchmark is not None and self.output is not None:
            problems += self.output_problems(Path(self.output))
        refuse(self, problems)

    def output_problems(self, output: Path) -> list[Problem]:
        ending = FORMATS[self.benchmark].ending
        if output.suffix != ending:
            return [Problem("output", self.output, f"must end in {ending}, or {self.benchmark}'s judge does not find it")]
        if ending == ".jsonl" and self.generator not in (None, output.stem):
            advice = f"the judge takes the model's name from the file's, {output.stem}; name the output so, or leave this out"
            return [Problem("generator", self.generator, advice)]
        return []

    def model_name(self) -> str:
        return self.generator or Path(self.output).stem
