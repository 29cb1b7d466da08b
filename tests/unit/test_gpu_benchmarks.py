"""Benchmarks are fair: what this suite sets for itself, its peers do not get."""

import argparse
import json
import sys

import pytest
import torch

from benchmarks import gpu_proof, step_table, train_step

TINY = (
    "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --intermediate 128 --vocab 600 --micro-batches 1 --response-tokens 20 "
    "--contenders packed published trl"
)


@pytest.fixture
def benchmark(monkeypatch, tmp_path, tokenizer):
    """Arguments, model and contenders of a small one; torch may choose cuDNN's attention, as it comes."""
    monkeypatch.setattr(sys, "argv", ["train_step.py", *TINY.split(), f"--json={tmp_path / 'figures.json'}"])
    args = train_step.parse_arguments()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    model, rows = train_step.build_model(args), train_step.load_rows(args, tokenizer)
    yield args, model, [train_step.enter(name, model, rows, tokenizer, str(tmp_path), args) for name in args.contenders]
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_peers_are_timed_with_the_attention_kernels_that_torch_has_and_this_suite_without_cudnns(benchmark):
    _, model, contenders = benchmark
    seen = {}
    for contender in [*contenders, *reversed(contenders)]:

        def loss(rows, contender=contender):
            seen.setdefault(contender.name, set()).add(torch.backends.cuda.cudnn_sdp_enabled())
            return contender.loss(rows)

        train_step.train(model, contender._replace(loss=loss))
    assert seen == {"packed": {False}, "published": {True}, "trl": {True}}


def test_what_was_measured_before_a_benchmark_is_stopped_is_in_its_file(benchmark, capsys):
    args, model, contenders = benchmark
    table = step_table.Table(args, model, contenders[0].micro_batches[0])
    table.add("published", step_table.Measured(seconds=[2.0, 4.0]))
    assert "published     1.5000 (1.0000 to 2.0000)" in capsys.readouterr().out
    first = args.json.read_text()
    table.add("packed", step_table.Measured(seconds=[1.0, 1.0], micro_batch=step_table.MicroBatch(20.0, 15.0, 300)))
    assert '"published / it": 1.0' in first
    assert '"contender": "packed"' not in first
    figures = args.json.read_text()
    assert '"published / it": 3.0' in figures
    assert '"launches": 300' in figures
    assert "20.0 ms, of which 15.0 in 300 kernels" in capsys.readouterr().out


def test_the_proof_of_a_gpu_ends_in_its_time_keeps_what_a_stopped_section_had_and_names_what_it_left_out(
    tmp_path, monkeypatch, capsys
):
    endless = "import time; print('begun', flush=True); time.sleep(600)"
    monkeypatch.setattr(
        gpu_proof,
        "sections",
        lambda args: [gpu_proof.Section("endless", ["-c", endless], 500), gpu_proof.Section("next", ["-c", ""], 500)],
    )
    monkeypatch.setattr(gpu_proof, "WHOLE", 3)
    monkeypatch.setattr(gpu_proof, "SHORTEST", 1)
    monkeypatch.setattr(sys, "argv", ["gpu_proof.py", "--cpu", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        gpu_proof.main()
    assert ended.value.code == 1
    (stopped,) = json.loads((tmp_path / "proof.json").read_text())
    assert (stopped["status"], stopped["output"]) == (None, "begun")
    assert stopped["seconds"] == pytest.approx(3, abs=1)
    page = (tmp_path / "proof.md").read_text()
    assert "| endless | stopped at its time limit |" in page
    assert "| next | no time left | 0 |" in page
    assert "next: no time left" in capsys.readouterr().out


def test_the_sections_of_a_gpu_are_commands_that_their_scripts_accept(monkeypatch):
    args = argparse.Namespace(cpu=False, data=None, tokenizer=None)
    names = []
    for section in gpu_proof.sections(args):
        if section.command[0] in gpu_proof.WITH_FIGURES:
            names.append(section.name)
            split = section.command.index("--") if "--" in section.command else None
            monkeypatch.setattr(sys, "argv", [*section.command[:split], "--json=figures.json"])
            train_step.parse_arguments()  # exits where it is not
    assert len(names) == 8


def test_on_a_gpu_what_is_measured_before_another_contender_fails_is_kept(benchmark, monkeypatch):
    args, model, contenders = benchmark
    args.device, args.repeats, args.profile = "cuda", 1, True
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    table = step_table.Table(args, model, train_step.load_rows(args, None))

    def fails(rows):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        train_step.take_turns(model, [contenders[0], contenders[1]._replace(loss=fails)], args, table)
    (kept,) = json.loads(args.json.read_text())
    assert kept["contender"] == "packed"
    assert kept["seconds_per_pair"] > 0
    assert kept["wall_ms"] > 0
