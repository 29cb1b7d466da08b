"""Settings outside of what SimPO's authors found to work: said once in the code, by a dry run and by a run."""

import pytest

from alignment.watch.settings import settings_at_risk
from scripts.orpo_config import ORPOConfig
from scripts.simpo_config import SimPOConfig


def named(config=SimPOConfig, *, is_whole: bool = True, rows_per_step: int = 128, **settings) -> set[str]:
    args = config(output_dir="out", report_to="none", use_cpu=True, **{"learning_rate": 1e-6, **settings})
    return set(settings_at_risk(args, is_whole=is_whole, rows_per_step=rows_per_step))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, set()),
        ({"learning_rate": 4.9e-6}, set()),
        ({"learning_rate": 5e-6}, {"learning_rate"}),
        ({"learning_rate": 1e-5, "is_whole": False}, set()),  # an adapter's
        ({"learning_rate": 8e-6, "config": ORPOConfig}, set()),  # its authors' own
        ({"learning_rate": 1e-5, "config": ORPOConfig}, {"learning_rate"}),
        ({"rows_per_step": 32}, set()),
        ({"rows_per_step": 31}, {"pairs_per_step"}),
        ({"gamma_beta_ratio": 1.0}, set()),
        ({"gamma_beta_ratio": 1.1}, {"gamma_beta_ratio"}),
        ({"gamma_beta_ratio": 2.0, "rows_per_step": 4}, {"pairs_per_step", "gamma_beta_ratio"}),
    ],
)  # fmt: skip
def test_what_the_authors_do_not_do_is_named(settings, names):
    assert named(**settings) == names
