"""Means over what was seen, however it was portioned."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from alignment.preference.metrics import RunningMeans


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


class TwoProcesses:
    """Stands for the accelerator of a process beside one that has seen `others`: (sum, count) of each name."""

    def __init__(self, *others: tuple[float, float]):
        self.others = torch.tensor(others, dtype=torch.float64)

    def reduce(self, totals: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return totals + self.others


def test_the_mean_over_unequal_batches_is_the_mean_over_all(accelerator):
    values = torch.arange(10.0) ** 2
    means = RunningMeans()
    for batch in values.split([1, 6, 3]):
        means.add("x", batch.sum(), len(batch))
    assert means.flush(accelerator) == {"x": values.mean().item()}


def test_each_name_has_its_own_count_which_may_be_a_tensor(accelerator):
    means = RunningMeans()
    means.add("x", torch.tensor(6.0), 3)
    means.add("y", torch.tensor(6.0), torch.tensor(4))
    means.add("x", torch.tensor(2.0), 1)
    assert means.flush(accelerator) == {"x": 2.0, "y": 1.5}


def test_a_flush_starts_anew(accelerator):
    means = RunningMeans()
    means.add("x", torch.tensor(100.0), 1)
    means.flush(accelerator)
    assert means.flush(accelerator) == {}
    means.add("y", torch.tensor(3.0), 2)
    assert means.flush(accelerator) == {"y": 1.5}


def test_processes_are_weighed_by_what_they_have_seen():
    """One value of 10 here, three that sum to 2 there: 12 / 4, and not the mean of 10 and 2/3."""
    means = RunningMeans()
    means.add("x", torch.tensor(10.0), 1)
    assert means.flush(TwoProcesses((2.0, 3.0))) == {"x": 3.0}


def test_small_values_survive_beside_a_large_sum(accelerator):
    """In float32 16,777,216 + 1 is 16,777,216."""
    means = RunningMeans()
    means.add("x", torch.tensor(2.0**24), 1)
    for _ in range(3):
        means.add("x", torch.tensor(1.0), 1)
    assert means.flush(accelerator)["x"] == (2**24 + 3) / 4


def test_what_is_added_holds_no_graph(accelerator):
    loss = torch.ones(2, requires_grad=True).sum()
    means = RunningMeans()
    means.add("x", loss, 2)
    assert means.flush(accelerator) == {"x": 1.0}
    assert not any(total.requires_grad for total in means._totals.values())


def thirds(count: int, seed: int) -> list[torch.Tensor]:
    """Numbers whose sum no decimal of a few digits writes down."""
    return list(torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 3)


def test_sums_that_went_through_a_file_go_on_bit_for_bit(accelerator):
    unbroken, before, after = RunningMeans(), RunningMeans(), RunningMeans()
    for value in thirds(50, seed=0):
        for means in (unbroken, before):
            means.add("x", value, 3)
            means.add("y", value * 1e-300, torch.tensor(7))
    after.restore(json.loads(json.dumps(before.state())), torch.device("cpu"))
    for value in thirds(50, seed=1):
        for means in (unbroken, after):
            means.add("x", value, 3)
            means.add("y", value * 1e-300, torch.tensor(7))
    assert after.state() == unbroken.state()
    assert after.flush(accelerator) == unbroken.flush(accelerator)


def test_looking_at_the_sums_leaves_them_there(accelerator):
    means = RunningMeans()
    means.add("x", torch.tensor(6.0), 4)
    assert means.state() == means.state() == {"x": [(6.0).hex(), (4.0).hex()]}
    assert means.flush(accelerator) == {"x": 1.5}
    assert means.state() == {}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_sum_that_is_not_finite_is_restored_as_it_was(accelerator, value):
    before, after = RunningMeans(), RunningMeans()
    before.add("x", torch.tensor(value), 1)
    after.restore(json.loads(json.dumps(before.state())), torch.device("cpu"))
    assert after.flush(accelerator)["x"] == pytest.approx(value, nan_ok=True)


def test_names_are_restored_in_their_order_because_processes_add_up_by_position():
    before, after = RunningMeans(), RunningMeans()
    for name in ("z", "a", "m"):
        before.add(name, torch.tensor(1.0), 1)
    after.restore(json.loads(json.dumps(before.state())), torch.device("cpu"))
    assert list(after.state()) == ["z", "a", "m"]
