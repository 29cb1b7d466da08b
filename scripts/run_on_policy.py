"""On-policy preference data as one recipe: `python scripts/run_on_policy.py training_configs/on-policy/RECIPE.yaml`.

Killed at any point, the same command goes on. On several devices put `accelerate launch --config_file
accelerate_configs/multi_gpu.yaml` in front, unless vLLM or a server generates.
"""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from on_policy_data_gen.command_line import run_command
        from on_policy_data_gen.recipe import KINDS, run_recipe
    run_command(KINDS, run_recipe)
