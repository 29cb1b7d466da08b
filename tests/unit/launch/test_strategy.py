"""What a launch asked for against what it got, and what is put right before and after training."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, StateDictType
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from alignment.data.splits import PAIRS
from alignment.errors import UserError
from alignment.launch import launch, strategy
from alignment.launch.launch import check_launch, foreseen, launcher_processes, launcher_strategy, receives_weights
from alignment.launch.strategy import missing_weights
from alignment.model.loading import unwritten_policy
from alignment.pipeline import Method, main
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests import builders

ROOT = Path(__file__).parents[3]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP2_SHARDED = SimpleNamespace(fsdp_version=2, state_dict_type=StateDictType.SHARDED_STATE_DICT)
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def launched(processes: int = 2, distributed_type: str = "MULTI_CPU", **keys: object) -> SimpleNamespace:
    """Training arguments of a launch."""
    state = SimpleNamespace(num_processes=processes, distributed_type=DistributedType(distributed_type))
    return SimpleNamespace(distributed_state=state, **{"strategy": None, "num_processes": None, **keys})


def refusal(args: SimpleNamespace, **environment: str) -> str:
    with pytest.raises(UserError) as refused:
        check_launch(args, {"WORLD_SIZE": "2", **environment})
    return str(refused.value)


# ---- What was asked for ----


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "false"}, None),
        (FSDP2, "fsdp2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp1"),
        (ZERO3, "zero3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "zero2"),
    ],
)
def test_the_launchers_variables_name_the_strategy(environment, asked):
    assert launcher_strategy(environment) == asked


def test_the_stage_stands_in_a_deepspeed_config_where_there_is_one(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    assert launcher_strategy(environment) == "zero3"


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 run.py recipe.yaml", 2),
        ("python -m accelerate.commands.launch --cpu --num-processes=3 run.py --num_processes=9", 3),
        ("python /bin/accelerate launch --cpu run.py", None),
        (f"python /bin/accelerate-launch --cpu --config_file {ROOT}/accelerate_configs/cpu.yaml run.py", 2),
        (f"python /bin/accelerate launch --config_file {ROOT}/accelerate_configs/single_gpu.yaml run.py", 1),
        ("bash -c pytest", None),
    ],
)
def test_the_launchers_own_command_line_says_how_many_processes_it_was_to_start(command, processes, monkeypatch):
    parent = SimpleNamespace(cmdline=command.split)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    assert launcher_processes({}) == processes


def test_a_process_without_a_launcher_to_look_at_was_told_nothing(monkeypatch):
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: None))  # the first one of a container
    assert launcher_processes({}) is None

    def hidden() -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: SimpleNamespace(cmdline=hidden)))
    assert launcher_processes({}) is None


# ---- What it got ----


def test_a_launch_that_is_what_it_was_asked_to_be_goes_on():
    check_launch(launched(), {"WORLD_SIZE": "2"})
    check_launch(launched(strategy="ddp", num_processes=2), {"WORLD_SIZE": "2"})
    check_launch(launched(strategy="zero3"), {"WORLD_SIZE": "2", **ZERO3})
    check_launch(launched(4, "MULTI_GPU", strategy="fsdp2"), {"WORLD_SIZE": "4", **FSDP2})
    check_launch(launched(1, "NO", strategy="single"), {})


def test_a_strategy_that_accelerate_would_replace_is_refused():
    assert "asks for fsdp2 and the run would silently be ddp" in refusal(launched(), **FSDP2)
    assert "would silently be ddp: ACCELERATE_USE_CPU is set" in refusal(launched(), **ZERO3, ACCELERATE_USE_CPU="true")


def test_fsdp_1_with_checkpoints_it_could_not_resume_is_refused():
    fsdp1 = {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    check_launch(launched(4, "MULTI_GPU"), fsdp1)
    check_launch(launched(4, "MULTI_GPU"), {**fsdp1, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"})
    check_launch(launched(4, "MULTI_GPU"), {"WORLD_SIZE": "4", **FSDP2, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})
    message = refusal(launched(4, "MULTI_GPU"), **fsdp1, FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
    assert message.startswith("fsdp_state_dict_type = SHARDED_STATE_DICT: FSDP 1 would resume with an empty optimizer")


@pytest.mark.parametrize("wanted", ["single", "zero2", "zero3", "fsdp1", "fsdp2"])
def test_a_recipes_strategy_is_checked_and_the_message_names_the_config_to_launch_with(wanted):
    message = refusal(launched(strategy=wanted))
    assert message.startswith(f"strategy = {wanted}: this launch is ddp; launch with --config_file accelerate_configs/")
    assert (ROOT / message.split()[-1]).is_file() or wanted == "single"


def test_the_number_of_processes_is_checked():
    assert refusal(launched(num_processes=4)).startswith("num_processes = 4: 2 started.")


def test_two_processes_that_know_nothing_of_each_other_do_not_both_train():
    # accelerate's answer to a launch of several processes on a CPU without use_cpu.
    assert "each takes itself for the only one" in refusal(launched(1, "NO"))


@pytest.fixture
def compiler_lock(tmp_path):
    lock = tmp_path / "py311_cpu/operator/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_the_lock_of_a_compiler_that_was_killed_is_deleted(compiler_lock, tmp_path):
    long_ago = time.time() - launch.COMPILING_SECONDS
    os.utime(compiler_lock, (long_ago, long_ago))
    launch.outwait_compilers({"TORCH_EXTENSIONS_DIR": str(tmp_path), **FSDP2})  # compiles nothing
    assert compiler_lock.exists()
    launch.outwait_compilers({"TORCH_EXTENSIONS_DIR": str(tmp_path), **ZERO3})
    assert not compiler_lock.exists()


def test_a_compiler_at_work_is_waited_for(compiler_lock, tmp_path, monkeypatch):
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            compiler_lock.unlink()

    monkeypatch.setattr(launch.time, "sleep", sleep)
    launch.outwait_compilers({"TORCH_EXTENSIONS_DIR": str(tmp_path), **ZERO3})
    assert waits == [1, 1, 1]


def test_one_process_of_a_sharding_launcher_is_foreseen_as_accelerate_treats_it():
    assert foreseen(DistributedType.NO, 1, FSDP2) == "single"
    assert foreseen(DistributedType.MULTI_GPU, 1, FSDP2) == "fsdp2"
    assert foreseen(DistributedType.NO, 1, ZERO3) == "zero3"


@pytest.fixture
def deepspeed_forgotten():
    """transformers remembers a DeepSpeed config, and would load every later model of this process into shards."""
    yield
    unset_hf_deepspeed_config()


@pytest.mark.usefixtures("deepspeed_forgotten")
@pytest.mark.parametrize("variables", [FSDP2, {**ZERO3, "ACCELERATE_USE_CPU": "true"}], ids=["fsdp2", "zero3"])
def test_a_replaced_strategy_is_one_message_and_status_2_and_loads_nothing(variables, tmp_path, monkeypatch, capsys):
    builders.tiny_model().save_pretrained(tmp_path / "model")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("alignment.pipeline.build_trainer", lambda *_: pytest.fail("a model was about to be loaded"))
    options = {"model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "run", "use_cpu": "true"}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    with pytest.raises(SystemExit) as exit_:
        main(Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS), [*arguments, '--dataset_mixer={"nowhere": 1.0}'])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("and the run would silently be single") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("distributed_type", "state", "processes", "name"),
    [
        ("NO", {}, 1, "DDP or one process"),
        ("MULTI_CPU", {}, 2, "DDP or one process"),
        ("DEEPSPEED", {"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, 2, "DeepSpeed ZeRO-3"),
        ("FSDP", {"fsdp_plugin": FSDP2_SHARDED}, 2, "FSDP2 SHARDED_STATE_DICT"),
    ],
)
def test_a_layout_is_named_as_the_manifests_of_older_checkpoints_name_it(distributed_type, state, processes, name):
    launch_ = {"distributed_type": DistributedType(distributed_type), "num_processes": processes}
    assert strategy.layout(SimpleNamespace(state=SimpleNamespace(**state), **launch_)) == name


# ---- What is put right ----


def test_bf16_is_for_the_parameters_that_compute_alone():
    for version, policy in ((1, MixedPrecision), (2, MixedPrecisionPolicy)):
        given = policy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        plugin = SimpleNamespace(fsdp_version=version, mixed_precision_policy=given)
        strategy.reduce_in_float32(plugin)
        assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
        assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    assert plugin.mixed_precision_policy.output_dtype is None
    plugin.mixed_precision_policy = None  # a float32 run
    strategy.reduce_in_float32(plugin)
    assert plugin.mixed_precision_policy is None


@pytest.mark.parametrize("tie", [False, True])
def test_a_policy_that_waits_for_its_weights_is_the_loaded_one_but_for_them(tie, tmp_path):
    builders.tiny_model(tie=tie).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", attn_implementation="sdpa")
    waiting = unwritten_policy(str(tmp_path), dtype="bfloat16", attn_implementation="sdpa", revision="main")
    assert type(waiting) is type(loaded)
    assert waiting.config._attn_implementation == "sdpa"
    ours, theirs = ({n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (waiting, loaded))
    assert ours == theirs
    for (name, buffer), (_, same) in zip(waiting.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(buffer, same), name
    assert not torch.equal(waiting.get_input_embeddings().weight, loaded.get_input_embeddings().weight)


def test_only_processes_that_are_sent_their_weights_leave_them_unread(monkeypatch):
    promised = {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    assert not receives_weights(promised)  # alone
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, answer in ((0, False), (1, True)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert receives_weights(promised) is answer
    assert not receives_weights(FSDP2)
    assert not receives_weights(ZERO3)


def test_weights_without_a_tensor_are_not_taken_for_a_saved_model(tmp_path):
    assert missing_weights(tmp_path) == "no weights were written"
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert missing_weights(tmp_path) is None
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert missing_weights(tmp_path) == "adapter_model.safetensors is empty"
