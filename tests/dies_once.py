"""A SimPO run whose second process is killed in its first attempt; for `accelerate launch --max_restarts`."""

import os
import sys

from tests.forked import die_in, simpo_main

if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_in(int(os.environ["RANK"]), place="training", number=6, ranks=[1])
    simpo_main(sys.argv[1:])
