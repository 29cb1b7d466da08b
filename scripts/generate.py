"""Chat with a model, an adapter or a checkpoint, or answer a file of prompts: `python scripts/generate.py MODEL`.

With --input PROMPTS --output RESPONSES.jsonl every prompt is answered; killed, the same command goes on. Without, it is a
conversation on the terminal, in the template that is saved with the model.
"""

import sys

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from on_policy_data_gen.chatting import GenerateArguments, generate
        from on_policy_data_gen.command_line import run_command
        from on_policy_data_gen.configs import PolicyArguments
    words = sys.argv[1:]
    if words and not words[0].startswith("-") and not words[0].endswith((".yaml", ".yml")):
        words = [f"--model={words[0]}", *words[1:]]
    run_command((PolicyArguments, GenerateArguments), generate, words)
