"""Figures that are to agree although their sums were taken in another order: by other processes, layouts or kernels."""

from math import isclose

# A float32 sum, taken in another order, strays by a few units of its seventh digit.
RELATIVE, OF_OPERANDS = 1e-5, 1e-6


def differing(found: dict[str, float], wanted: dict[str, float], *, beta: float = 1.0) -> dict[str, tuple[float, float]]:
    """Figures of a record that do not agree with those wanted, both of each.

    What is a difference (a margin of two rewards, a reward that is a log-ratio, a loss of either) is as exact as its operands
    are, whatever is left of them. beta: of the rewards, where they are log-ratios.
    """
    assert found.keys() == wanted.keys()
    return {
        key: (found[key], value)
        for key, value in wanted.items()
        if not isclose(found[key], value, rel_tol=RELATIVE, abs_tol=OF_OPERANDS * (1 + operands(key, wanted, beta)))
    }


def operands(key: str, record: dict[str, float], beta: float) -> float:
    """The size of what a figure is the difference of; 0 where it is none."""
    if not key.endswith(("margins", "loss", "rewards/chosen", "rewards/rejected")):
        return 0.0
    rewards = [abs(value) for name, value in record.items() if "rewards/" in name and name.endswith(("chosen", "rejected"))]
    logps = [beta * abs(value) for name, value in record.items() if "logps/" in name]
    return max(rewards + logps, default=0.0)
