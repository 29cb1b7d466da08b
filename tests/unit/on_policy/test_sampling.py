"""What a model is asked, and what transformers draws."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from alignment.data.chat import exact_pair_text
from alignment.data.prompts import prompt_of, row_seed
from alignment.data.template import shipped_template
from alignment.data.tokenization import LengthRules, tokenize_pairs
from alignment.errors import UserError
from alignment.model.generation import DrawByRow, left_padded, uniform_numbers
from on_policy_data_gen.in_process import TransformersEngine, batches
from on_policy_data_gen.sampling import (
    Request,
    Sampling,
    adds_system_turn,
    make_requests,
    policy_tokenizer,
    sampling_of,
    stop_ids,
)
from tests import builders

DATE = "2026-01-02"


def engine(policy_args, batch_size: int = 16, **settings) -> TransformersEngine:
    args = policy_args(batch_size=batch_size, **settings)
    tokenizer = policy_tokenizer(args)
    return TransformersEngine.load(args, tokenizer, sampling_of(args, tokenizer), torch.device("cpu"))


def answers(engine_: TransformersEngine, requests, seed: int) -> dict:
    return {answer.id: answer for answer in engine_.answers(requests, seed)}


# ---- Requests ----


@pytest.mark.parametrize("template", ["llama-3", "zephyr", "mistral", "gemma"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_has_one_bos_whoever_writes_it(template, adds_bos, prompts):
    tokenizer = builders.bpe_tokenizer()
    tokenizer.chat_template = shipped_template(template)
    writes = template in ("llama-3", "gemma")
    if adds_bos:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    for request in make_requests(prompts, tokenizer, max_tokens=4, window=None, date=DATE):
        assert request.ids.count(tokenizer.bos_token_id) == (1 if writes or adds_bos else 0)
        assert tokenizer.bos_token_id not in request.ids[1:]


def test_a_template_that_writes_bos_twice_is_refused(prompts):
    tokenizer = builders.bpe_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(UserError, match="elsewhere than at its beginning"):
        make_requests(prompts, tokenizer, max_tokens=4, window=None, date=DATE)


def test_the_prompt_that_is_sampled_behind_is_the_one_that_is_trained_on(prompts, tokenizer):
    rules = LengthRules(2000, 1900, "keep_end", "exact")
    for prompt, request in zip(prompts, make_requests(prompts, tokenizer, max_tokens=4, window=None, date=DATE), strict=True):
        reply = [{"role": "assistant", "content": "river"}]
        texts = exact_pair_text({"prompt": prompt.turns, "chosen": reply, "rejected": reply}, tokenizer, date=DATE)
        batch = {column: [texts[column]] for column in ("prompt", "chosen", "rejected")}
        (ids,), (length,) = (
            tokenize_pairs(batch, [0], tokenizer, rules)[key] for key in ("chosen_input_ids", "chosen_prompt_length")
        )
        assert request.ids == ids[:length]


def test_a_template_without_a_generation_prompt_has_its_header_added(prompts, tokenizer):
    bare = builders.bpe_tokenizer()
    bare.chat_template = shipped_template("llama-3").split("{%- if add_generation_prompt %}")[0]
    ours, theirs = (make_requests(prompts, each, max_tokens=4, window=None, date=DATE) for each in (bare, tokenizer))
    assert [request.ids for request in ours] == [request.ids for request in theirs]


def test_a_prompt_leaves_room_for_its_response_or_is_left_out(prompts, tokenizer):
    everyone = make_requests(prompts, tokenizer, max_tokens=30, window=None, date=DATE)
    lengths = sorted(len(request.ids) for request in everyone)
    window = lengths[-1]
    fitting = make_requests(prompts, tokenizer, max_tokens=30, window=window, date=DATE)
    assert len(fitting) == len(prompts) - lengths.count(window)
    assert all(request.max_tokens == min(30, window - len(request.ids)) for request in fitting)
    with pytest.raises(UserError, match="no prompt leaves room"):
        make_requests(prompts, tokenizer, max_tokens=30, window=3, date=DATE)


def test_generation_stops_at_eos_at_the_end_of_a_turn_and_where_the_model_says(policy_args, policy_folder, tmp_path):
    args = policy_args()
    tokenizer = policy_tokenizer(args)
    assert stop_ids(args, tokenizer) == [tokenizer.eos_token_id]
    model = LlamaForCausalLM.from_pretrained(policy_folder)
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.eos_token = "the"
    assert stop_ids(policy_args(model=str(tmp_path)), tokenizer) == [
        tokenizer.convert_tokens_to_ids("the"), tokenizer.convert_tokens_to_ids(builders.EOS), 7,
    ]  # fmt: skip


# ---- Drawing ----


def test_draws_have_the_distribution_that_is_asked_for():
    scores = torch.tensor([[0.1, 2.0, -torch.inf, 1.0, -0.5]])
    count = 20_000
    uniforms = torch.arange(count, dtype=torch.float64)[None] / count  # an even grid: the shares are exact up to one draw
    draw = DrawByRow(uniforms, prompt_tokens=0)
    tokens = torch.stack([draw(torch.zeros(1, step), scores).argmax() for step in range(0, count, 10)])
    shares = torch.bincount(tokens, minlength=5) / len(tokens)
    torch.testing.assert_close(shares, scores.softmax(-1)[0], atol=1.1e-3, rtol=0)
    assert shares[2] == 0


def test_a_response_does_not_depend_on_its_batch(policy_args, requests):
    alone, together = (answers(engine(policy_args, batch_size=size), requests, 13) for size in (1, 7))
    assert alone == together
    assert answers(engine(policy_args), requests[3:4], 13)[requests[3].id] == alone[requests[3].id]


def test_seeds_and_prompts_make_different_responses_and_the_same_make_the_same(policy_args, requests):
    model = engine(policy_args)
    first, again, other = (answers(model, requests, seed) for seed in (13, 13, 21))
    assert first == again
    assert all(first[key].text != other[key].text for key in first)
    assert len({row_seed(13, request.id) for request in requests} | {row_seed(21, request.id) for request in requests}) == 14
    assert all(0 <= row_seed(seed, "x") < 2**63 for seed in range(50))


def test_a_longer_limit_goes_on_from_the_same_words(policy_args, requests):
    assert torch.equal(uniform_numbers(5, 30)[:10], uniform_numbers(5, 10))
    short = answers(engine(policy_args), requests, 13)
    longer = answers(engine(policy_args), [request._replace(max_tokens=20) for request in requests], 13)
    assert all(longer[key].text.startswith(short[key].text.rstrip("\ufffd")) for key in short)


def test_temperature_zero_is_what_generate_does_by_itself(policy_args, policy_folder, requests):
    model = LlamaForCausalLM.from_pretrained(policy_folder)
    tokenizer = builders.bpe_tokenizer()
    greedy = answers(engine(policy_args, temperature=0), requests, 13)
    for request in requests:
        ids = torch.tensor([request.ids])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert greedy[request.id].text == tokenizer.decode(made[0, len(request.ids) :], skip_special_tokens=True)


def test_the_models_own_sampling_settings_have_no_say(policy_args, policy_folder, requests, tmp_path):
    model = LlamaForCausalLM.from_pretrained(policy_folder)
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1, repetition_penalty=5.0)
    model.save_pretrained(tmp_path)
    builders.bpe_tokenizer().save_pretrained(tmp_path)
    own, other = (answers(engine(policy_args, model=str(folder)), requests, 13) for folder in (policy_folder, tmp_path))
    assert own == other


def test_each_response_ends_at_its_own_limit(policy_args, requests):
    limits = [request._replace(max_tokens=3 + number) for number, request in enumerate(requests)]
    found = answers(engine(policy_args), limits, 13)
    assert [found[one.id].tokens for one in limits] == [one.max_tokens for one in limits]
    assert {found[one.id].finish_reason for one in limits} == {"length"}


def test_prompts_of_every_length_are_answered_by_a_model_with_learned_positions(tokenizer):
    """A short prompt's long response would lead the long prompt beside it behind the last position."""
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    engine = TransformersEngine(GPT2LMHeadModel(config).eval(), tokenizer, Sampling(1.0, 1.0, 0, 32, []), batch_size=4)
    asked = [Request(f"{length}", "", [5] * length, min(32 - length, 8)) for length in (30, 28, 4, 3, 2)]
    assert {answer.id: answer.tokens for answer in engine.answers(asked, 1)} == {one.id: one.max_tokens for one in asked}
    assert [len(batch) for batch in batches(asked, 4, 32)] == [1, 1, 3]
    assert [len(batch) for batch in batches(asked, 4, None)] == [4, 1]


@pytest.mark.parametrize(("preprocessing", "added"), [("published", True), ("exact", False)])
def test_what_a_run_left_is_asked_behind_the_empty_system_turn_that_it_was_trained_behind(
    policy_args, prompts, tmp_path, preprocessing, added
):
    (tmp_path / "recipe.yaml").write_text(f"preprocessing: {preprocessing}\nauto_insert_empty_system_msg: true\n")
    tokenizer = builders.bpe_tokenizer()
    tokenizer.chat_template = shipped_template("zephyr")
    asked = policy_args(model=str(tmp_path))
    assert adds_system_turn(asked) == added
    assert not adds_system_turn(policy_args(model=str(tmp_path), chat_template="zephyr"))
    assert not adds_system_turn(policy_args(model="someone/on-the-hub"))
    for request in make_requests(prompts, tokenizer, max_tokens=4, window=None, date=DATE, add_system=adds_system_turn(asked)):
        assert request.text.count("<|system|>") == added


def test_a_response_ends_before_its_end_of_turn(policy_args, requests, tokenizer):
    model = engine(policy_args)
    request = requests[0]._replace(max_tokens=6)
    ended = model.answer(request, [20, 21, tokenizer.eos_token_id, tokenizer.pad_token_id])
    assert (ended.tokens, ended.finish_reason, ended.text) == (2, "stop", tokenizer.decode([20, 21]))


def test_padding_stands_on_the_left():
    ids, mask = left_padded([[5], [6, 7, 8]], 2)
    assert ids.tolist() == [[2, 2, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_prompts_are_told_apart_by_all_of_their_turns():
    first = {"role": "user", "content": "a"}
    assert prompt_of("a").id == prompt_of([first]).id == prompt_of([first, {"role": "assistant", "content": "b"}]).id
    assert prompt_of("a").id != prompt_of([{"role": "system", "content": "s"}, first]).id
