"""The measured side of benchmarks/memory.py for strategies that need two processes: real ones, over gloo, on a CPU.

`measure` starts them; each runs this file.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import nn

from alignment.model.layers import recompute_first
from alignment.preference.collate import Batch
from alignment.preference.fake_step import Ledger, batch_of, build, micro_batch
from alignment.preference.memory import Plan

PROCESSES = 2
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Job:
    """A step to measure, of so many pairs in each micro-batch."""

    plan: Plan
    pairs: int
    recompute_layers: int


def measure(jobs: list[Job]) -> list[int]:
    """Bytes at the highest point of each job's second step, on the process that holds the most."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "jobs").write_bytes(pickle.dumps(jobs))
        # ninja, which DeepSpeed compiles with, is beside the interpreter.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        shared = {"WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, folder],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(PROCESSES)
        ]
        if any(process.wait() for process in processes):
            raise SystemExit("a process of the measurement failed; see above")
        ranks = [pickle.loads((Path(folder) / f"bytes-{rank}").read_bytes()) for rank in range(PROCESSES)]
        return [max(peaks) for peaks in zip(*ranks, strict=True)]


def work(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    peaks = [peak_of(job) for job in pickle.loads((folder / "jobs").read_bytes())]
    (folder / f"bytes-{rank}").write_bytes(pickle.dumps(peaks))
    dist.barrier()
    dist.destroy_process_group()


def peak_of(job: Job) -> int:
    plan = job.plan
    with Ledger() as ledger:
        model = build(plan, plan.config.num_hidden_layers)
        recompute_first(model, job.recompute_layers)
        batch = batch_of(plan, plan.pair, job.pairs)
        step = zero_step(model, plan) if plan.strategy.startswith("zero") else ddp_step(model)
        step(batch, plan)
        ledger.highest = ledger.now
        step(batch, plan)
        return ledger.highest


def ddp_step(model: nn.Module) -> Any:
    """A step as accelerate takes it: gradients are reduced with the last micro-batch."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step(batch: Batch, plan: Plan) -> None:
        for number in range(MICRO_BATCHES):
            with nullcontext() if number == MICRO_BATCHES - 1 else wrapped.no_sync():
                micro_batch(wrapped, batch, plan)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def zero_step(model: nn.Module, plan: Plan) -> Any:
    """A step of DeepSpeed's engine, set as accelerate_configs sets it but for the sizes of its buffers."""
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": plan.compute_dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": int(plan.strategy[-1]),
            "reduce_bucket_size": plan.zero_bucket,
            "stage3_max_live_parameters": plan.zero_live,
            "stage3_param_persistence_threshold": 0,  # every matrix of a small model would be below the default
        },
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained), config=config
    )

    def step(batch: Batch, plan: Plan) -> None:
        for _ in range(MICRO_BATCHES):
            micro_batch(engine, batch, plan, backward=engine.backward)
            engine.step()

    return step


if __name__ == "__main__":
    work(Path(sys.argv[1]))
