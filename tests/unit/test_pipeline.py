"""What tells one run from another: its data's fingerprint, and the folder that holds its end."""

import itertools
import random
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, concatenate_datasets, load_dataset

from alignment.data.splits import fingerprint
from alignment.errors import UserError
from alignment.pipeline import is_finished, refuse_other_end, refuse_restart_of_a_stop, where_to_begin
from alignment.recipe.configs import DataArguments, ModelArguments, Run
from alignment.run.run_folder import write_status
from alignment.run.signals import RunInterrupted
from scripts.simpo_config import SimPOConfig
from tests.builders import token_rows

COUNT = 1013  # a prime above the 1000 rows that are read at a time: no cut of it falls on a whole byte of bits
LENGTHS = random.Random(0)
ROWS = [
    {**row, "truncated": LENGTHS.random() < 0.5, "eos_added": LENGTHS.random() < 0.5}
    for row in token_rows([(LENGTHS.randint(1, 9), LENGTHS.randint(1, 9), LENGTHS.randint(1, 9)) for _ in range(COUNT)])
]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.from_list(ROWS)


@pytest.fixture(scope="module")
def digest(dataset) -> str:
    return fingerprint(dataset)


def order(seed: int) -> list[int]:
    return random.Random(seed).sample(range(COUNT), COUNT)


def through_jsonl(dataset: Dataset, folder: Path) -> Dataset:
    dataset.to_json(folder / "rows.jsonl")
    return load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder))


def through_parquet(dataset: Dataset, folder: Path) -> Dataset:
    dataset.to_parquet(folder / "rows.parquet", batch_size=100)
    return Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder))


def through_disk(dataset: Dataset, folder: Path) -> Dataset:
    dataset.save_to_disk(folder / "rows", num_shards=3)
    return Dataset.load_from_disk(folder / "rows")


def start_of_more(dataset: Dataset, folder: Path) -> Dataset:
    return concatenate_datasets([dataset, dataset]).select(range(COUNT))


def start_of_one_table(dataset: Dataset, folder: Path) -> Dataset:
    return Dataset.from_list([*ROWS, *ROWS]).select(range(COUNT))


def end_of_more(dataset: Dataset, folder: Path) -> Dataset:
    return Dataset.from_list([*ROWS[:3], *ROWS]).select(range(3, COUNT + 3))


def by_indices(dataset: Dataset, folder: Path) -> Dataset:
    return dataset.select(list(range(COUNT)))


def shuffled_and_back(dataset: Dataset, folder: Path) -> Dataset:
    there = order(seed=1)
    back = sorted(range(COUNT), key=there.__getitem__)
    return dataset.select(there).select(back)


def of_slices(dataset: Dataset, folder: Path) -> Dataset:
    cuts = [0, 5, 13, 500, 1001, COUNT]
    return concatenate_datasets([dataset.select(range(*cut)) for cut in itertools.pairwise(cuts)])


def flattened(dataset: Dataset, folder: Path) -> Dataset:
    return dataset.select(list(range(COUNT))).flatten_indices()


def formatted(dataset: Dataset, folder: Path) -> Dataset:
    return dataset.with_format("torch")


def mapped(dataset: Dataset, folder: Path) -> Dataset:
    return dataset.map(lambda row: row, cache_file_name=str(folder / "rows.arrow"), writer_batch_size=7)


@pytest.mark.parametrize(
    "route",
    [
        through_jsonl, through_parquet, through_disk, start_of_more, start_of_one_table, end_of_more, by_indices,
        shuffled_and_back, of_slices, flattened, formatted, mapped,
    ],
)  # fmt: skip
def test_the_same_rows_have_the_same_digest_whichever_way_they_came(dataset, digest, route, tmp_path):
    arrived = route(dataset, tmp_path)
    assert arrived.with_format(None)[:] == dataset[:]
    assert fingerprint(arrived) == digest


@pytest.mark.parametrize("row", [0, 500, 999, 1000, COUNT - 1])
@pytest.mark.parametrize("key", ["chosen_input_ids", "rejected_input_ids", "truncated", "index"])
def test_one_changed_value_changes_the_digest(digest, row, key):
    value = ROWS[row][key]
    changed = [*value[:-1], value[-1] ^ 1] if isinstance(value, list) else type(value)(value ^ 1)
    rows = [*ROWS[:row], {**ROWS[row], key: changed}, *ROWS[row + 1 :]]
    assert fingerprint(Dataset.from_list(rows)) != digest


def test_another_order_changes_the_digest(dataset, digest):
    swapped = [1, 0, *range(2, COUNT)]
    assert fingerprint(dataset.select(swapped)) != digest
    assert fingerprint(dataset.select(order(seed=2))) != digest


def test_a_row_more_or_less_changes_the_digest(dataset, digest):
    assert fingerprint(dataset.select(range(COUNT - 1))) != digest
    assert fingerprint(concatenate_datasets([dataset, dataset.select([0])])) != digest


def test_a_token_that_moves_from_one_row_to_the_next_changes_the_digest():
    one, other = ([{"ids": [1, 2]}, {"ids": [3]}], [{"ids": [1]}, {"ids": [2, 3]}])
    assert fingerprint(Dataset.from_list(one)) != fingerprint(Dataset.from_list(other))


def test_a_value_that_moves_from_one_column_to_another_changes_the_digest():
    one, other = ([{"a": 1, "b": 2}], [{"a": 2, "b": 1}])
    assert fingerprint(Dataset.from_list(one)) != fingerprint(Dataset.from_list(other))


# ---- The end of a run ----


@pytest.fixture
def finished(tmp_path) -> Run:
    """A run whose folder holds its end."""
    config = SimPOConfig(output_dir=str(tmp_path), use_cpu=True)
    run = Run(ModelArguments(), DataArguments(), config, yaml.safe_dump({"beta": 2.0, "logging_steps": 5}))
    (tmp_path / "_run").mkdir()
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "recipe.yaml").write_text(run.recipe)
    write_status(tmp_path, "finished", step=8, data="same", processes=1, rows_per_step=run.rows_per_step)
    return run


def test_a_finished_run_is_known_by_its_recipe_and_data(finished):
    assert is_finished(finished)
    refuse_other_end(finished, "same")
    refuse_other_end(finished._replace(recipe=yaml.safe_dump({"beta": 2.0, "logging_steps": 1})), "same")


def test_the_end_of_another_run_is_not_overwritten(finished):
    with pytest.raises(UserError, match="was made with other data"):
        refuse_other_end(finished, "changed")
    with pytest.raises(UserError, match=r"beta: 2\.0 then, 10\.0 now"):
        refuse_other_end(finished._replace(recipe=yaml.safe_dump({"beta": 10.0})), "same")


@pytest.mark.parametrize("state", ["preparing", "training", "ending", "interrupted", "failed"])
def test_a_run_is_not_finished_before_it_says_so(finished, state):
    write_status(finished.output_dir, state, step=8)
    assert not is_finished(finished)


def test_a_run_whose_weights_were_deleted_is_not_finished(finished):
    (finished.output_dir / "model.safetensors").unlink()
    assert not is_finished(finished)


def test_a_finished_run_needs_no_checkpoint_that_it_could_go_on_from(finished):
    (finished.output_dir / "checkpoint-8").mkdir()
    assert where_to_begin(finished) == (True, None)
    write_status(finished.output_dir, "ending", step=8)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be resumed"):
        where_to_begin(finished)


def test_a_launcher_does_not_restart_what_was_stopped_and_a_new_start_does(finished):
    write_status(finished.output_dir, "interrupted", reason="stopped by SIGUSR1 after step 4")
    with pytest.raises(RunInterrupted, match="stopped by SIGUSR1 after step 4"):
        refuse_restart_of_a_stop(finished.output_dir, restarts=1)
    refuse_restart_of_a_stop(finished.output_dir, restarts=0)
    refuse_restart_of_a_stop(finished.output_dir, restarts=1)  # of the new start, which failed


@pytest.mark.parametrize("choice", ["never", "false"])
def test_a_finished_run_can_be_started_afresh(finished, choice):
    finished.training_args.resume_from_checkpoint = choice
    assert not is_finished(finished)
