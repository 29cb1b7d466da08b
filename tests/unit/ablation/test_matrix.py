"""A matrix says what is varied, or everything that is wrong with it in one message."""

from pathlib import Path

import pytest

from alignment.ablation.matrix import Axis, Value, read_matrix, refuse_unknown_methods, short
from alignment.errors import UserError
from alignment.recipe.parser import RecipeError
from tests.unit.ablation.experiments import AXES, ORPO, RANKS, write_matrix

ROOT = Path(__file__).parents[3]


def complaints(folder: Path, **keys) -> list[str]:
    with pytest.raises(RecipeError) as refused:
        read_matrix(write_matrix(folder, **keys))
    return refused.value.complaints


def test_a_name_stands_for_a_bundle_of_keys_and_a_list_for_values_of_one_key(tmp_path):
    matrix = read_matrix(write_matrix(tmp_path, axes={"rank": RANKS, "seed": [42, 43]}, method="simpo"))
    assert matrix.axes == (
        Axis("rank", (Value("r16", {"lora_r": 16, "lora_alpha": 32}), Value("r8", {"lora_r": 8, "lora_alpha": 16}))),
        Axis("seed", (Value("s42", {"seed": 42}), Value("s43", {"seed": 43}))),
    )
    assert matrix.base == tmp_path / "base.yaml"


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("seed", 42, "s42"),
        ("learning_rate", 5e-7, "lr5e-7"),
        ("learning_rate", 1.0e-5, "lr1e-5"),
        ("beta", 2.5, "b2.5"),
        ("gamma_beta_ratio", 0.0, "gbr0.0"),
        ("loss_type", "hinge", "lthinge"),
    ],
)
def test_a_bare_value_is_named_by_its_keys_initials(key, value, name):
    assert short(key, value) == name


def test_output_goes_to_a_folder_of_the_matrixs_name(tmp_path):
    assert read_matrix(write_matrix(tmp_path, output_dir=None)).output_dir == Path("outputs/ablations/matrix")


def test_on_is_a_word_though_yaml_takes_it_for_true(tmp_path):
    path = Path(write_matrix(tmp_path, launch=None))
    path.write_text(path.read_text() + "launch: {on: slurm, hours: 3, slurm_partition: gpu, gpus_per_node: 4}\n")
    launch = read_matrix(str(path)).launch
    assert (launch.on, launch.hours, launch.gpus_per_node, launch.more) == ("slurm", 3, 4, {"slurm_partition": "gpu"})


def test_files_are_found_from_the_matrix_and_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    matrix = read_matrix("training_configs/ablations/dpo-vs-simpo-lora.yaml")
    assert matrix.base.resolve() == ROOT / "training_configs/llama-3-8b-instruct-simpo-lora.yaml"
    assert matrix.launch.accelerate_config.resolve() == ROOT / "accelerate_configs/single_gpu.yaml"


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    found = complaints(
        tmp_path, base="missing.yaml", axes={"rank": {"r/8": {"lora_r": 8}, "r4": {"lora_r": 4}}}, axis=1,
        one_at_a_time="often",
        launch={"on": "moon", "accelerate_config": "missing.yaml", "gpus_per_node": -1, "hours": 0, "nodes": 2},
    )  # fmt: skip
    for problem in (
        "unknown key 'axis' (did you mean 'axes'?)",
        "'missing.yaml': no such file, neither from",
        "axis rank: 'r/8' cannot name a folder",
        "one_at_a_time = 'often': must be one of False, True",
        "on = 'moon': must be one of local, slurm",
        "gpus_per_node = -1",
        "hours = 0: must be positive",
        "nodes: a cell runs on one machine here; accelerate_configs/multi_node.slurm",
        "method is missing",
    ):
        assert any(problem in line for line in found), (problem, found)
    assert sum("missing.yaml" in line for line in found) == 2


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"axes": {"a": {"x": {"beta": 1.0}}, "b": {"y": {"beta": 2.0}}}, "method": "simpo"}, "a and b both set beta"),
        ({"axes": AXES, "settings": {"lora_r": 4}}, "settings and rank both set lora_r"),
        ({"axes": AXES, "settings": {"output_dir": "x"}}, "output_dir is none of the recipe's that all cells can share"),
        ({"axes": {"a": {"x": {"output_dir": "x"}}}, "method": "simpo"}, "axis a sets output_dir, which every cell has"),
        ({"axes": AXES, "method": "simpo"}, "axis objective sets the method too"),
        ({"axes": {"rank": RANKS}, "method": "simpo", "fallback": {"orpo": ORPO}}, "of the axis that sets method"),
        ({"axes": AXES, "fallback": {"orpo": {"beta": 0.1}}}, "expected one name with its keys, method among them"),
        ({"axes": {}}, "expected axis: {name: {key: value, ...}, ...}, or key: [value, ...]"),
        ({"axes": {"a": {"x": 1}}, "method": "simpo"}, "axis a: expected name: {key: value, ...} for each value"),
        ({"axes": {"seed": [42, 42]}, "method": "simpo"}, "axis seed: s42 stands there twice"),
        ({"axes": None}, "axes is missing"),
        ({"settings": [1]}, "expected {key: value, ...}"),
        ({"launch": "local"}, "expected {on: local, accelerate_config: FILE, ...}"),
        ({"output_dir": "$NOT_SET/out"}, "environment variable NOT_SET is not set"),
    ],
)  # fmt: skip
def test_a_matrix_that_cannot_be_meant_is_refused(keys, problem, tmp_path):
    assert any(problem in line for line in complaints(tmp_path, **keys)), complaints(tmp_path, **keys)


@pytest.mark.parametrize("hours", [True, 0, -1, "3", float("inf"), float("nan")])
def test_hours_that_are_none_are_refused(hours, tmp_path):
    with pytest.raises(UserError, match=r"hours = .*: must be positive"):
        read_matrix(write_matrix(tmp_path, launch={"hours": hours}))


def test_a_number_that_yaml_reads_otherwise_than_its_writer_is_refused(tmp_path):
    path = Path(write_matrix(tmp_path, axes=None, method="simpo"))
    path.write_text(path.read_text() + "axes: {rank: {r8: {lora_r: 010}, r4: {lora_r: 4}}}\n")
    with pytest.raises(RecipeError, match="'010' may be meant as text or as a number"):
        read_matrix(str(path))


def test_a_method_without_an_entry_point_is_refused_with_those_that_have_one(tmp_path):
    matrix = read_matrix(write_matrix(tmp_path, axes={"seed": [1]}, method="smpo"))
    with pytest.raises(UserError, match=r"method = 'smpo': must be one of simpo, dpo \(did you mean 'simpo'\?\)"):
        refuse_unknown_methods(matrix, ["simpo", "dpo"])
