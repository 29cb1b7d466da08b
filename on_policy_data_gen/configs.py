"""What the on-policy stages can be told, on the command line or in one recipe. Defaults are the published settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignment.errors import ConfigError, Problem
from alignment.recipe.configs import DTYPES, DataArguments, ModelArguments, choice_problem, positive_problem
from alignment.recipe.values import Mismatch, expanded, expanded_input

SEEDS = (13, 21, 42, 79, 100)
PAIR_RULES = ("best_worst", "best_random", "all_pairs", "margin")


def path_problems(config: Any, *keys: str, expand: Any = expanded_input) -> list[Problem]:
    """Expands ~ and $VARIABLES in fields that name files; problems of those that stand for nothing."""
    problems = []
    for key in keys:
        value = getattr(config, key)
        try:
            setattr(config, key, value if value is None else expand(value))
        except Mismatch as mismatch:
            problems.append(Problem(key, value, f"expected {mismatch}"))
    return problems


def refuse(config: Any, problems: list[Problem]) -> None:
    if problems:
        raise ConfigError(type(config).__name__, problems)


@dataclass
class PromptArguments:
    """Which prompts responses are sampled for."""

    data_dir: str = field(
        default="HuggingFaceH4/ultrafeedback_binarized",
        metadata={
            "help": "Where the prompts are: a Hub data set (name or name:config), a folder, a file of JSONL, JSON or Parquet, "
            "a folder written by save_to_disk, or a glob."
        },
    )
    prompt_split: str | None = field(
        default=None, metadata={"help": "Split to read; null: train_prefs, else train, else the only one."}
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the prompts: text, or a list of turns, whose last reply is left out. null: prompt, else "
            "messages, else chosen."
        },
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Take the first so many different prompts; null: all."})

    def __post_init__(self) -> None:
        refuse(self, [*positive_problem(self, "max_prompts"), *path_problems(self, "data_dir")])


@dataclass
class PolicyArguments:
    """The model that responds, its template, and how it is sampled."""

    model: str = field(
        default="google/gemma-2-9b-it",
        metadata={"help": "Hub name or folder of the policy: a model, an adapter or a checkpoint."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    base_model_revision: str | None = field(
        default=None, metadata={"help": "Revision of the base, where model is an adapter; null: the one that it names."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, where it is not the model's own."})
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A shipped template (llama-3, mistral, gemma, zephyr), one of the tokenizer's named ones, a .jinja file, "
            "or Jinja text; null: the tokenizer's own."
        },
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Values for variables that the chat template reads, e.g. {enable_thinking: false}."}
    )
    torch_dtype: str | None = field(
        default="auto", metadata={"help": "Precision: float32, float16, bfloat16, or auto, as the checkpoint says."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel of transformers; null lets it choose."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Off unless you have read that code."}
    )
    temperature: float = field(default=0.8, metadata={"help": "Logits are divided by it; 0 always takes the likeliest token."})
    top_p: float = field(default=0.95, metadata={"help": "Sample from the likeliest tokens that hold this probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from so many likeliest tokens; 0: from all."})
    max_tokens: int = field(default=4096, metadata={"help": "Longest response, in tokens."})
    engine: Literal["transformers", "vllm"] = field(
        default="transformers", metadata={"help": "What generates, unless a server does."}
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts that transformers works on at a time."})
    vllm_python: str | None = field(
        default=None, metadata={"help": "Interpreter of the environment in which vLLM is installed (docs/on-policy.md)."}
    )
    vllm_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "More of vLLM's engine arguments, e.g. {gpu_memory_utilization: 0.9}."}
    )
    tensor_parallel: int = field(default=1, metadata={"help": "GPUs that vLLM divides one model among."})
    data_parallel: int = field(default=1, metadata={"help": "Copies of the model that vLLM runs side by side."})
    server: str | None = field(
        default=None, metadata={"help": "URL of an OpenAI-compatible server of this model, e.g. http://localhost:8000/v1."}
    )
    served_model: str | None = field(default=None, metadata={"help": "The model's name at the server; null: as model."})
    concurrency: int = field(default=64, metadata={"help": "Requests that are under way at a server at a time."})
    use_cpu: bool = field(default=False, metadata={"help": "Work on the CPU, also where there is a GPU."})

    def __post_init__(self) -> None:
        problems = positive_problem(self, "max_tokens", "batch_size", "tensor_parallel", "data_parallel", "concurrency")
        problems += path_problems(self, "model", "tokenizer_name_or_path", "vllm_python")
        if self.torch_dtype is not None:
            problems += choice_problem(self, "torch_dtype", DTYPES)
        if self.temperature < 0:
            problems.append(Problem("temperature", self.temperature, "must be 0 or more"))
        if not 0 < self.top_p <= 1:
            problems.append(Problem("top_p", self.top_p, "must be above 0 and at most 1"))
        if self.top_k < 0:
            problems.append(Problem("top_k", self.top_k, "must be 0 (from all tokens) or more"))
        problems += self.engine_problems()
        refuse(self, problems)

    def engine_problems(self) -> list[Problem]:
        problems = []
        if self.server is not None and self.engine == "vllm":
            problems.append(Problem("engine", "vllm", "generates here, and server elsewhere; give one of them"))
        if self.server is not None and not self.server.startswith(("http://", "https://")):
            problems.append(Problem("server", self.server, "must be a URL, http://HOST:PORT/v1"))
        if self.engine == "vllm" and self.vllm_python is None:
            advice = "is missing: engine vllm runs in an environment of its own (docs/on-policy.md); name its python"
            problems.append(Problem("vllm_python", None, advice))
        if self.vllm_python is not None and not Path(self.vllm_python).is_file():
            problems.append(Problem("vllm_python", self.vllm_python, "no such file; name an interpreter, ENV/bin/python"))
        own = ("vllm_python", "vllm_options", "tensor_parallel", "data_parallel")
        given = [key for key in own if getattr(self, key) not in (None, 1)]
        if given and self.engine != "vllm":
            problems.append(Problem(given[0], getattr(self, given[0]), "is for vLLM; add engine: vllm"))
        return problems

    def model_arguments(self) -> ModelArguments:
        return ModelArguments(
            model_name_or_path=self.model,
            model_revision=self.model_revision,
            base_model_revision=self.base_model_revision,
            tokenizer_name_or_path=self.tokenizer_name_or_path,
            trust_remote_code=self.trust_remote_code,
            torch_dtype=self.torch_dtype,
            attn_implementation=self.attn_implementation,
        )

    def data_arguments(self) -> DataArguments:
        return DataArguments(chat_template=self.chat_template, chat_template_kwargs=self.chat_template_kwargs)


@dataclass
class DecodeArguments:
    """One pass over the prompts."""

    seed: int = field(default=42, metadata={"help": "Seed of this pass; each prompt's own is derived from it."})
    output_dir: str = field(
        default="datasets/gemma2_ultrafeedback", metadata={"help": "Folder of the data's files: output_SEED.json goes there."}
    )

    def __post_init__(self) -> None:
        refuse(self, path_problems(self, "output_dir", expand=expanded))


@dataclass
class PostProcessArguments:
    """Where the passes lie that are joined."""

    generation_file_dir: str = field(
        default="datasets/gemma2_ultrafeedback",
        metadata={"help": "Folder of the files output*.json; all_outputs.json goes there."},
    )

    def __post_init__(self) -> None:
        refuse(self, path_problems(self, "generation_file_dir"))


@dataclass
class RewardArguments:
    """The model that scores responses."""

    reward_model: str = field(
        default="RLHFlow/ArmoRM-Llama3-8B-v0.1",
        metadata={"help": "Hub name or folder: ArmoRM, or a sequence-classification model with one label."},
    )
    reward_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the reward model on the Hub."})
    reward_dtype: str | None = field(
        default=None,
        metadata={"help": "Precision of the reward model: float32, float16 or bfloat16; null: bfloat16, on a CPU float32."},
    )
    reward_attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel of the reward model; null lets transformers choose."}
    )
    reward_batch_size: int = field(default=8, metadata={"help": "Conversations that are scored at a time on each device."})
    reward_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest conversation that is scored, in tokens; null: what the model has positions for."},
    )

    def __post_init__(self) -> None:
        problems = positive_problem(self, "reward_batch_size", "reward_max_length")
        problems += path_problems(self, "reward_model")
        if self.reward_dtype is not None:
            problems += choice_problem(self, "reward_dtype", DTYPES[1:])
        refuse(self, problems)


@dataclass
class PairArguments:
    """Which responses become pairs, and which prompts are held out."""

    pair_rule: str = field(
        default="best_worst",
        metadata={
            "help": "best_worst: the highest reward against the lowest; best_random: against a random lower one; all_pairs: "
            "every two; margin: against the lowest within min_margin and max_margin."
        },
    )
    min_margin: float = field(default=0.0, metadata={"help": "Least difference of rewards in a pair, whatever the rule."})
    max_margin: float | None = field(default=None, metadata={"help": "Largest difference of rewards in a pair; null: any."})
    pair_seed: int = field(default=42, metadata={"help": "Seed of best_random, and of the prompts that are held out."})
    test_size: float = field(default=0.03, metadata={"help": "Share of the prompts whose pairs become the test split."})

    def __post_init__(self) -> None:
        problems = choice_problem(self, "pair_rule", PAIR_RULES)
        if self.min_margin < 0:
            problems.append(Problem("min_margin", self.min_margin, "must be 0 or more"))
        if self.max_margin is not None and self.max_margin <= self.min_margin:
            problems.append(Problem("max_margin", self.max_margin, f"must be above min_margin = {self.min_margin}"))
        if self.pair_rule == "margin" and not self.min_margin and self.max_margin is None:
            problems.append(Problem("pair_rule", "margin", "needs min_margin or max_margin"))
        if not 0 <= self.test_size < 1:
            problems.append(Problem("test_size", self.test_size, "must be at least 0 and below 1"))
        refuse(self, problems)


@dataclass
class AnnotateArguments:
    """What is scored, and where the pairs go."""

    generation_file: str = field(
        default="datasets/gemma2_ultrafeedback/all_outputs.json",
        metadata={"help": "What post_process.py wrote; a file that has rewards already (_rm.json) is paired anew."},
    )
    output_dir: str = field(
        default="datasets/gemma2_ultrafeedback/",
        metadata={"help": "Folder of the _rm.json, the _bin.json and of the data set, in pairs."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Work on the CPU, also where there is a GPU."})

    def __post_init__(self) -> None:
        refuse(self, [*path_problems(self, "generation_file"), *path_problems(self, "output_dir", expand=expanded)])


@dataclass
class OnPolicyArguments:
    """All stages in one folder."""

    seeds: list[int] = field(
        default_factory=lambda: [*SEEDS], metadata={"help": "One response to every prompt is sampled for each of these."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of everything that the stages write; the data set is its folder pairs."}
    )

    def __post_init__(self) -> None:
        problems = path_problems(self, "output_dir", expand=expanded)
        if self.output_dir is None:
            problems.append(Problem("output_dir", None, "is missing"))
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            problems.append(Problem("seeds", self.seeds, "must be two or more, all different"))
        refuse(self, problems)
