"""Chat with a model, an adapter or a checkpoint, or answer a file of prompts: `python scripts/generate.py MODEL`.

With --input PROMPTS --output RESPONSES.jsonl every prompt is answered; killed, the same command goes on. Without, it is a
conversation on the terminal, in the template that is saved with the model; /new begins another.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from alignment.launch.opening import opening

# Options that the short help tells of, and what stands for their values there.
MOST_NEEDED = {
    "input": "PROMPTS",
    "output": "FILE",
    "system": "TEXT",
    "temperature": "T",
    "max_tokens": "N",
    "seed": "N",
    "batch_size": "N",
    "use_cpu": "",
}


def short_help() -> argparse.ArgumentParser:
    """What most need, as the fields say it; the options themselves are read by the suite's own parser, with its errors."""
    with opening():
        from on_policy_data_gen.chatting import GenerateArguments
        from on_policy_data_gen.configs import PolicyArguments
    fields_of = {each.name: each for kind in (PolicyArguments, GenerateArguments) for each in fields(kind)}
    given = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        usage="%(prog)s MODEL [--input PROMPTS --output RESPONSES.jsonl] [--key=value ...]",
        epilog="--help_all lists every option: engines (vLLM, a server), templates, precision.",
    )
    given.add_argument("model", metavar="MODEL", help="folder or Hub name of a model, an adapter or a checkpoint")
    for name, metavar in MOST_NEEDED.items():
        option = fields_of[name]
        default = "" if option.default in (None, False) else f" (default: {option.default})"
        kind: dict[str, Any] = {"action": "store_true"} if option.default is False else {"metavar": metavar}
        given.add_argument(f"--{name}", **kind, help=(option.metadata["help"] + default).replace("%", "%%"))
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
