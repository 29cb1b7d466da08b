"""The curves of a run, from its metrics.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .objective import Objective

BLUE, GREEN, RED = "#2a6fbb", "#2e8b57", "#c8553d"
Metrics = Sequence[dict[str, Any]]


class Series(NamedTuple):
    """One quantity, logged as `key` in training, `eval_` + `key` on held-out rows and `probe_` + `key` on some of training."""

    key: str
    colour: str = BLUE
    label: str | None = None


class Panel(NamedTuple):
    """What one pair of axes shows; `reference` is a value worth a line, `is_share` means quantities from 0 to 1."""

    title: str
    unit: str
    series: tuple[Series, ...]
    reference: float | None = None
    is_share: bool = False


def panels_of(objective: Objective | None) -> list[Panel]:
    """What a run's objective asks to be seen; with a reference, rewards around the line of what has not moved from it."""
    per_token = objective is None or objective.per_token
    unit = "nats per token" if per_token else "nats"
    log_probability = "Mean log-probability" if per_token else "Log-probability"
    panels = [
        Panel("Loss", "loss", (Series("loss"),)),
        Panel("Reward margin", f"beta x {unit}", (Series("rewards/margins"),), reference=0.0),
        Panel("Reward accuracy", "pairs with chosen above rejected", (Series("rewards/accuracies"),), 0.5, is_share=True),
        Panel(log_probability, unit, sides("logps")),
    ]
    if objective is not None and objective.has_reference:
        panels.append(Panel("Reward over the reference", f"beta x {unit}", sides("rewards"), reference=0.0))
    return panels


def sides(quantity: str) -> tuple[Series, Series]:
    return Series(f"{quantity}/chosen", GREEN, "chosen"), Series(f"{quantity}/rejected", RED, "rejected")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in its order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_curves(metrics: Metrics, path: Path, title: str, objective: Objective | None = None) -> None:
    """Write a PNG with a panel for each quantity that the run logged."""
    curves_figure(metrics, title, objective).savefig(path, dpi=150)


def curves_figure(metrics: Metrics, title: str, objective: Objective | None = None) -> Figure:
    panels = [panel for panel in panels_of(objective) if any(curve(metrics, key) for key in logged_keys(panel))]
    columns = min(len(panels), 2) or 1
    rows = -(-len(panels) // 2) or 1
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows + 0.4), layout="constrained")
    figure.suptitle(title if panels else f"{title}: nothing was logged", fontsize=13, fontweight="bold", parse_math=False)
    for place, panel in enumerate(panels, start=1):
        draw_panel(figure.add_subplot(rows, columns, place), panel, metrics)
    return figure


def logged_keys(panel: Panel) -> list[str]:
    return [prefix + series.key for series in panel.series for prefix in ("", "eval_", "probe_")]


def curve(metrics: Metrics, key: str) -> list[tuple[int, float]]:
    """(step, value) of every record that has the key."""
    return [(record["step"], record[key]) for record in metrics if key in record]


def draw_panel(axes: Axes, panel: Panel, metrics: Metrics) -> None:
    if panel.reference is not None:
        axes.axhline(panel.reference, color="0.6", linewidth=0.8, linestyle="--")
    for series in panel.series:
        draw_series(axes, series, metrics)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(panel.unit)
    steps = [record["step"] for record in metrics]
    room = max(1, 0.03 * (max(steps) - min(steps)))  # at least one step, or a single point gets fractional ticks
    axes.set_xlim(min(steps) - room, max(steps) + room)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if panel.is_share:
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def draw_series(axes: Axes, series: Series, metrics: Metrics) -> None:
    """Training thin and light, because it is noisy; held-out figures as a marked line on top, the probe's dashed beside it."""
    name = f"{series.label}, " if series.label else ""
    if train := curve(metrics, series.key):
        marker = "o" if len(train) == 1 else ""  # a line through one point is invisible
        style = {"color": series.colour, "alpha": 0.4, "linewidth": 1, "marker": marker}
        axes.plot(*zip(*train, strict=True), label=f"{name}training", **style)
    if probe := curve(metrics, f"probe_{series.key}"):
        style = {"color": series.colour, "linewidth": 1.2, "linestyle": "--", "marker": "s", "markersize": 3}
        axes.plot(*zip(*probe, strict=True), label=f"{name}training probe", **style)
    if held_out := curve(metrics, f"eval_{series.key}"):
        style = {"color": series.colour, "linewidth": 1.8, "marker": "o", "markersize": 4}
        axes.plot(*zip(*held_out, strict=True), label=f"{name}held-out", **style)
