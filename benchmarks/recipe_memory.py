"""On which GPUs the recipes of docs/recipes.md fit, by a dry run's own estimate: the table there.

    python benchmarks/recipe_memory.py [RECIPE ...] [--processes 1 2 4 8]

Neither weights nor data: models of their published sizes, and pairs of which only the lengths count. As --dry_run has it:

    python scripts/run_simpo.py RECIPE.yaml --dry_run --gpu_memory=80 --strategy=fsdp2 --num_processes=8
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig

from alignment.model.loading import check_model_path
from alignment.preference.configs import PairConfig
from alignment.preference.memory import GIB, Plan, estimates
from alignment.preflight.memory import CARDS, Memory, memory_of, plan_of, sizes_of
from alignment.preflight.model import Skeleton, skeleton_of
from alignment.preflight.settings import meant
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser
from scripts.simpo_config import SimPOConfig

FOLDER = Path(__file__).resolve().parents[1] / "training_configs"


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return dict(zip(names, (hidden, intermediate, layers, heads, kv, vocabulary), strict=True)) | more


# As the models' config.json files publish them. tests/unit/recipe/test_newer_models.py compares what they add up to with the
# parameters that the Hub counts.
GEMMA_3_4B = {
    "text_config": sizes(2560, 10240, 34, 8, 4, 262_208, head_dim=256, sliding_window=1024),
    "vision_config": sizes(1152, 4304, 27, 16, 16, 0, image_size=896, patch_size=14) | {"vision_use_head": False},
    "mm_tokens_per_image": 256,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen3-8B": ("qwen3", sizes(4096, 12288, 36, 32, 8, 151_936, head_dim=128, tie_word_embeddings=False)),
    "Qwen/Qwen3-4B": ("qwen3", sizes(2560, 9728, 36, 32, 8, 151_936, head_dim=128, tie_word_embeddings=True)),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", sizes(4096, 14336, 32, 32, 8, 128_256, tie_word_embeddings=False)),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", sizes(3072, 8192, 28, 24, 8, 128_256, tie_word_embeddings=True)),
    "google/gemma-3-1b-it": ("gemma3_text", sizes(1152, 6912, 26, 4, 1, 262_144, head_dim=256, sliding_window=512)),
    "google/gemma-3-4b-it": ("gemma3", GEMMA_3_4B),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", sizes(4096, 14336, 32, 32, 8, 32_768, sliding_window=None)),
    "allenai/OLMo-2-1124-7B-Instruct": ("olmo2", sizes(4096, 11008, 32, 32, 32, 100_352)),
    "allenai/Olmo-3-7B-Instruct": ("olmo3", sizes(4096, 11008, 32, 32, 32, 100_278, sliding_window=4096)),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", sizes(2048, 11008, 36, 16, 4, 128_256)),
}
# Prompt, chosen, rejected: most pairs are about as long as UltraFeedback's, one is as long as the recipes' max_length allows.
USUAL, LONGEST, PAIRS = (200, 350, 350), (100, 1948, 1948), 1024


class Case(NamedTuple):
    """A recipe on so many GPUs."""

    name: str
    processes: int
    args: PairConfig
    skeleton: Skeleton
    plan: Plan


def full_size(model: str) -> PreTrainedConfig:
    """The configuration of a model by its published sizes; what else it says has no part in memory."""
    kind, own = MODELS[model]
    return AutoConfig.for_model(kind, **own)


def newer_recipes() -> list[str]:
    """Names of the recipes whose models stand here."""
    paths = FOLDER.glob("*.yaml")
    return sorted(path.stem for path in paths if any(f"model_name_or_path: {model}\n" in path.read_text() for model in MODELS))


def lengths() -> Dataset:
    """The columns of prepared pairs that the estimate reads."""
    rows = [LONGEST, *[USUAL] * (PAIRS - 1)]
    names = ("chosen_prompt_length", "chosen_length", "rejected_length")
    return Dataset.from_list([{**dict(zip(names, row, strict=True)), "length": row[0] + max(row[1:])} for row in rows])


def case_of(name: str, processes: int, folder: Path, rows: Dataset) -> Case:
    """folder: where the model's configuration is written."""
    strategy = "single" if processes == 1 else "fsdp2"
    parser = H4ArgumentParser((ModelArguments, DataArguments, SimPOConfig))
    options = ["--dry_run", f"--strategy={strategy}", f"--num_processes={processes}"]
    model_args, _, args = parser.parse([str(FOLDER / f"{name}.yaml"), *options])
    full_size(model_args.model_name_or_path).save_pretrained(folder)
    model_args.model_name_or_path = str(folder)
    skeleton = skeleton_of(model_args, args, check_model_path(model_args))
    return Case(name, processes, args, skeleton, plan_of(args, model_args, skeleton, meant(parser), strategy, rows))


def memories_of(cases: list[Case], rows: Dataset) -> list[Memory]:
    """One interpreter makes all estimates."""
    memories = []
    for case, model in zip(cases, estimates([case.plan for case in cases], timeout=3600), strict=True):
        tokens = sizes_of(rows, case.plan, scores_prompt=case.args.objective.scores_prompt)
        memories.append(memory_of(model, case.args, tokens, case.skeleton.parameters, None))
    return memories


def cell(cases: list[Case], memories: list[Memory], gib: float) -> str:
    """The fewest GPUs of that size that the recipe fits on, and the least that it needs of each: the longest pair alone."""
    for case, memory in zip(cases, memories, strict=True):
        (fit,) = (fit for fit in memory.fits if fit.gib == gib)
        if fit.division is not None:
            return f"{case.processes}: {memory.longest.peak.total / GIB:.0f} GiB"
    return f"not on {cases[-1].processes}"


def table_row(name: str, counts: list[int], folder: Path) -> str:
    """Of the recipe `name`, tried on so many GPUs."""
    rows = lengths()
    cases = [case_of(name, count, folder / name, rows) for count in counts]
    memories = memories_of(cases, rows)
    cells = " | ".join(cell(cases, memories, card) for card in CARDS)
    return f"| `{name}` | {cases[0].plan.layout} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="names without .yaml; default: all")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4, 8], help="GPUs to try, in this order")
    arguments = parser.parse_args()
    print(f"| recipe | layout | {' | '.join(f'{card} GB' for card in CARDS)} |\n|{'---|' * (len(CARDS) + 2)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.recipes or newer_recipes():
            # An adapter's recipe is for one GPU.
            counts = [1] if name.endswith("lora") else arguments.processes
            print(table_row(name, counts, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
