"""Send a finished run, or a merged model, to the Hub: `python scripts/push_run.py RUN`, by the token of `hf auth login`."""

import argparse
from pathlib import Path

from alignment.launch.opening import opening


def parser() -> argparse.ArgumentParser:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("folder", metavar="RUN", type=Path, help="folder of a finished run, or what merge_adapter.py left")
    given.add_argument("--list", dest="only_list", action="store_true", help="say what would be sent, and send nothing")
    given.add_argument("--hub_model_id", metavar="NAME", help="repository (default: the recipe's, else the folder's name)")
    privacy = given.add_mutually_exclusive_group()
    privacy.add_argument("--private", dest="hub_private_repo", action="store_true", default=None, help="if it is made now")
    privacy.add_argument("--public", dest="hub_private_repo", action="store_false", default=None, help="if it is made now")
    given.add_argument(
        "--hub_revision", metavar="BRANCH", help="branch, made if there is none (default: the recipe's, else main)"
    )
    given.add_argument("--records", action="store_true", help="also recipe, versions, logs, figures and scored pairs")
    given.add_argument("--checkpoints", action="store_true", help="also checkpoints, with optimizer states")
    return given


if __name__ == "__main__":
    args = parser().parse_args()
    with opening():
        from alignment.afterwards.command import command
        from alignment.afterwards.pushing import push
        from alignment.run.hub import bounded
    try:
        with command("The same command sends what is missing."):
            push(**vars(args))
    except SystemExit as end:
        raise SystemExit(bounded(end.code)) from None
