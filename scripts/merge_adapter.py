"""Merge a LoRA adapter into its base: `python scripts/merge_adapter.py RUN_OR_ADAPTER OUTPUT` leaves a whole model in OUTPUT.

Sums are computed in float32 on the CPU; the result is read again and compared before it appears.
"""

import argparse
from pathlib import Path

from alignment.launch.opening import opening


def parser() -> argparse.ArgumentParser:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("adapter", metavar="RUN_OR_ADAPTER", help="folder or Hub name: an adapter's run, checkpoint or files")
    given.add_argument("output", metavar="OUTPUT", type=Path, help="folder that is made; one that exists is refused")
    given.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (default: the base's)")
    given.add_argument("--revision", default="main", help="of the adapter on the Hub (default: main)")
    given.add_argument("--base", help="model to merge into (default: the one that the adapter names)")
    given.add_argument("--base_revision", help="of the base on the Hub (default: the one that the adapter names)")
    given.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base")
    return given


if __name__ == "__main__":
    args = parser().parse_args()
    with opening():
        from alignment.afterwards.command import command
        from alignment.afterwards.merging import merge_adapter
    options = {key: value for key, value in vars(args).items() if key not in ("adapter", "output")}
    with command("Nothing was left in OUTPUT; the same command begins again."):
        merge_adapter(args.adapter, args.output.expanduser(), **options)
