"""Sample one response of the policy to every prompt: `python on_policy_data_gen/decode.py --model NAME --seed 13`."""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from pathlib import Path

        from on_policy_data_gen.command_line import run_command
        from on_policy_data_gen.configs import DecodeArguments, PolicyArguments, PromptArguments
        from on_policy_data_gen.responses import decode
    run_command(
        (PromptArguments, PolicyArguments, DecodeArguments),
        lambda prompts, policy, own: decode(prompts, policy, [own.seed], Path(own.output_dir)),
    )
