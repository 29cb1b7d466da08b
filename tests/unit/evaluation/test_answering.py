"""Questions answered by a tiny model and by a stand-in server."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alignment.data.template import shipped_template
from alignment.errors import UserError
from eval.answering import evaluate, token_counter
from eval.settings import EvaluationArguments
from on_policy_data_gen.configs import PolicyArguments
from on_policy_data_gen.in_process import TransformersEngine
from on_policy_data_gen.sampling import Sampling
from on_policy_data_gen.stages import Stage
from tests import builders
from tests.completions_server import completions_server, reply
from tests.unit.evaluation.conftest import QUESTIONS
from tests.workspaces import fake_vllm_python, read_jsonl, save_model

TEMPERATURES = {"writing": 0.7, "math": 0.0, "stem": 0.1}


@pytest.fixture
def answer(model, question_files, tmp_path):
    """Answer a benchmark; the rows of its file."""

    def made(benchmark: str, name: str = "my-run", prompts: Path | None = None, **options) -> list[dict]:
        own = {key: options.pop(key) for key in ("seed", "category_temperatures", "generator") if key in options}
        policy = PolicyArguments(**{"model": str(model), "max_tokens": 6, "temperature": 1.0, "use_cpu": True, **options})
        output = tmp_path / f"{name}{'.json' if benchmark == 'alpacaeval2' else '.jsonl'}"
        source = str(prompts or question_files[benchmark])
        evaluate(policy, EvaluationArguments(benchmark=benchmark, prompts=source, output=str(output), **own))
        return json.loads(output.read_text(encoding="utf-8")) if output.suffix == ".json" else read_jsonl(output)

    return made


def mt_replies(rows: list[dict]) -> list[list[str]]:
    return [row["choices"][0]["turns"] for row in rows]


def test_every_alpacaeval_instruction_has_one_output_in_the_files_order(answer):
    rows = answer("alpacaeval2", generator="Mine")
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in QUESTIONS["alpacaeval2"]]
    assert {row["generator"] for row in rows} == {"Mine"}
    assert len({row["output"] for row in rows}) == len(rows)


def test_arena_hards_rows_count_the_tokens_of_their_answers(answer):
    for row, question in zip(answer("arenahard"), QUESTIONS["arenahard"], strict=True):
        said = row["messages"][-1]["content"]["answer"]
        assert (row["uid"], row["model"], row["messages"][0]["content"]) == (question["uid"], "my-run", question["prompt"])
        assert row["metadata"]["token_len"] == len(builders.bpe_tokenizer()(said)["input_ids"])


def test_the_second_turn_of_mt_bench_answers_behind_the_first_reply(answer, model):
    rows = answer("mt-bench", category_temperatures=dict.fromkeys(TEMPERATURES, 0.0), temperature=0.0)
    tokenizer = builders.bpe_tokenizer()
    policy = TransformersEngine.load(
        PolicyArguments(model=str(model)), tokenizer, Sampling(0.0, 1.0, 0, 6, [tokenizer.eos_token_id]), torch.device("cpu")
    ).model
    for row, question in zip(rows, QUESTIONS["mt-bench"], strict=True):
        turns = []
        for text, said in zip(question["turns"], row["choices"][0]["turns"], strict=True):
            turns.append({"role": "user", "content": text})
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
            made = policy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
            assert said == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
            turns.append({"role": "assistant", "content": said})


def test_mt_benchs_temperatures_are_those_of_the_categories(answer, model):
    with completions_server(str(model)) as server:
        answer("mt-bench", server=server.url, category_temperatures=TEMPERATURES, temperature=0.7)
    asked = [request["temperature"] for request in server.requests]
    assert sorted(asked) == [0.0, 0.0, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7]  # the unknown category's is `temperature`
    tokenizer = builders.bpe_tokenizer()
    texts = [tokenizer.decode(request["prompt"]) for request in server.requests]
    for request, text in zip(server.requests, texts, strict=True):
        (place,) = (number for number in range(4) if f"lanterns {number}" in text)
        category = QUESTIONS["mt-bench"][place]["category"]
        assert request["temperature"] == TEMPERATURES.get(category, 0.7)


def test_vllm_is_started_once_for_all_temperatures(answer, tmp_path):
    python, log = fake_vllm_python(tmp_path)
    answer("mt-bench", engine="vllm", vllm_python=str(python), category_temperatures=TEMPERATURES, temperature=0.7)
    asked = [row["sampling"]["temperature"] for row in read_jsonl(log) if "sampling" in row]
    assert sorted(asked) == [0.0, 0.0, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7]
    assert sum("settings" in row for row in read_jsonl(log)) == 1


def test_a_server_gets_token_ids_with_one_bos_and_a_seed_for_each_answer(answer, model):
    with completions_server(str(model)) as server:
        rows = answer("alpacaeval2", server=server.url)
    bos = builders.bpe_tokenizer().bos_token_id
    assert all(request["prompt"][0] == bos and request["prompt"].count(bos) == 1 for request in server.requests)
    assert len({request["seed"] for request in server.requests}) == len(rows)
    made = {reply(request["prompt"], request["seed"]) for request in server.requests}
    assert {row["output"] for row in rows} == made


@pytest.mark.parametrize(
    ("preprocessing", "beginning"), [("published", "<|system|>\n<|eot_id|>\n<|user|>"), ("exact", "<|user|>")]
)
def test_a_run_is_asked_behind_the_empty_system_turn_that_it_was_trained_behind(
    answer, model, tmp_path, preprocessing, beginning
):
    run = shutil.copytree(model, tmp_path / "run")
    (run / "recipe.yaml").write_text(f"preprocessing: {preprocessing}\nauto_insert_empty_system_msg: true\n")
    tokenizer = builders.bpe_tokenizer()
    tokenizer.chat_template = shipped_template("zephyr")
    tokenizer.save_pretrained(run)
    with completions_server(str(run)) as server:
        answer("mt-bench", model=str(run), server=server.url)
    assert len(server.requests) == 8
    for request in server.requests:
        text = tokenizer.decode(request["prompt"])
        assert text.startswith(beginning)
        assert text.count("<|system|>") == ("<|system|>" in beginning)


def test_a_seed_makes_the_same_answers_and_another_one_others(answer):
    first, again, other = (
        [row["output"] for row in answer("alpacaeval2", name, seed=seed)]
        for name, seed in (("first", 42), ("again", 42), ("other", 7))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 7])
def test_what_is_killed_goes_on_and_ends_as_if_it_had_not_been(answer, monkeypatch, kept):
    """mt-bench has 8 answers: kept ones are not made again, in the first turn or the second."""
    options = {"category_temperatures": TEMPERATURES, "batch_size": 1}
    whole = mt_replies(answer("mt-bench", "whole", **options))
    made = []
    original = Stage.keep

    def dying(self, rows, **about):
        def until_then():
            for row in rows:
                if len(made) == kept:
                    raise KeyboardInterrupt
                made.append(row["prompt_id"])
                yield row

        original(self, until_then(), **about)

    monkeypatch.setattr(Stage, "keep", dying)
    with pytest.raises(KeyboardInterrupt):
        answer("mt-bench", "broken", **options)
    monkeypatch.setattr(Stage, "keep", original)
    again, batch = [], TransformersEngine.batch

    def listed(self, requests, *rest, **more):
        again.extend(request.id for request in requests)
        return batch(self, requests, *rest, **more)

    monkeypatch.setattr(TransformersEngine, "batch", listed)
    assert mt_replies(answer("mt-bench", "broken", **options)) == whole
    assert len(again) == 8 - kept
    assert not set(again) & set(made)


def test_a_finished_file_is_left_alone_and_other_settings_are_refused(answer, monkeypatch):
    rows = answer("alpacaeval2")
    monkeypatch.setattr(TransformersEngine, "load", None)  # nothing is loaded
    assert answer("alpacaeval2") == rows
    with pytest.raises(UserError, match=r"(?s)with other settings:.*temperature: 1\.0 then, 0.5 now"):
        answer("alpacaeval2", temperature=0.5)


def test_changed_questions_are_refused(answer, tmp_path):
    prompts = tmp_path / "q.jsonl"
    prompts.write_text('{"instruction": "river"}\n')
    answer("alpacaeval2", prompts=prompts)
    prompts.write_text('{"instruction": "rivers"}\n')
    with pytest.raises(UserError, match="prompts_sha256"):
        answer("alpacaeval2", prompts=prompts)


def test_a_question_without_room_is_told_before_anything_is_generated(answer, tmp_path):
    save_model(tmp_path / "short", max_position_embeddings=40)
    prompts = tmp_path / "q.jsonl"
    rows = [{"instruction": "river"}, {"instruction": "river mountain " * 40}]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(UserError, match=r"1 of 2 questions leave no room for an answer \(the first is number 2\)"):
        answer("alpacaeval2", prompts=prompts, model=str(tmp_path / "short"))


def test_a_second_turn_without_room_is_empty_and_counted(answer, tmp_path, caplog):
    save_model(tmp_path / "short", max_position_embeddings=60, initializer_range=0.1)
    prompts = tmp_path / "q.jsonl"
    rows = [
        {"question_id": number, "category": "math", "turns": ["river", "the " * words]} for number, words in ((1, 2), (2, 80))
    ]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with caplog.at_level("INFO"):
        made = mt_replies(answer("mt-bench", prompts=prompts, model=str(tmp_path / "short")))
    assert made[0][1]
    assert made[1][0]
    assert made[1][1] == ""
    assert "1 turns without room for a response" in caplog.text


def test_a_token_counter_that_is_not_here_is_told_with_the_way_out(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"needs the package tiktoken.*--token_counter=model"):
        token_counter("o200k_base", tokenizer)


def test_an_encoding_that_cannot_be_fetched_is_told_before_anything_is_generated(tokenizer, monkeypatch):
    def get_encoding(name):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=get_encoding))
    with pytest.raises(UserError, match=r"cannot fetch it \(ConnectionError\); let it do so once, with TIKTOKEN_CACHE_DIR"):
        token_counter("o200k_base", tokenizer)


def test_a_special_token_in_an_answer_is_counted_as_text(tokenizer, monkeypatch):
    def encode(text, disallowed_special):
        assert disallowed_special == ()
        return text.split()

    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=lambda name: SimpleNamespace(encode=encode)))
    assert token_counter("o200k_base", tokenizer)("river <|endoftext|> kettle") == 3
