"""Join the passes over the prompts by prompt id: `python on_policy_data_gen/post_process.py --generation_file_dir FOLDER`."""

from alignment.launch.opening import opening

if __name__ == "__main__":
    with opening():
        from pathlib import Path

        from on_policy_data_gen.command_line import run_command
        from on_policy_data_gen.configs import PostProcessArguments
        from on_policy_data_gen.joining import post_process
    run_command((PostProcessArguments,), lambda own: post_process(Path(own.generation_file_dir)))
