"""Every field of a recipe is read while a run does its work, or has one of the reasons here for why this run does not."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment import pipeline
from alignment.data.splits import PAIRS
from alignment.errors import ConfigError
from alignment.pipeline import Method, run
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.idle import NEEDS
from alignment.run.trackers import TRACKIO_ONLY
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests.workspaces import recipe_of_run, save_workspace

KEYS = {
    "attn_implementation": "sdpa", "use_cpu": True, "max_length": 160, "max_prompt_length": 80, "max_steps": 3,
    "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2, "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip
# Where a field is declared and checked, which has no effect on the run: files, and functions of the configs.
CHECKING_FILES = ("recipe/ranges.py", "recipe/rehearsal.py", "recipe/idle.py", "recipe/parser.py", "lib/dataclasses.py")
CHECKING_FUNCTIONS = (
    "__post_init__", "problems", "value_problems", "combination_problems", "batch_problems", "choice_problem",
    "positive_problem", "<genexpr>", "<listcomp>", "<dictcomp>", "__repr__", "__str__", "to_dict",
)  # fmt: skip
CONFIG_FILES = ("recipe/configs.py", "preference/configs.py", "scripts/simpo_config.py", "transformers/training_args.py")
SETTLED = {  # at construction, for good
    "total_train_batch_size": "sets gradient_accumulation_steps",
    "ddp_timeout": "given to the process group",
    "deepspeed": "becomes hf_deepspeed_config",
    "fsdp_config": "becomes the plugin's settings; refused without fsdp",
    "tf32": "a switch of torch's",
    "torch_compile": "turned on by its backend or mode, and read as the plugin's",
}
IN_OTHER_RUNS = {
    "alpha": "AlphaPO; refused with another objective",
    "base_model_revision": "where the policy is an adapter",
    "use_rslora": "LoRA; refused without use_peft",
    "use_bnb_nested_quant": "4 bits; refused without them",
    "hub_token": "where something is pushed; a secret that may stand ready",
    "ignore_data_skip": "where a run is resumed",
    "restore_callback_states_from_checkpoint": "where a run is resumed",
    "on_save_failure": "where a checkpoint cannot be written",
    "skip_nonfinite": "where a loss is not finite",
    "optim_target_modules": "GaLore and APOLLO; refused with others",
    "local_rank": "old launchers pass it; transformers reads the environment",
    **dict.fromkeys(TRACKIO_ONLY, "trackio; refused without it"),
}
REFUSED_VALUE = {  # of fields that may have one value only
    "average_tokens_across_devices": False,
    "do_predict": True,
    "do_train": False,
    "generate_during_eval": True,
    "is_encoder_decoder": True,
    "label_pad_token_id": 0,
    "length_column_name": "size",
    "max_completion_length": 7,
    "max_target_length": 7,
    "prediction_loss_only": True,
}


def is_check(filename: str, function: str) -> bool:
    name = "/".join(Path(filename).parts[-2:])
    return name in CHECKING_FILES or Path(filename).name == "dataclasses.py" or (
        name in CONFIG_FILES and function in CHECKING_FUNCTIONS
    )  # fmt: skip


def recording(kind: type, read: set[str]) -> type:
    """The same config, which notes the fields that something else than a check of it reads."""
    fields = {field.name for field in dataclasses.fields(kind)}

    def get(self, name):
        code = sys._getframe(1).f_code
        if name in fields and not is_check(code.co_filename, code.co_name):
            read.add(name)
        return object.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": get, "__module__": kind.__module__})


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> Iterator[set[str]]:
    folder, names = tmp_path_factory.mktemp("fields"), set()
    save_workspace(folder, 6, 2, initializer_range=0.1)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (ModelArguments, DataArguments):
            patch.setattr(pipeline, kind.__name__, recording(kind, names))
        method = Method(config=recording(SimPOConfig, names), trainer=SimPOTrainer, data=PAIRS)
        run(method, [recipe_of_run(folder, folder, KEYS, {})])
    return names


def test_every_field_is_read_by_what_a_run_does_or_has_its_reason(read):
    fields = {field.name for kind in (ModelArguments, DataArguments, SimPOConfig) for field in dataclasses.fields(kind)}
    reasons = SETTLED.keys() | IN_OTHER_RUNS.keys() | REFUSED_VALUE.keys() | NEEDS.keys()
    assert sorted(fields - read - reasons) == []


def test_no_reason_is_given_for_a_field_that_this_run_reads(read):
    assert sorted((SETTLED.keys() | IN_OTHER_RUNS.keys() | REFUSED_VALUE.keys()) & read) == []


@pytest.mark.parametrize(("key", "value"), REFUSED_VALUE.items())
def test_a_field_of_one_value_takes_no_other(key, value):
    with pytest.raises(ConfigError, match=f"{key} = {value!r}"):
        SimPOConfig(output_dir="out", **{key: value})
