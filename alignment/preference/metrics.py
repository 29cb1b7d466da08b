"""Averages over many micro-batches and processes, without waiting for the device until they are logged."""

import torch
from accelerate import Accelerator
from torch import Tensor


class RunningMeans:
    """Named sums and counts, kept on the device; `flush` reduces them over all processes and starts anew."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # name -> (2,) sum, count

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add `count` observations whose values sum to `total` (a scalar tensor)."""
        count = torch.as_tensor(count, device=total.device)
        item = torch.stack([total.detach().double(), count.double()])  # double: a window may hold millions of tokens
        self._totals[name] = self._totals[name] + item if name in self._totals else item

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each name since the last flush, over all processes, which must all have added the same names."""
        if not self._totals:
            return {}
        totals = accelerator.reduce(torch.stack(list(self._totals.values())), reduction="sum")  # (names, 2)
        means = (totals[:, 0] / totals[:, 1]).tolist()
        names = list(self._totals)
        self._totals.clear()
        return dict(zip(names, means, strict=True))

    def state(self) -> dict[str, list[str]]:
        """What this process has summed up since the last flush: name -> sum and count, exact, as hexadecimal numbers."""
        return {name: [value.hex() for value in item.tolist()] for name, item in self._totals.items()}

    def restore(self, state: dict[str, list[str]], device: torch.device) -> None:
        for name, item in state.items():
            total, count = (torch.tensor(float.fromhex(value), dtype=torch.float64, device=device) for value in item)
            self.add(name, total, count)
