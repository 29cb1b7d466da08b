"""A SimPO run whose second process is killed in its first attempt; for `accelerate launch --max_restarts`."""

import os
import sys

from tests.forked import die_in, main_of

if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_in(int(os.environ["RANK"]), place="training", number=6, ranks=[1])
    main_of("simpo", sys.argv[1:])
