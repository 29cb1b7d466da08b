"""Prompts of a recipe, as the model that is trained reads them."""

from types import SimpleNamespace

import pytest

from alignment.data.template import shipped_template
from alignment.recipe.configs import ModelArguments
from alignment.watch.samples import sample_requests
from tests import builders
from tests.workspaces import save_model


@pytest.mark.parametrize(
    ("preprocessing", "inserts", "added"), [("published", True, 1), ("published", False, 0), ("exact", True, 0)]
)
def test_a_sample_is_asked_behind_the_empty_system_turn_that_the_run_trains_behind(tmp_path, preprocessing, inserts, added):
    save_model(tmp_path)
    tokenizer = builders.bpe_tokenizer()
    tokenizer.chat_template = shipped_template("zephyr")
    args = SimpleNamespace(sample_prompts=["Hello?"], sample_max_new_tokens=4, seed=1, preprocessing=preprocessing)
    run_ = SimpleNamespace(
        training_args=args,
        data_args=SimpleNamespace(auto_insert_empty_system_msg=inserts),
        model_args=ModelArguments(model_name_or_path=str(tmp_path)),
        date="2026-01-02",
    )
    (request,) = sample_requests(run_, tokenizer)
    assert tokenizer.decode(request.ids).count("<|system|>") == added
