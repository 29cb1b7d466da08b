"""Cells are named by their values, and take from the base what their method reads; together they are checked."""

from pathlib import Path

import pytest
import torch
import yaml

from alignment.ablation import checks
from alignment.ablation.cells import Cell, make_cells, recipe_text
from alignment.ablation.checks import check_cells
from alignment.ablation.matrix import read_matrix, refuse_unknown_methods
from alignment.ablation.running import launch_command, shown_command
from alignment.data.splits import CONVERSATIONS
from alignment.errors import UserError
from alignment.pipeline import Method
from alignment.recipe.parser import RecipeError
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from tests.methods import METHODS as PAIR_METHODS
from tests.unit.ablation.experiments import AXES, BASE, DPO, ORPO, RANKS, SIMPO, break_down, write_matrix

ROOT = Path(__file__).parents[3]
LAUNCH_ON_SLURM = {"on": "slurm", "accelerate_config": "accelerate_configs/single_gpu.yaml"}
PARSE = checks.parse
METHODS = {**PAIR_METHODS, "sft": Method(SFTConfig, SFTTrainer, CONVERSATIONS)}


def cells_of(folder: Path, **keys) -> dict[str, Cell]:
    return {cell.name: cell for cell in make_cells(read_matrix(write_matrix(folder, **keys)), METHODS)}


def check(folder: Path, **keys) -> list[str]:
    matrix = read_matrix(write_matrix(folder, **keys))
    cells = make_cells(matrix, METHODS)
    return check_cells(matrix, cells, {cell.name: recipe_text(cell, "run it", "matrix") for cell in cells}, METHODS)


def refusal(folder: Path, **keys) -> str:
    with pytest.raises(RecipeError) as refused:
        check(folder, **keys)
    return "\n".join(refused.value.complaints)


# ---- Making ----


def test_cells_are_named_by_their_values_in_the_order_of_the_axes(tmp_path):
    cells = cells_of(tmp_path, axes={**AXES, "seed": [42, 43]}, fallback={"orpo": ORPO})
    assert list(cells) == [
        "simpo-r16-s42", "simpo-r16-s43", "simpo-r8-s42", "simpo-r8-s43",
        "dpo-r16-s42", "dpo-r16-s43", "dpo-r8-s42", "dpo-r8-s43",
        "orpo-r16-s42", "orpo-r16-s43", "orpo-r8-s42", "orpo-r8-s43",
    ]  # fmt: skip
    assert [name for name, cell in cells.items() if cell.is_fallback] == list(cells)[8:]
    assert cells["dpo-r8-s43"].values == {"objective": "dpo", "rank": "r8", "seed": "s43"}
    assert cells["dpo-r8-s43"].run == tmp_path / "out" / "cells" / "dpo-r8-s43" / "run"


def test_a_cell_is_the_base_with_its_own_keys(tmp_path):
    cell = cells_of(tmp_path, settings={"save_steps": 7, "learning_rate": 2e-3})["dpo-r8-s42"]
    kept = {key: value for key, value in BASE.items() if key != "gamma_beta_ratio"}
    own = {"save_steps": 7, "learning_rate": 2e-3, "beta": 0.1, "lora_r": 8, "lora_alpha": 16, "seed": 42}
    assert cell.recipe == {**kept, **own}
    assert (cell.method, cell.dropped) == ("dpo", ("gamma_beta_ratio",))


@pytest.mark.parametrize(
    ("base", "method", "dropped"),
    [
        ({"gamma_beta_ratio": 0.5}, {"method": "dpo"}, ("gamma_beta_ratio",)),
        ({"loss_type": "alphapo", "alpha": 0.1}, {"method": "dpo"}, ("gamma_beta_ratio", "loss_type", "alpha")),
        ({"loss_type": "hinge"}, {"method": "dpo"}, ("gamma_beta_ratio",)),
        ({"length_normalized": True}, {"method": "dpo", "loss_type": "ipo"}, ("gamma_beta_ratio", "length_normalized")),
        ({"precompute_ref_log_probs": True}, {"method": "simpo"}, ("precompute_ref_log_probs",)),
        ({"label_smoothing": 0.1}, {"method": "orpo"}, ("gamma_beta_ratio", "label_smoothing")),
        ({}, {"method": "simpo", "loss_type": "simper"}, ("beta", "gamma_beta_ratio")),
        ({}, {"method": "simpo"}, ()),
    ],
)
def test_keys_that_a_cells_objective_does_not_read_are_dropped(base, method, dropped, tmp_path):
    (cell,) = cells_of(tmp_path, recipe={**BASE, **base}, axes={"objective": {"x": method}}).values()
    assert sorted(cell.dropped) == sorted(dropped)
    assert not set(dropped) & set(cell.recipe)


def test_a_key_in_another_spelling_replaces_the_bases(tmp_path):
    axes = {"rank": RANKS, "w": {"long": {"warmup_steps": 5}}}
    cell = cells_of(tmp_path, recipe={**BASE, "warmup_ratio": 0.1}, axes=axes, method="simpo")["r8-long"]
    assert "warmup_ratio" not in cell.recipe
    assert cell.recipe["warmup_steps"] == 5


def test_two_cells_of_one_name_are_refused(tmp_path):
    axes = {"one": {"a": {"beta": 2.0}, "a-b": {"beta": 3.0}}, "other": {"b-c": {"lora_r": 4}, "c": {"lora_r": 8}}}
    with pytest.raises(UserError, match="two cells are called a-b-c"):
        cells_of(tmp_path, axes=axes, method="simpo")


def test_a_written_recipe_says_how_it_is_launched_and_reads_back(tmp_path):
    matrix = read_matrix(write_matrix(tmp_path))
    cell = make_cells(matrix, METHODS)[0]
    text = recipe_text(cell, shown_command(cell, matrix.launch, ROOT / "scripts"), "matrix")
    assert text.startswith("# accelerate launch --config_file accelerate_configs/cpu.yaml --cpu --num_processes=1 ")
    assert "scripts/run_simpo.py " in text.splitlines()[0]
    assert text.splitlines()[0].endswith(str(cell.recipe_file))
    read = yaml.safe_load(text)
    assert read.pop("output_dir") == str(cell.run)
    assert read.pop("run_name") == "matrix-simpo-r16-s42"
    assert {**read, "learning_rate": float(read["learning_rate"])} == cell.recipe
    command = launch_command(cell, matrix.launch, ROOT / "scripts")
    assert command[1:4] == ["-m", "accelerate.commands.launch", "--quiet"]
    assert " ".join(command[4:]) in text.splitlines()[0]


# ---- Checking ----


def test_cells_that_differ_in_their_axes_alone_are_accepted_with_a_line_on_what_was_left_out(tmp_path):
    lines = check(tmp_path, axes={**AXES, "seed": [42, 43]}, fallback={"orpo": ORPO})
    assert "dpo-r16-s42, dpo-r16-s43, dpo-r8-s42, dpo-r8-s43: left out, because dpo does not read it: gamma_beta_ratio" in lines


def test_nothing_is_written_by_a_check(tmp_path):
    check(tmp_path)
    assert not (tmp_path / "out").exists()


def test_everything_wrong_with_any_cell_is_said_at_once(tmp_path):
    axes = {"objective": {"simpo": {"method": "simpo", "beta": -1.0}, "dpo": {**DPO, "gama": 1}}, "rank": RANKS}
    text = refusal(tmp_path, recipe={**BASE, "model_name_or_path": None, "do_eval": False}, axes=axes)
    assert "matrix.yaml: all cells: model_name_or_path is missing" in text
    assert "matrix.yaml: simpo-r16, simpo-r8: beta = -1.0: must be positive" in text
    assert "dpo-r16, dpo-r8: unknown key 'gama'" in text
    assert "/tmp/" not in text.replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"axes": {"objective": {"simpo": SIMPO, "dpo": {**DPO, "max_length": 128}}}},
            "differ in tokens (max_length: 160 and 128)",
        ),
        (
            {"axes": {"objective": {"simpo": SIMPO, "dpo": {**DPO, "per_device_train_batch_size": 4}}}},
            "differ in batches (rows a step: 8 and 4)",
        ),
        ({"axes": {"objective": {"simpo": SIMPO, "dpo": {**DPO, "max_steps": 9}}}}, "differ in steps (max_steps: -1 and 9)"),
        ({"axes": {"objective": {"simpo": SIMPO, "dpo": {**DPO, "seed": 9}}}}, "differ in the order of rows (seed: 42 and 9)"),
        ({"axes": {"objective": {"simpo": SIMPO, "dpo": {**DPO, "train_probe": 9}}}}, "differ in what is evaluated"),
        ({"fallback": {"orpo": {**ORPO, "num_train_epochs": 1}}}, "differ in steps (num_train_epochs: 3.0 and 1"),
        ({"axes": {"objective": {"simpo": SIMPO, "sft": {"method": "sft"}}}}, "a row: 'chosen, rejected' and 'messages'"),
    ],
)  # fmt: skip
def test_a_difference_that_no_axis_asks_for_is_refused(keys, problem, tmp_path):
    assert problem in refusal(tmp_path, **keys)


@pytest.mark.parametrize(
    "axis",
    [
        {"batch": {"b8": {"total_train_batch_size": 8}, "b16": {"total_train_batch_size": 16}}},
        {"batch": {"b8": {"per_device_train_batch_size": 8}, "b16": {"gradient_accumulation_steps": 2}}},
        {"length": {"short": {"max_length": 128}, "long": {"max_length": 160}}},
        {"steps": {"few": {"max_steps": 5}, "many": {"num_train_epochs": 2}}},
        {"max_prompt_length": [60, 80]},
    ],
)
def test_a_difference_that_every_value_of_an_axis_asks_for_is_meant(axis, tmp_path):
    assert check(tmp_path, axes={"objective": AXES["objective"], **axis}) is not None


def test_batches_are_compared_by_what_a_step_takes_on_all_processes(tmp_path):
    halves = {**BASE, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    two = {"accelerate_config": "accelerate_configs/cpu.yaml"}  # processes
    check(tmp_path, recipe=halves, axes={"objective": {"simpo": SIMPO, "dpo": {**DPO, "total_train_batch_size": 8}}})
    axes = {"objective": {"simpo": SIMPO, "dpo": {**DPO, "total_train_batch_size": 16}}}
    check(tmp_path, recipe=halves, axes=axes, launch=two)
    axes = {"objective": {"simpo": SIMPO, "dpo": {**DPO, "total_train_batch_size": 24, "per_device_train_batch_size": 8}}}
    text = refusal(tmp_path, recipe=halves, axes=axes, launch=two)
    assert "rows a step: 16 and 24" in text
    assert "dpo: total_train_batch_size = 24: is no multiple of 16 (per_device_train_batch_size x 2 processes)" in text


def test_cells_that_are_the_same_run_are_refused(tmp_path):
    base = {**BASE, "total_train_batch_size": 8}
    axes = {"acc": {"a": {"gradient_accumulation_steps": 2}, "b": {"gradient_accumulation_steps": 4}}}
    text = refusal(tmp_path, recipe=base, axes=axes, method="simpo")
    assert "a and b are the same run: what tells them apart has no effect" in text


def test_no_cell_pushes_to_the_hub_or_goes_without_held_out_rows(tmp_path):
    text = refusal(tmp_path, recipe={**BASE, "push_to_hub": True, "do_eval": False})
    assert "all cells: push_to_hub = True: no cell is pushed" in text
    assert "all cells: do_eval = False: cells are compared by their held-out rows" in text


def test_a_cell_that_was_run_by_another_recipe_is_refused_with_what_differs(tmp_path):
    cell = cells_of(tmp_path)["simpo-r8-s42"]
    break_down(cell, "finished", rows_per_step=16)
    (cell.run / "recipe.yaml").write_text(yaml.safe_dump({**cell.recipe, "beta": 9.0, "logging_steps": 3}))
    text = refusal(tmp_path)
    assert f"{cell.folder} holds a run of another recipe (beta: 9.0 then, 2.5 now;  rows a step: 16 then, 8 now)" in text


def test_a_machine_without_gpus_is_not_asked_what_its_cluster_can_compute(tmp_path):
    base = {**BASE, "use_cpu": None, "bf16": True}
    if not torch.cuda.is_available():
        assert "all cells: bf16 = True: no GPU that computes in bf16" in refusal(tmp_path, recipe=base)
    check(tmp_path, recipe=base, launch=LAUNCH_ON_SLURM)


@pytest.mark.parametrize("path", sorted((ROOT / "training_configs/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_matrix_can_be_run(path, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "parse", lambda text, method, **_: PARSE(text, method, on_this_machine=False))
    monkeypatch.chdir(ROOT)
    matrix = read_matrix(str(path.relative_to(ROOT)))
    refuse_unknown_methods(matrix, METHODS)
    cells = make_cells(matrix, METHODS)
    check_cells(matrix, cells, {cell.name: recipe_text(cell, "run it", path.stem) for cell in cells}, METHODS)
    first = path.read_text().splitlines()[0]
    assert first in (f"# python scripts/run_ablation.py training_configs/ablations/{path.name}", "# make ablation")
