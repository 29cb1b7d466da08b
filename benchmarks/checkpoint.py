"""What a verified checkpoint costs: ours against the Trainer's own, and verifying against loading.

    python benchmarks/checkpoint.py [--hidden N --layers N --vocab N] [--folder DIR] [--repeats N]

One model with its AdamW state, in float32, is saved by all contenders, in turns; what is printed are medians of seconds
over the repeats, with the smallest and the largest. The Trainer leaves its files to the system's cache, so the second
contender is the Trainer with the same fsync calls as ours: from the first to the second is the disk's share, from the
second to the third that of staging, hashing and renaming. A resume begins with files that are not in memory, where the
file system can be told so (Linux, not tmpfs).
"""

import argparse
import copy
import importlib.metadata
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from alignment.launch.opening import opening

with opening():
    import transformers
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from alignment.launch.strategy import WHOLE_COPY
    from alignment.run.checkpoints import Identity, digest_of, size, sync, verify
    from benchmarks.tokenization import machine, ratio
    from scripts.simpo_config import SimPOConfig
    from scripts.simpo_trainer import SimPOTrainer
    from tests import builders


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ours = trained(args, Path(folder, "ours"))
        theirs = plain_twin(ours, Path(folder, "theirs"))
        saves = take_turns(
            {
                "Trainer": lambda: save(theirs),
                "Trainer, then fsync": lambda: sync_all(save(theirs)),
                "ours": lambda: save(ours),
            },
            before=lambda: forget_saves(ours, theirs),
            repeats=args.repeats,
        )
        checkpoint = save(ours)
        resumes = take_turns(
            {"load": lambda: load(theirs, checkpoint), "verify, then load": lambda: load(theirs, verify(checkpoint).path)},
            before=lambda: drop_from_memory(checkpoint),
            repeats=args.repeats,
        )
        hashing = take_turns(
            {"largest file": lambda: digest_of(largest(checkpoint)), "all files": lambda: verify(checkpoint)},
            before=lambda: None,
            repeats=args.repeats,
        )
        report(args, ours, checkpoint, saves, resumes, hashing)


def report(
    args: argparse.Namespace,
    trainer: Trainer,
    checkpoint: Path,
    saves: dict[str, list[float]],
    resumes: dict[str, list[float]],
    hashing: dict[str, list[float]],
) -> None:
    files = sum(path.is_file() for path in checkpoint.rglob("*"))
    print(
        f"{trainer.model.num_parameters() / 1e6:,.0f}M parameters with AdamW state, float32: {size(checkpoint) / 1e9:.2f} GB "
        f"in {files} files; {args.repeats} repeats in {Path(args.folder or tempfile.gettempdir()).resolve()}"
    )
    for name, seconds in saves.items():
        print(f"save    {name:22}{spread(seconds)}")
    for name in ("Trainer", "Trainer, then fsync"):
        print(f"        ours / {name}: {ratio(saves['ours'], saves[name])}")
    for name, seconds in resumes.items():
        print(f"resume  {name:22}{spread(seconds)}")
    print(f"        verify, then load / load: {ratio(resumes['verify, then load'], resumes['load'])}")
    for (name, seconds), count in zip(hashing.items(), (largest(checkpoint).stat().st_size, size(checkpoint)), strict=True):
        print(f"SHA-256 {name:22}{spread(seconds)}, {count / 1e9 / statistics.median(seconds):.2f} GB/s, from memory")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "accelerate", "safetensors"))
    print(f"{machine()}, {versions}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in {"hidden": 512, "layers": 12, "vocab": 32000}.items():
        parser.add_argument(f"--{name}", type=int, default=count, help="of the Llama-like model (default: %(default)s)")
    parser.add_argument("--folder", help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each (default: %(default)s)")
    return parser.parse_args()


# ---- Contenders ----


def trained(args: argparse.Namespace, folder: Path) -> SimPOTrainer:
    """After one step, so that there is an optimizer state to save."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=args.vocab,
    )
    settings: dict[str, Any] = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings |= {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", "save_total_limit": None}
    trainer = SimPOTrainer(
        model=LlamaForCausalLM(config),
        args=SimPOConfig(**settings),
        train_dataset=Dataset.from_list(builders.token_rows([(4, 4, 4)])),
        processing_class=builders.bpe_tokenizer(),
    )
    trainer.train()
    trainer.identity = Identity("benchmark", "beta: 2.0\n", "none", WHOLE_COPY, processes=1, rows_per_step=1)
    return trainer


def plain_twin(trainer: Trainer, folder: Path) -> Trainer:
    """transformers' own Trainer over the same model, optimizer and scheduler, one step on."""
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True)
    twin = Trainer(trainer.model, args, processing_class=trainer.processing_class)
    twin.optimizer, twin.lr_scheduler = trainer.optimizer, trainer.lr_scheduler
    twin.state = copy.deepcopy(trainer.state)
    return twin


def save(trainer: Trainer) -> Path:
    trainer._save_checkpoint(trainer.model, trial=None)
    return Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")


def sync_all(checkpoint: Path) -> None:
    for path in (*checkpoint.rglob("*"), checkpoint, checkpoint.parent):
        sync(path)


def load(trainer: Trainer, checkpoint: Path) -> None:
    """What the Trainer loads when it resumes."""
    trainer._load_from_checkpoint(str(checkpoint))
    trainer._load_optimizer_and_scheduler(str(checkpoint))
    trainer._load_rng_state(str(checkpoint))


# ---- Measuring ----


def take_turns(contenders: dict[str, Callable[[], Any]], before: Callable[[], None], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, by contender, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            before()
            start = time.perf_counter()
            contender()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def forget_saves(*trainers: Trainer) -> None:
    """So that every save is the first, and none pays for what the one before left to be written."""
    for trainer in trainers:
        trainer.saved_step = -1  # ours does not save a step twice
        for path in Path(trainer.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(path)
    os.sync()


def drop_from_memory(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def largest(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
