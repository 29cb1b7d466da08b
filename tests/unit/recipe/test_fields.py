"""Every field of every config is read by something on the way of a run, or refused, or stands here with a reason."""

import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

import accelerate
import pytest
import transformers.integrations
import trl.trainer.sft_trainer

from alignment.preference.configs import CHOICES, RANGES
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import RENAMED
from alignment.recipe.ranges import PAIR_RULES, RULES
from scripts.dpo_config import DPOConfig
from scripts.orpo_config import ORPOConfig
from scripts.sft_config import TOKENIZED_BEFORE, SFTConfig
from scripts.simpo_config import SimPOConfig

ROOT = Path(__file__).parents[3]
TRANSFORMERS = Path(transformers.__file__).parent
# What is only declared and checked is not read.
OWN = [path for folder in ("alignment", "scripts") for path in (ROOT / folder).rglob("*.py") if "config" not in path.name]
OWN = [path for path in OWN if path.name != "ranges.py"]
# Where a field may be read: the suite, the Trainer and what it calls, and for SFT TRL's trainer.
READERS = [
    *OWN,
    *TRANSFORMERS.glob("trainer*.py"),
    TRANSFORMERS / "training_args.py",
    *(TRANSFORMERS / "integrations").glob("*.py"),
    Path(accelerate.__file__).parent / "accelerator.py",
    Path(trl.trainer.sft_trainer.__file__),
    Path(trl.trainer.sft_trainer.__file__).with_name("sft_config.py"),
]
# Fields that are allowed one value only, so that nothing needs to read them.
ONLY = {
    "do_train",
    "do_predict",
    "auto_find_batch_size",
    "enable_jit_checkpoint",
    "save_on_each_node",
    "logging_nan_inf_filter",
}
REASONS = {
    "local_rank": "old launchers pass it; transformers reads the environment",
    "parallelism_config": "an object that no recipe can spell: its type admits null alone",
    "length_normalized": "makes the objective per_token, which is what the trainer reads",
    "router_aux_loss_coef": "TRL writes it into the model's config",
}


def fields(config: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.init]


@pytest.fixture(scope="module")
def read() -> set[str]:
    """Names of attributes that a reader reads (not only sets), and names that it asks for by getattr."""
    names = set()
    for path in READERS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and path in OWN:
                names.add(node.value)  # keys that the suite goes through by name
    return names


CONFIGS = [ModelArguments, DataArguments, SimPOConfig, DPOConfig, ORPOConfig, SFTConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_read_or_refused_or_has_its_reason(config, read):
    refused = ONLY | {"text_column"} | (TOKENIZED_BEFORE.keys() if config is SFTConfig else PAIR_RULES.keys() | RANGES.keys())
    silent = [name for name in fields(config) if name not in read | refused | REASONS.keys() | RENAMED.keys()]
    assert silent == []


def test_no_reason_is_given_for_a_field_that_does_not_exist():
    known = {name for config in CONFIGS for name in fields(config)}
    assert set(REASONS) <= known
    assert RULES.keys() | PAIR_RULES.keys() | RANGES.keys() | CHOICES.keys() | TOKENIZED_BEFORE.keys() <= known


# Read where the Trainer computes a loss or goes through held-out rows, which SimPO does in its own way.
REPLACED = ("compute_loss", "evaluation_loop", "prediction_step")
HONOURED_STILL = {
    "per_device_eval_batch_size", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval", "torch_compile",
    "use_liger_kernel",
}  # fmt: skip


def test_what_the_trainer_reads_in_methods_that_simpo_has_of_its_own_is_ruled_out_for_pairs():
    asked = set()
    for name in REPLACED:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(transformers.Trainer, name))))
        attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        asked |= {node.attr for node in attributes if ast.unparse(node.value) in ("args", "self.args")}
    assert asked & set(fields(SimPOConfig)) <= PAIR_RULES.keys() | RULES.keys() | HONOURED_STILL
