"""What the entry points of this wing share: quiet libraries, one message, an exit status."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.constants
import transformers

from ..run.failures import told
from ..run.output import log_to_stdout, outlast_readers


@contextmanager
def command(again: str) -> Iterator[None]:
    """Around all that an entry point does. again: see `told`."""
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    outlast_readers()
    with told(again):
        log_to_stdout()
        logging.getLogger("alignment").setLevel(logging.INFO)
        transformers.utils.logging.set_verbosity_error()
        yield
