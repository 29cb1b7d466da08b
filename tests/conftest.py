"""Fixtures of every test: no network, no cache of the user's, one thread, tokenizers made here."""

import os
import signal

# Read when the libraries are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import huggingface_hub.constants
import hypothesis
import pytest
import torch

from tests import builders

# The same examples on every machine; no time limit, because the first one trains a tokenizer.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ears():
    """Signals as in a terminal, for tests and what they start: nohup, and a script's &, have a process ignore these."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """An empty cache of data sets for the session, so that nothing is found that another run left."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def hub_home(tmp_path_factory):
    """A home for the session in which checkpoints are signed, also by processes that a test starts."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(folder))
        patch.setenv("HF_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tokenizer():
    """Shared by all tests: one that changes its tokenizer calls `builders.bpe_tokenizer` itself."""
    return builders.bpe_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_without_bos():
    return builders.bpe_tokenizer(bos=False)
