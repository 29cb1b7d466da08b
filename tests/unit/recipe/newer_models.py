"""What is published of the models that the newer recipes start from: parameters, special tokens, chat templates.

Parameters are the totals that the Hub shows. Templates are those that trl ships, or written here from a published shape, whose
place is named; nobody has compared those with the tokenizers themselves.
"""

from pathlib import Path
from typing import NamedTuple

import trl
from transformers import PreTrainedTokenizerBase

from tests.builders import bpe_tokenizer

TRL = Path(trl.__file__).parent / "chat_templates"
FUNCTIONS = "You do not currently have access to any functions. <functions></functions><|im_end|>\\n"
# v0.3's tokenizer_config.json without its tools: no generation prompt, the system message in front of the last turn if that
# is the user's.
MISTRAL = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- for turn in turns %}
{%- if turn.role == 'user' %}{{ '[INST] ' + (system if loop.last else '') + turn.content + '[/INST]' }}
{%- else %}{{ ' ' + turn.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
# The model card of OLMo-2-1124-7B-Instruct, chat template: one token is bos and eos; the roles' marks are plain text.
OLMO_2 = """{{ bos_token }}
{%- for turn in messages %}
{%- if turn.role == 'assistant' %}{{ '<|assistant|>\n' + turn.content + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}
{%- else %}{{ '<|' + turn.role + '|>\n' + turn.content + '\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
{%- endfor %}"""
# The model card of Olmo-3-7B-Instruct, chat format; open-instruct's template "olmo" for turns in the middle.
OLMO_3 = f"""{{%- if messages[0].role != 'system' %}}
{{{{- '<|im_start|>system\\nYou are a helpful function-calling AI assistant. {FUNCTIONS}' }}}}{{% endif %}}
{{%- for turn in messages %}}
{{%- if turn.role == 'system' %}}{{{{ '<|im_start|>system\\n' + turn.content + ' {FUNCTIONS}' }}}}
{{%- elif turn.role == 'user' %}}{{{{ '<|im_start|>user\\n' + turn.content + '<|im_end|>\\n' }}}}
{{%- else %}}{{{{ '<|im_start|>assistant\\n' + turn.content + (eos_token if loop.last else '<|im_end|>\\n') }}}}{{% endif %}}
{{%- if loop.last and add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}
{{%- endfor %}}"""
# Prompts of SmolLM3-3B as transformers' users print them, with thinking and without; its long system message for thinking
# shortened. Its system turn has no end.
SMOLLM_3 = """{%- set thinks = enable_thinking is not defined or enable_thinking %}
{%- set opening = '' if thinks else '<think>\n\n</think>\n' %}
{{- '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' + strftime_now('%d %B %Y') }}
{{- '\nReasoning Mode: ' + ('/think' if thinks else '/no_think') + '\n\n## Custom Instructions\n\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% set turns = messages[1:] %}
{%- else %}{{ 'You are a helpful AI assistant named SmolLM, trained by Hugging Face.\n\n' }}{% set turns = messages %}
{%- endif %}
{%- for turn in turns %}
{%- if turn.role == 'user' %}{{ '<|im_start|>user\n' + turn.content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>assistant\n' + opening + turn.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' + opening }}{% endif %}"""


class Published(NamedTuple):
    """Of a model. header, end: what stands in front of and behind a reply, white space behind the end left out."""

    parameters: int
    template: str
    bos: str | None
    eos: str
    header: str
    end: str
    space: str = ""  # in front of the reply, and scored with it

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A small one that has the model's special tokens and template."""
        tokenizer = bpe_tokenizer(bos=self.bos is not None)
        named = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": "<|pad|>"}
        marks = [mark for mark in MARKS if mark in self.template and mark not in named.values()]
        tokenizer.add_special_tokens({key: token for key, token in named.items() if token})
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        tokenizer.chat_template = self.template
        return tokenizer


MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]",
)  # fmt: skip


def shipped(name: str) -> str:
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


CHATML = ("<|im_start|>assistant\n", "<|im_end|>")
QWEN = (shipped("qwen3"), None, "<|im_end|>", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")
GEMMA = (shipped("gemma3"), "<bos>", "<eos>", "<start_of_turn>model\n", "<end_of_turn>")
PUBLISHED = {
    "Qwen/Qwen3-8B": Published(8_190_735_360, *QWEN),
    "Qwen/Qwen3-4B": Published(4_022_468_096, *QWEN),
    "meta-llama/Llama-3.1-8B-Instruct": Published(8_030_261_248, shipped("llama3_1"), *LLAMA),
    "meta-llama/Llama-3.2-3B-Instruct": Published(3_212_749_824, shipped("llama3_2"), *LLAMA),
    "google/gemma-3-1b-it": Published(999_885_952, *GEMMA),
    "google/gemma-3-4b-it": Published(4_300_079_472, *GEMMA),
    "mistralai/Mistral-7B-Instruct-v0.3": Published(7_248_023_552, MISTRAL, "<s>", "</s>", "[/INST]", "</s>", space=" "),
    "allenai/OLMo-2-1124-7B-Instruct": Published(
        7_298_617_344, OLMO_2, "<|endoftext|>", "<|endoftext|>", "<|assistant|>\n", "<|endoftext|>"
    ),
    "allenai/Olmo-3-7B-Instruct": Published(7_298_011_136, OLMO_3, None, "<|endoftext|>", CHATML[0], "<|endoftext|>"),
    "HuggingFaceTB/SmolLM3-3B": Published(
        3_075_098_624, SMOLLM_3, None, "<|im_end|>", f"{CHATML[0]}<think>\n\n</think>\n", CHATML[1]
    ),
}
