"""Whole optimizer steps by the trainer itself, as a recipe has them: 32 pairs a step and device, 2 a micro-batch, bf16.

    python benchmarks/whole_steps.py [--device cuda] [the model and the pairs as of train_step.py] -- [--key=value ...]

Random weights. Prints what the trainer says and logs: the division that it chose, distinct tokens a second, peak memory, MFU.
Keys of a recipe behind `--`: `--max_tokens_per_micro_batch=null` for a fixed count of pairs, `--use_peft=true` for LoRA.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from alignment.launch.opening import opening

with opening():
    from datasets import Dataset

    from alignment.model.adapters import lora_config
    from alignment.recipe.configs import ModelArguments
    from alignment.recipe.parser import H4ArgumentParser
    from benchmarks import train_step
    from benchmarks.step_table import versions
    from benchmarks.tokenization import load_tokenizer, machine
    from scripts.simpo_config import SimPOConfig
    from scripts.simpo_trainer import SimPOTrainer

SHOWN = ("step", "loss", "rewards/margins", "grad_norm", "tokens_per_second", "peak_memory_gb", "mfu")


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    settings = sys.argv[split + 1 :]
    sys.argv = sys.argv[:split]
    args = train_step.parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("httpx", "datasets", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = train_step.load_rows(args, tokenizer)
    on_gpu = args.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        given = [
            f"--output_dir={folder}", f"--use_cpu={not on_gpu}", f"--bf16={on_gpu}", "--beta=2.5", "--gamma_beta_ratio=0.55",
            f"--max_length={args.max_length}", f"--max_prompt_length={args.max_prompt_length}", "--learning_rate=1e-6",
            "--optim=adamw_torch", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=16",
            "--activation_checkpointing=true", "--num_train_epochs=2", "--logging_steps=1", "--report_to=none",
            "--save_strategy=no", "--disable_tqdm=true",
        ]  # fmt: skip
        model_args, config, *_ = H4ArgumentParser((ModelArguments, SimPOConfig)).parse([*given, *settings])
        model = train_step.build_model(args)
        trainer = SimPOTrainer(
            model,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config(model_args, model.config),
        )
        trainer.train()
        records = [{key: record[key] for key in SHOWN if key in record} for record in trainer.state.log_history]
        for record in records:
            print(json.dumps(record))
        if args.json is not None:
            division = {key: value for key, value in trainer.division._asdict().items() if value is not None}
            args.json.write_text(json.dumps([division | record for record in records if "loss" in record], indent=2))
        print(f"division: {trainer.division}; {machine()}, {versions()}")


if __name__ == "__main__":
    main()
