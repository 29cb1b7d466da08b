"""Averages over many micro-batches and processes, without waiting for the device until they are logged."""

import torch
from accelerate import Accelerator
from torch import Tensor


class RunningMeans:
    """Named sums and counts, kept on the device; `flush` reduces them over all processes and starts anew."""

    def __init__(self) -> None:
        # double: a window may hold millions of tokens. A count that is known without the device stays off it.
        self._totals: dict[str, tuple[Tensor, Tensor | float]] = {}

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Add `count` observations whose values sum to `total` (a scalar tensor)."""
        total, count = total.detach().double(), count.double() if isinstance(count, Tensor) else float(count)
        if name in self._totals:
            old_total, old_count = self._totals[name]
            total, count = old_total + total, old_count + count
        self._totals[name] = total, count

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each name since the last flush, over all processes, which must all have added the same names."""
        if not self._totals:
            return {}
        # A count is written on the device: copied there, each would be waited for.
        sums = [torch.stack([total, count if isinstance(count, Tensor) else torch.full_like(total, count)])
                for total, count in self._totals.values()]  # fmt: skip
        sums = accelerator.reduce(torch.stack(sums), reduction="sum")  # (names, 2)
        means = (sums[:, 0] / sums[:, 1]).tolist()
        names = list(self._totals)
        self._totals.clear()
        return dict(zip(names, means, strict=True))

    def state(self) -> dict[str, list[str]]:
        """What this process has summed up since the last flush: name -> sum and count, exact, as hexadecimal numbers."""
        return {name: [float(value).hex() for value in item] for name, item in self._totals.items()}

    def restore(self, state: dict[str, list[str]], device: torch.device) -> None:
        for name, (total, count) in state.items():
            total = torch.tensor(float.fromhex(total), dtype=torch.float64, device=device)
            self.add(name, total, float.fromhex(count))
