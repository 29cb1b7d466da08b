"""A reward model for on-policy data of the quickstart's size, from its pairs: `python scripts/quickstart/reward.py`."""

import os

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from scripts.quickstart.run import DATA, FOLDER, ROOT, SEED, SFT

REWARD = FOLDER / "reward"


def main() -> None:
    os.chdir(ROOT)
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    model = AutoModelForSequenceClassification.from_pretrained(SFT, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    args = RewardConfig(
        output_dir=str(REWARD),
        learning_rate=1e-3,
        num_train_epochs=2,
        per_device_train_batch_size=32,
        max_length=128,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=SEED,
    )
    pairs = load_dataset("json", data_files=str(DATA / "pairs/train.jsonl"), split="train")
    trainer = RewardTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(REWARD))


if __name__ == "__main__":
    main()
