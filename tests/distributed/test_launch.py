"""Launches that are not what was asked for, that hang, that spread over machines."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import ROOT, environment, launcher_config, records

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def run_simpo(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=120)


def test_fsdp_on_a_cpu_stops_where_accelerate_would_train_with_ddp(recipe, tmp_path):
    launch = [*ACCELERATE, "--config_file", launcher_config("fsdp2.yaml", tmp_path), "--main_process_port=0"]
    done = run_simpo([*launch, "scripts/run_simpo.py", str(recipe), f"--output_dir={tmp_path / 'run'}"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("\nerror: the launcher asks for fsdp2 and the run would silently be ddp") == 1
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_starts_one_process_of_two_is_caught(recipe, tmp_path):
    launch = [*ACCELERATE, "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    done = run_simpo([*launch, "scripts/run_simpo.py", str(recipe), f"--output_dir={tmp_path / 'run'}"], tmp_path)
    assert done.returncode != 0
    assert "error: the launcher's num_processes = 2: 1 started" in done.stderr
    assert not (tmp_path / "run").exists()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_a_process_that_stands_still_ends_the_run_after_the_timeout(recipe, tmp_path):
    options = [f"--output_dir={tmp_path / 'run'}", "--ddp_timeout=5", "--max_steps=4", "--num_train_epochs=4"]
    jobs = {"hanging": {"argv": [str(recipe), *options], "sabotage": "stopped in training"}}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    shared = environment(tmp_path, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    command = [sys.executable, "-m", "tests.distributed.worker", str(tmp_path / "jobs.json")]
    with (tmp_path / "log").open("w") as log:
        processes = [
            subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stdout=log, stderr=log)
            for rank in ("0", "1")
        ]
    try:
        wait_until_stopped(processes[1].pid)
        began = time.monotonic()
        assert processes[0].wait(timeout=40) != 0
        assert 3 < time.monotonic() - began < 30
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "Timed out waiting 5000ms" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run/model.safetensors").exists()


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 90
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "the second process never came to its second step"
        time.sleep(0.1)


# ---- Several machines ----

# Two "machines" here, the second when the first one listens: on one host either could open the port. USR1 comes as soon
# as the launchers run, and before the workers listen for it. As srun with --kill-on-bad-exit, one that fails ends the other.
SRUN = r"""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    launchers+=($!)
    until (: < "/dev/tcp/127.0.0.1/$MAIN_PROCESS_PORT") 2> /dev/null || ! kill -0 "${launchers[0]}"; do sleep 0.05; done
done
for launcher in "${launchers[@]}"; do
    until tr '\0' ' ' < "/proc/$launcher/cmdline" | grep -q 'bin/accelerate launch'; do sleep 0.05; done
done
kill -USR1 "${launchers[@]}"
for launcher in "${launchers[@]}"; do
    wait -n || { status=$?; kill "${launchers[@]}"; wait; exit $status; }
done
"""
SCONTROL = "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.1\\n'\n"


def test_the_slurm_script_joins_two_machines_and_its_launchers_outlive_the_warning(recipe, tmp_path, one_process):
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    # MULTI_GPU is what accelerate calls DDP, on CPUs too.
    config = launcher_config(
        "multi_node.yaml", tmp_path, num_processes=8, num_machines=2, distributed_type="MULTI_GPU", fsdp_config={}
    )
    slurm = {"SLURM_JOB_NODELIST": "two", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1"}
    variables = environment(tmp_path, **slurm, CONFIG=config, MAIN_PROCESS_PORT=free_port(), MAX_RESTARTS="1")
    variables["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{variables['PATH']}"
    options = [f"--output_dir={tmp_path / 'run'}", "--pair_layout=packed", "--strategy=ddp", "--num_processes=2"]
    done = subprocess.run(
        ["bash", "accelerate_configs/multi_node.slurm", "scripts/run_simpo.py", str(recipe), *options],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    ours, theirs = records(one_process("--pair_layout=packed"), "loss"), records(tmp_path / "run", "loss")
    assert [record["loss"] for record in theirs] == pytest.approx([record["loss"] for record in ours], rel=1e-5)


def test_slurm_warns_the_workers_two_minutes_before_the_end():
    script = (ROOT / "accelerate_configs/multi_node.slurm").read_text()
    assert "#SBATCH --signal=USR1@120" in script
    assert signal.SIGUSR1.name == "SIGUSR1"
