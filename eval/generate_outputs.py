"""Answer a benchmark's questions with a model, for its judge: `python eval/generate_outputs.py eval/BENCHMARK/SETTINGS.yaml`.

Give --model, --prompts and --output too. Killed, the same command goes on.
"""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from eval.answering import evaluate
        from eval.settings import EvaluationArguments
        from on_policy_data_gen.command_line import run_command
        from on_policy_data_gen.configs import PolicyArguments
    run_command((PolicyArguments, EvaluationArguments), evaluate)
