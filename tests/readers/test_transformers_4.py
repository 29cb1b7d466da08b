"""What a run leaves, read by transformers 4: older servers, converters and evaluation tools have that.

    make test-transformers-4

The interpreter that has it stands in TRANSFORMERS_4.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from alignment.pipeline import run
from tests import builders
from tests.methods import METHODS
from tests.workspaces import recipe_of_run, save_splits

RECIPE = {
    "preprocessing": "exact",
    "use_cpu": True,
    "max_length": 160,
    "max_prompt_length": 80,
    "learning_rate": 1e-3,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "do_eval": False,
    "score_step_0": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
TEXT = "Here are 12 rivers:\n\n1. the mountain's  man <|eot_id|>"
IDS = list(range(5, 105))
THETA = 500000.0
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
# Each has a rotation that version 4 would not find in the words of version 5.
POLICIES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
    "llama, scaled": {"rope_parameters": {**LLAMA3, "rope_theta": THETA, "original_max_position_embeddings": 64}},
    "mistral, in bfloat16": {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "dtype": "bfloat16"},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
    "gemma2": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "head_dim": 8},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": THETA},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
    },
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}},
    "phi3": {
        "rope_parameters": {**LONG, "rope_theta": 2e4, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 64,
    },
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
}
READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
text, ids, *folders = sys.argv[1:]
said = []
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    dtype = str(model.dtype)
    with torch.no_grad():
        logits = model.float()(torch.tensor([json.loads(ids)])).logits[0, ::7, ::37]
    turns = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ends = model.generation_config.eos_token_id
    tokens = tokenizer(text)["input_ids"]
    said.append({"ids": tokens, "prompt": prompt, "logits": logits.tolist(), "dtype": dtype, "ends": ends})
print(json.dumps(said))
"""


def save_policy(folder: Path, kind: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**builders.SIZES, "initializer_range": 0.1, **settings})
    AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).save_pretrained(folder)
    tokenizer = builders.bpe_tokenizer()
    if kind == "qwen2":  # transformers 5 gives every tokenizer of this type Qwen's own rules
        state = json.loads(builders.backend())["model"]
        marks = {"eos_token": builders.EOS, "pad_token": builders.PAD, "additional_special_tokens": builders.SPECIAL_TOKENS}
        template = tokenizer.chat_template
        tokenizer = Qwen2Tokenizer(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]], **marks)
        tokenizer.chat_template = template.replace("bos_token", "''")
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The runs, by policy."""
    made, rows = {}, builders.pairs(3)
    for name, settings in POLICIES.items():
        folder = tmp_path_factory.mktemp("policy")
        save_policy(folder / "model", name.partition(",")[0], settings)
        save_splits(folder / "pairs", rows[:2], rows[2:])
        run(METHODS["simpo"], [recipe_of_run(folder, folder, RECIPE, {})])
        made[name] = folder / "run"
    return made


@pytest.fixture(scope="module")
def said(folders) -> dict[str, dict]:
    """What transformers 4 says of each."""
    python = os.environ.get("TRANSFORMERS_4")
    assert python, "TRANSFORMERS_4 names no interpreter; `make test-transformers-4` makes one"
    command = [python, "-c", READER, TEXT, json.dumps(IDS), *map(str, folders.values())]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(zip(folders, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_transformers_4_gives_the_logits_that_were_trained(name, folders, said):
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, ::7, ::37]
    torch.testing.assert_close(torch.tensor(said[name]["logits"]), logits, rtol=1e-4, atol=1e-5)
    wanted = "bfloat16" if "bfloat16" in name else "float32"
    assert said[name]["dtype"] == f"torch.{wanted}"


@pytest.mark.parametrize("name", POLICIES)
def test_transformers_4_reads_the_tokens_that_were_trained(name, folders, said):
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    turns = [{"role": "user", "content": TEXT}]
    assert said[name]["ids"] == tokenizer(TEXT)["input_ids"]
    assert said[name]["prompt"] == tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ends = said[name]["ends"]
    assert builders.bpe_tokenizer().eos_token_id in (ends if isinstance(ends, list) else [ends])
