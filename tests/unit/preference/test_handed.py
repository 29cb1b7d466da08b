"""A trainer in a program of one's own: data sets as people hand them to trainers, and what they ask of them."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from alignment.data.chat import TEXT_COLUMNS, pair_texts
from alignment.errors import UserError
from tests import builders

CONVERSATIONS = builders.split_pairs(builders.pairs(6, seed=3))
TEXTS = builders.text_rows(6, seed=3)


@pytest.fixture
def build(build_of, tokenizer):
    return partial(build_of, "simpo", processing_class=tokenizer, per_device_train_batch_size=2)


def losses(trainer) -> list[float]:
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("preprocessing", ["published", "exact"])
def test_message_lists_are_trained_as_a_recipes_rows_are(build, preprocessing):
    """The published rules add an empty system turn, which llama-3's template knows."""
    rows = Dataset.from_list(CONVERSATIONS)
    trainer = build(rows=rows, held_out=rows, preprocessing=preprocessing)
    columns = {column: [row[column] for row in CONVERSATIONS] for column in TEXT_COLUMNS}
    texts = pair_texts(columns, list(range(6)), trainer.processing_class, preprocessing=preprocessing, add_system=True)
    as_text = Dataset.from_dict({column: texts[column] for column in TEXT_COLUMNS})
    assert losses(trainer) == losses(build(rows=as_text, preprocessing=preprocessing))
    assert {"prompt_sha256", "chosen_sha256"} <= set(trainer.eval_dataset.column_names)


def test_a_data_set_that_gives_out_tensors_is_trained_as_one_that_gives_out_lists(build):
    rows = Dataset.from_list(builders.token_rows([(4, 3, 5), (2, 6, 1), (3, 3, 3), (5, 2, 4)]))
    assert losses(build(rows=rows.with_format("torch"))) == losses(build(rows=rows))
    assert losses(build(rows=Dataset.from_list(TEXTS).with_format("numpy"))) == losses(build(rows=Dataset.from_list(TEXTS)))


@pytest.mark.parametrize("rows", [TEXTS, CONVERSATIONS], ids=["text", "messages"])
def test_evaluate_and_predict_take_what_the_trainer_takes(build, rows):
    held_out = Dataset.from_list(rows)
    trainer = build(rows=held_out, held_out=held_out, preprocessing="exact")
    known = trainer.evaluate()
    given = trainer.evaluate(held_out.with_format("torch"))
    assert given["eval_loss"] == known["eval_loss"]
    several = trainer.evaluate({"one": held_out, "other": held_out.select([0, 1])})
    assert several["eval_one_loss"] == known["eval_loss"]
    predicted = trainer.predict(held_out)
    assert predicted.metrics["test_loss"] == known["eval_loss"]
    assert predicted.predictions.shape == (6, 2)
    assert predicted.predictions.mean(axis=0) == pytest.approx(
        [known["eval_rewards/chosen"], known["eval_rewards/rejected"]], rel=1e-5
    )


def test_compute_metrics_gets_rewards_and_its_figures_are_logged(build):
    def accuracy(evaluated) -> dict[str, float]:
        return {"right": float(np.mean(evaluated.predictions.argmax(-1) == evaluated.label_ids))}

    rows = Dataset.from_list(TEXTS)
    trainer = build(rows=rows, held_out=rows, compute_metrics=accuracy, eval_strategy="steps", eval_steps=1)
    trainer.train()
    figures = [record for record in trainer.state.log_history if "eval_loss" in record]
    assert [record["eval_right"] for record in figures] == [record["eval_rewards/accuracies"] for record in figures]
    assert trainer.predict(rows).metrics["test_right"] == figures[-1]["eval_right"]


def stream():
    yield from TEXTS


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Dataset.from_list(TEXTS).to_iterable_dataset(), "train_dataset is a IterableDataset, of which nobody knows the rows"),
        (stream(), "train_dataset is a generator, of which nobody knows the rows"),
        (DatasetDict(train=Dataset.from_list(TEXTS)), "train_dataset is a DatasetDict of train; give one of them"),
        (tuple(TEXTS), "train_dataset is a tuple; give a datasets.Dataset"),
        (torch.utils.data.TensorDataset(torch.zeros(3)), "train_dataset is a TensorDataset; give a datasets.Dataset"),
        (Dataset.from_list([{**row, "chosen": []} for row in CONVERSATIONS]), "train_dataset, row 0: chosen is an empty list"),
    ],
    ids=["stream", "generator", "dict", "tuple", "torch", "malformed"],
)
def test_what_cannot_be_trained_on_is_refused_in_one_sentence(build, rows, message):
    with pytest.raises(UserError, match=message):
        build(rows=rows)


def test_the_advice_for_a_stream_works(build):
    streamed = Dataset.from_list(TEXTS).to_iterable_dataset()
    rows = Dataset.from_list(list(streamed.take(4)))
    assert len(losses(build(rows=rows))) == 2


def test_conversations_without_a_template_are_refused(build, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"train_dataset holds conversations, and the tokenizer has no chat template"):
        build(rows=Dataset.from_list(CONVERSATIONS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_init": builders.tiny_model}, "model_init: the model is loaded once"),
        ({"compute_loss_func": print}, "compute_loss_func: an objective is a method of its own"),
        ({"preprocess_logits_for_metrics": print}, "preprocess_logits_for_metrics: logits of whole vocabularies"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0: is not supported for pairs"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics = True: is not supported"),
    ],
)
def test_what_would_have_no_effect_on_pairs_is_refused(build, settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)
