"""What a model reads at evaluation is what its setting was trained on, id by id."""

import random
import re
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from alignment.data.chat import pair_texts
from alignment.data.prompts import prompt_of
from alignment.data.template import find_chat_template, read_template, render, shipped_template
from alignment.data.tokenization import LengthRules, tokenize_pairs
from alignment.errors import UserError
from alignment.recipe.configs import DataArguments
from alignment.recipe.parser import H4ArgumentParser
from eval.settings import EvaluationArguments
from on_policy_data_gen.configs import PolicyArguments
from on_policy_data_gen.sampling import make_requests
from tests import builders

ROOT = Path(__file__).parents[3]
SETTINGS = sorted(path for path in (ROOT / "eval").glob("*/*.yaml"))
RELEASED = [path for path in SETTINGS if path.stem != "own-template"]
# What the tokenizers that the recipes start from bring along; the Hub cannot be asked here.
OWN = {"llama-3-8b-base": "llama-3", "llama-3-8b-instruct": "llama-3", "mistral-7b-base": "zephyr"}
RULES = LengthRules(2000, 1800, "keep_end", "published")
TURNS = [prompt_of(row["chosen"]).turns for row in builders.pairs(6)]


def in_words(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def byte_level(writes_bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = builders.bpe_tokenizer()
    return with_bos(tokenizer) if writes_bos else tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """As Mistral's: a space before everything behind a special token, and bos written by the tokenizer."""
    backend, rng = Tokenizer(models.BPE(unk_token="<unk>")), random.Random(0)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = [chr(number) for number in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *builders.SPECIAL_TOKENS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator((builders.sentence(rng, 12) for _ in range(50)), trainer)
    return with_bos(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


TOKENIZERS = {"bos by the template": lambda: byte_level(False), "bos by both": lambda: byte_level(True), "metaspace": metaspace}


@pytest.fixture(params=TOKENIZERS)
def fresh_tokenizer(request):
    return TOKENIZERS[request.param]()


def parse(path: Path, **options: str) -> tuple[PolicyArguments, EvaluationArguments]:
    given = {"prompts": "questions.json", "output": "x.json" if path.parent.name == "alpacaeval2" else "x.jsonl", **options}
    return H4ArgumentParser((PolicyArguments, EvaluationArguments)).parse(
        [str(path), *(f"--{key}={value}" for key, value in given.items())]
    )


def recipes_of(setting: str) -> list[Path]:
    """llama-3-8b-instruct trains with -simpo and with -simpo-v2."""
    return sorted((ROOT / "training_configs").glob(f"{setting}-simpo*.yaml"))


def trained_ids(recipe: Path, setting: str, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Each conversation's ids in training: prompt, header and a reply."""
    keys = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tokenizer.chat_template = shipped_template(OWN[setting]) if setting in OWN else None
    tokenizer.chat_template, _ = find_chat_template(
        tokenizer, keys["model_name_or_path"], recipe_template=keys.get("chat_template"), preprocessing="published"
    )
    reply = [{"role": "assistant", "content": "river"}]
    rows = {"prompt": TURNS, "chosen": [reply] * len(TURNS), "rejected": [reply] * len(TURNS)}
    add_system = DataArguments.auto_insert_empty_system_msg
    texts = pair_texts(rows, [*range(len(TURNS))], tokenizer, preprocessing="published", add_system=add_system)
    return tokenize_pairs(texts, [*range(len(TURNS))], tokenizer, RULES)["chosen_input_ids"]


@pytest.mark.parametrize("path", RELEASED, ids=in_words)
def test_a_setting_is_evaluated_behind_the_very_ids_that_it_was_trained_on_with_one_bos(path, fresh_tokenizer, monkeypatch):
    monkeypatch.chdir(ROOT)
    policy, _ = parse(path)
    recipes = recipes_of(path.stem)
    assert recipes
    for recipe in recipes:
        trained = trained_ids(recipe, path.stem, fresh_tokenizer)
        fresh_tokenizer.chat_template = read_template(policy.chat_template)
        prompts = [prompt_of(turns) for turns in TURNS]
        requests = make_requests(prompts, fresh_tokenizer, max_tokens=5, window=None, date="2026-01-02")
        for request, ids in zip(requests, trained, strict=True):
            assert request.ids == ids[: len(request.ids)]
            scored = fresh_tokenizer.decode(ids[len(request.ids) :], skip_special_tokens=True)
            assert "".join(scored.split()).removesuffix("<end_of_turn>") == "river"
            assert request.ids.count(fresh_tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("path", RELEASED, ids=in_words)
def test_a_server_that_adds_no_bos_to_the_rendered_chat_serves_the_same_ids(path, fresh_tokenizer, monkeypatch):
    """As vLLM's chat interface with --chat-template."""
    monkeypatch.chdir(ROOT)
    policy, _ = parse(path)
    fresh_tokenizer.chat_template = read_template(policy.chat_template)
    prompts = [prompt_of(turns) for turns in TURNS]
    for request in make_requests(prompts, fresh_tokenizer, max_tokens=5, window=None, date="2026-01-02"):
        assert fresh_tokenizer(request.text, add_special_tokens=False)["input_ids"] == request.ids


def test_mistrals_template_merges_a_system_message_and_gemmas_refuses_one(tokenizer):
    turns = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Why?"}]
    fresh = builders.bpe_tokenizer()
    fresh.chat_template = (ROOT / "eval/templates/mistral.jinja").read_text(encoding="utf-8")
    assert render(turns, fresh, generation_prompt=True) == fresh.bos_token + "[INST] Be brief.\n\nWhy? [/INST]"
    fresh.chat_template = (ROOT / "eval/templates/gemma.jinja").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="no system turn"):
        render(turns, fresh, generation_prompt=True)


@pytest.mark.parametrize("path", SETTINGS, ids=in_words)
def test_every_settings_file_parses_and_begins_with_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    policy, own = parse(path)
    assert own.benchmark == path.parent.name
    assert path.read_text(encoding="utf-8").startswith(
        f"# python eval/generate_outputs.py eval/{in_words(path)}.yaml --model=RUN "
    )
    assert (policy.top_p, policy.top_k, policy.torch_dtype) == (1.0, 0, "bfloat16")


@pytest.mark.parametrize(
    ("setting", "temperature", "max_tokens"),
    [
        ("llama-3-8b-base", 0.9, 4096),
        ("llama-3-8b-instruct", 0.9, 4096),
        ("mistral-7b-base", 0.7, 2048),
        ("mistral-7b-instruct", 0.5, 2048),
        ("gemma-2-9b-it", 0.5, 4096),
    ],
)
def test_alpacaeval_has_the_published_sampling_and_arena_hard_is_greedy(setting, temperature, max_tokens, monkeypatch):
    monkeypatch.chdir(ROOT)
    policy, _ = parse(ROOT / f"eval/alpacaeval2/{setting}.yaml")
    assert (policy.temperature, policy.max_tokens) == (temperature, max_tokens)
    policy, _ = parse(ROOT / f"eval/arenahard/{setting}.yaml")
    assert (policy.temperature, policy.max_tokens, policy.concurrency) == (0.0, 4096, 8)


def test_every_published_setting_has_a_file_for_each_benchmark():
    published = {"llama-3-8b-base", "llama-3-8b-instruct", "mistral-7b-base", "mistral-7b-instruct", "gemma-2-9b-it"}
    for folder in ("alpacaeval2", "arenahard", "mt-bench"):
        assert {path.stem for path in RELEASED if path.parent.name == folder} == published


DOCUMENTS = [ROOT / "docs/evaluation.md", *sorted((ROOT / "eval").glob("*/README.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_commands_of_the_documents_are_understood(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^python eval/generate_outputs\.py (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        settings, *options = command.split()
        _, own = H4ArgumentParser((PolicyArguments, EvaluationArguments)).parse([settings, *options])
        assert (own.benchmark, own.model_name()) == (Path(settings).parent.name, "NAME")
