"""Score responses and pair them: `python on_policy_data_gen/reward_model_annotate.py --generation_file FILE`.

On several devices: `accelerate launch --config_file accelerate_configs/multi_gpu.yaml` in front.
"""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from pathlib import Path

        from on_policy_data_gen.annotation import annotate
        from on_policy_data_gen.command_line import run_command
        from on_policy_data_gen.configs import AnnotateArguments, PairArguments, RewardArguments
    run_command(
        (RewardArguments, PairArguments, AnnotateArguments),
        lambda reward, pairs, own: annotate(reward, pairs, Path(own.generation_file), Path(own.output_dir)),
    )
