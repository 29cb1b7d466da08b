"""The log of a run, where it cannot be written."""

import resource
from types import SimpleNamespace

import pytest

from alignment.run.records import RunRecords
from tests.workspaces import read_jsonl


@pytest.fixture
def small_disk():
    """No file can grow beyond 200 bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_costs_records_and_one_warning_and_leaves_whole_lines(tmp_path, caplog):
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, log_history=[])
    records = RunRecords()
    records.on_train_begin(args, state, None)
    for state.global_step in range(1, 20):
        records.on_log(args, state, None, logs={"loss": 0.123456789})
    written = read_jsonl(tmp_path / "metrics.jsonl")
    assert 3 < len(written) < 19
    assert written == [{"step": step, "loss": 0.123456789} for step in range(1, len(written) + 1)]
    assert len(caplog.messages) == 1
    assert "metrics.jsonl cannot be written (File too large) and lacks records from here on." in caplog.messages[0]
