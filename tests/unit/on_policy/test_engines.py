"""Generation elsewhere: a stand-in for an OpenAI-compatible server, and a fake vllm behind another interpreter."""

import sys
from pathlib import Path

import pytest

from alignment.data.prompts import row_seed
from alignment.errors import TrainingStopped, UserError
from on_policy_data_gen import server_client
from on_policy_data_gen.sampling import Sampling
from on_policy_data_gen.server_client import ServerEngine
from on_policy_data_gen.vllm_process import VLLMEngine
from tests.completions_server import completions_server, reply
from tests.workspaces import fake_vllm_python, read_jsonl, save_adapter

SAMPLING = Sampling(temperature=0.8, top_p=0.95, top_k=0, max_tokens=10, stop_ids=[1, 7])
ROOT = Path(__file__).parents[3]


def expected(requests, seed: int) -> dict[str, str]:
    return {request.id: reply(request.ids, row_seed(seed, request.id)) for request in requests}


# ---- A server ----


def test_a_server_is_asked_with_ids_seeds_and_everything_that_it_would_fill_in(policy_args, requests):
    with completions_server("policy") as server:
        engine = ServerEngine(policy_args(server=server.url, served_model="policy"), SAMPLING)
        found = {answer.id: answer.text for answer in engine.answers(requests, 13)}
    assert found == expected(requests, 13)
    by_ids = {tuple(request.ids): request for request in requests}
    for asked in server.requests:
        request = by_ids[tuple(asked["prompt"])]  # ids, with the one bos that they have
        assert asked["path"] == "/v1/completions"
        assert (asked["seed"], asked["max_tokens"]) == (row_seed(13, request.id), request.max_tokens)
        assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["min_p"]) == (0.8, 0.95, -1, 0.0)
        assert (asked["repetition_penalty"], asked["stop_token_ids"]) == (1.0, [1, 7])


def test_several_requests_are_under_way_and_no_more_than_asked_for(policy_args, requests):
    with completions_server("policy", delay=0.05) as server:
        engine = ServerEngine(policy_args(server=server.url, served_model="policy", concurrency=3), SAMPLING)
        assert len([*engine.answers(requests, 13)]) == len(requests)
    assert server.most_under_way == 3


def test_a_server_that_is_busy_is_asked_again(policy_args, requests):
    with completions_server("policy") as server:
        server.failures = [503, 429]
        engine = ServerEngine(policy_args(server=f"{server.url}/v1/", served_model="policy"), SAMPLING)
        found = {answer.id: answer.text for answer in engine.answers(requests, 13)}
    assert found == expected(requests, 13)
    assert len(server.requests) == len(requests) + 2


def test_a_server_that_stays_busy_stops_the_stage_with_its_own_words(policy_args, requests):
    with completions_server("policy") as server:
        server.failures = [503] * 100
        engine = ServerEngine(policy_args(server=server.url, served_model="policy"), SAMPLING, retries=1)
        with pytest.raises(TrainingStopped, match=r"answers 503: busy, also when asked again.*the same command goes on"):
            [*engine.answers(requests, 13)]


def test_a_server_that_goes_away_stops_the_stage_and_keeps_what_came(policy_args, requests):
    with completions_server("policy") as server:
        server.refuse_after = 4
        engine = ServerEngine(policy_args(server=server.url, served_model="policy", concurrency=1), SAMPLING, retries=1)
        came = []
        with pytest.raises(TrainingStopped, match=r"does not answer .* asked 2 times"):
            came.extend(engine.answers(requests, 13))
    assert [(answer.id, answer.text) for answer in came] == [*expected(requests, 13).items()][:4]


def test_a_server_of_another_model_is_the_users_mistake(policy_args, requests):
    with completions_server("another") as server:
        engine = ServerEngine(policy_args(server=server.url, served_model="policy"), SAMPLING)
        with pytest.raises(UserError, match=r"404: The model `policy` does not exist.*--served_model"):
            [*engine.answers(requests, 13)]


def test_a_server_gets_no_key_but_its_own(policy_args, requests, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret of another service")
    with completions_server("policy") as server:
        args = policy_args(server=server.url, served_model="policy")
        [*ServerEngine(args, SAMPLING).answers(requests[:1], 13)]
        monkeypatch.setenv(server_client.KEY_VARIABLE, "own")
        [*ServerEngine(args, SAMPLING).answers(requests[:1], 13)]
    assert server.keys == ["Bearer none", "Bearer own"]


# ---- vLLM ----


@pytest.fixture
def vllm(tmp_path, monkeypatch, policy_args):
    """Arguments with an interpreter in whose environment a fake vllm lies, and the log of what that is asked."""
    python, log = fake_vllm_python(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def arguments(**settings):
        return policy_args(engine="vllm", vllm_python=str(python), **settings)

    return arguments, log


def test_vllm_answers_each_prompt_in_whatever_order_it_finishes(vllm, requests, policy_folder):
    arguments, log = vllm
    engine = VLLMEngine(arguments(tensor_parallel=2, data_parallel=4, vllm_options={"gpu_memory_utilization": 0.5}), SAMPLING)
    try:
        found = [(answer.id, answer.text) for answer in engine.answers(requests, 13)]
        again = {answer.id: answer.text for answer in engine.answers(requests, 21)}
    finally:
        engine.close()
    assert dict(found) == expected(requests, 13)
    assert [key for key, _ in found] != [request.id for request in requests]
    assert again == expected(requests, 21)
    start, *asked, end = read_jsonl(log)
    assert start["settings"] == {
        "model": str(policy_folder), "dtype": "auto", "trust_remote_code": False, "tensor_parallel_size": 2,
        "data_parallel_size": 4, "gpu_memory_utilization": 0.5,
    }  # fmt: skip
    assert start["modules"] == []  # nothing of the suite is imported there
    assert end == {"shutdown": True}
    assert engine.process.returncode == 0
    by_id = {request.id: request for request in requests}
    for row in asked[: len(requests)]:
        request = by_id[row["request_id"]]
        assert row["ids"] == request.ids
        assert row["sampling"] == {
            "temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_tokens": 10, "stop_token_ids": [1, 7],
            "seed": row_seed(13, request.id),
        }  # fmt: skip


def test_vllm_that_dies_stops_the_stage_and_what_came_is_kept(vllm, requests, monkeypatch):
    arguments, _ = vllm
    monkeypatch.setenv("FAKE_VLLM_FAILS_AFTER", "5")
    engine = VLLMEngine(arguments(), SAMPLING)
    with pytest.raises(TrainingStopped, match=r"vLLM ended with status 7.*the same command goes on"):
        [*engine.answers(requests, 13)]
    engine.close()


def test_an_interpreter_without_vllm_is_said_to_end_at_once(policy_args):
    with pytest.raises(TrainingStopped, match="vLLM ended with status 1"):
        VLLMEngine(policy_args(engine="vllm", vllm_python=sys.executable), SAMPLING)


def test_an_adapter_is_not_given_to_vllm(vllm, policy_folder, tmp_path):
    arguments, _ = vllm
    save_adapter(policy_folder, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"is an adapter of .*merge it first"):
        VLLMEngine(arguments(model=str(tmp_path / "adapter")), SAMPLING)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"engine": "vllm"}, "vllm_python"),
        ({"engine": "vllm", "vllm_python": "/no/python"}, "no such file"),
        ({"server": "localhost:8000"}, "must be a URL"),
        ({"server": "http://localhost", "engine": "vllm", "vllm_python": sys.executable}, "give one of them"),
        ({"tensor_parallel": 2}, "is for vLLM"),
        ({"temperature": -1.0}, "must be 0 or more"),
        ({"top_p": 0.0}, "above 0"),
    ],
)
def test_engines_that_cannot_be_are_refused(settings, told, policy_args):
    with pytest.raises(UserError, match=told):
        policy_args(**settings)


def test_the_worker_imports_nothing_but_vllm_and_pythons_own():
    source = (ROOT / "on_policy_data_gen/vllm_worker.py").read_text()
    names = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert names - {"vllm"} <= sys.stdlib_module_names
