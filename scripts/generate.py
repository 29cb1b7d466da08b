"""Chat with a model, an adapter or a checkpoint, or answer a file of prompts: `python scripts/generate.py MODEL`.

With --input PROMPTS --output RESPONSES.jsonl every prompt is answered; killed, the same command goes on. Without, it is a
conversation on the terminal, in the template that is saved with the model; /new begins another.
"""

import argparse
import sys
from collections.abc import Sequence

from alignment.launch.opening import opening


def short_help() -> argparse.ArgumentParser:
    """What most need, told at once; the options themselves are read by the suite's own parser, with its errors."""
    given = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        usage="%(prog)s MODEL [--input PROMPTS --output RESPONSES.jsonl] [--key=value ...]",
        epilog="--help_all lists every option: engines (vLLM, a server), templates, precision.",
    )
    given.add_argument("model", metavar="MODEL", help="folder or Hub name of a model, an adapter or a checkpoint")
    given.add_argument("--input", metavar="PROMPTS", help="JSONL, JSON, Parquet or a data set of prompts, or of conversations")
    given.add_argument("--output", metavar="FILE", help="JSONL of the replies, with their conversations")
    given.add_argument("--system", metavar="TEXT", help="system turn of a conversation")
    given.add_argument("--temperature", metavar="T", help="0 takes the likeliest token (default: 0.8)")
    given.add_argument("--max_tokens", metavar="N", help="of a reply (default: 4096)")
    given.add_argument("--seed", metavar="N", help="of what is drawn (default: 42)")
    given.add_argument("--batch_size", metavar="N", help="prompts of a file that are answered at a time (default: 16)")
    given.add_argument("--use_cpu", action="store_true", help="also where there is a GPU")
    return given


def as_options(words: Sequence[str]) -> list[str]:
    """The command line with its first word, MODEL, as an option; a file in YAML stays a file of options."""
    if words and not words[0].startswith("-") and not words[0].endswith((".yaml", ".yml")):
        return [f"--model={words[0]}", *words[1:]]
    return list(words)


if __name__ == "__main__":
    words = as_options(sys.argv[1:])
    if {"-h", "--help"} & {*words}:
        short_help().print_help()
        sys.exit()
    if "--help_all" in words:
        words = ["--help"]
    elif words[:1] == [] or (words[0].startswith("-") and not any(word.startswith("--model") for word in words)):
        short_help().error("name a MODEL")
    with opening():
        from on_policy_data_gen.chatting import GenerateArguments, generate
        from on_policy_data_gen.command_line import run_command
        from on_policy_data_gen.configs import PolicyArguments
    run_command((PolicyArguments, GenerateArguments), generate, words)
