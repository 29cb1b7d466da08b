"""Speed is counted in distinct tokens over the seconds of steps, on all processes."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from alignment.preference.collate import TokenCounts
from alignment.preference.throughput import Throughput, dense_flops
from tests.builders import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The times that the clock will tell, in order."""
    times: list[float] = []
    monkeypatch.setattr("alignment.preference.throughput.time.perf_counter", lambda: times.pop(0))
    return times


def test_tokens_per_second_are_distinct_tokens_over_the_seconds_within_steps(clock):
    clock += [0.0, 10.0, 12.0, 100.0, 103.0]  # made; a step of 2 s; 88 s of something else; a step of 3 s
    throughput = Throughput((200.0, 50.0), CPU, is_packed=True)
    for counts in (
        TokenCounts(distinct=60, padded=100, scored=40, chosen=20, whole_chosen=20, pairs=2),
        TokenCounts(distinct=40, padded=100, scored=30, chosen=10, whole_chosen=10, pairs=1),
    ):
        throughput.start_step()
        throughput.counts.append(counts)
        throughput.end_step()
    figures = throughput.flush(Accelerator(cpu=True))
    assert figures["tokens_per_second"] == pytest.approx(100 / 5)
    assert figures["tokens_saved"] == pytest.approx(1 - 100 / 200)
    assert figures["peak_memory_gb"] > 0
    assert "mfu" not in figures  # nobody knows the peak of this processor
    assert throughput.flush(Accelerator(cpu=True)) == {}


def test_padded_batches_save_nothing(clock):
    clock += [0.0, 0.0, 1.0]
    throughput = Throughput(None, CPU, is_packed=False)
    throughput.start_step()
    throughput.counts.append(TokenCounts(distinct=60, padded=100, scored=40, chosen=20, whole_chosen=20, pairs=2))
    throughput.end_step()
    figures = throughput.flush(Accelerator(cpu=True))
    assert figures["tokens_per_second"] == 60
    assert "tokens_saved" not in figures


def test_utilization_is_the_work_of_distinct_and_scored_tokens_over_the_device_s_peak(clock):
    clock += [0.0, 0.0, 2.0]
    throughput = Throughput((200.0, 50.0), CPU, is_packed=True)
    throughput.peak_flops = 1e6
    throughput.start_step()
    throughput.counts.append(TokenCounts(distinct=10, padded=20, scored=4, chosen=2, whole_chosen=2, pairs=1))
    throughput.end_step()
    body, head = throughput.step_flops
    assert throughput.flush(Accelerator(cpu=True))["mfu"] == pytest.approx((10 * body + 4 * head) / 2 / 1e6)


@pytest.mark.parametrize(("share", "passes"), [(1.0, 3), (0.0, 2)], ids=["whole model", "frozen model"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "phi"])
def test_a_step_costs_two_operations_a_weight_and_pass(kind, share, passes):
    """Each weight of a matrix is one multiplication and one addition per token: forward, and once or twice backward."""
    model = tiny_model(kind)
    body, head = dense_flops(model, share)
    tables = ("embed_tokens", "wte", "wpe", "lm_head")
    layers = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not any(table in name for table in tables)
    )
    assert body == pytest.approx(passes * 2 * layers)
    assert head == pytest.approx(passes * 2 * model.get_output_embeddings().weight.numel())


def test_an_adapters_own_weights_count_and_a_layer_that_it_replaces_does_not():
    model, plain = tiny_model(), tiny_model()
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"]))
    (body, head), (plain_body, plain_head) = dense_flops(model, 1.0), dense_flops(plain, 1.0)
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert (body, head) == (plain_body + 6 * adapter, plain_head)


@pytest.mark.parametrize("kind", ["mixtral"])
def test_nothing_is_said_of_a_model_that_uses_some_of_its_weights_for_a_token(kind):
    assert dense_flops(tiny_model(kind), 1.0) is None
