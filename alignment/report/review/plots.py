"""Plots as SVG text for the page. Colours are CSS variables there, so that a plot is light or dark as the page is."""

import io
import re
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .conventions import COLLAPSE_NATS, STILL_NATS, accuracy_shift
from .figures import counted
from .logs import ACCURACY, MARGIN, PROBE, TRAIN, Log
from .pairs import Pairs
from .signals import Lengths, Signals
from .statistics import Estimate

# Stand-ins: matplotlib draws with them, and `svg_of` writes the page's variables in their places.
COLOURS = {
    "ink": "#101112", "muted": "#707172", "grid": "#d0d1d2", "band": "#e8e9ea", "blue": "#2a6fbb", "green": "#2e8b57",
    "red": "#c8553d",
}  # fmt: skip
INK, MUTED, GRID, BAND, BLUE, GREEN, RED = COLOURS.values()
WIDTH = 5.2  # inches; at 72 a inch a plot fills a narrow window at its own size
STYLE = {
    "font.size": 10, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED,
    "ytick.color": INK, "xtick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "review",
    "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 9,
    "text.parse_math": False,  # a run's name may hold dollars
}  # fmt: skip
MANY = 800  # points, above which they are drawn as one picture inside the SVG
Bar = tuple[str, Estimate, str]  # label, figure, colour


def svg_of(height: float, draw: Callable[[Figure], None], label: str) -> str:
    """An SVG element that scales with the page; `label` is what it says to who does not see it."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    # Its size is the page's to say.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace(
        "<svg", f'<svg role="img" aria-label="{label}"', 1
    )


# ---- Intervals ----


def draw_intervals(
    axes: Axes, bars: Sequence[Bar], unit: str, scale: float = 1.0, band: float | None = None, origin: float = 0.0
) -> None:
    """One interval a line; the band is what counts as no change, `origin` where there is none."""
    axes.axvline(origin * scale, color=MUTED, linewidth=0.8)
    if band is not None:
        axes.axvspan(-band * scale, band * scale, color=BAND, linewidth=0)
    for place, (_, estimate, colour) in enumerate(reversed(bars)):
        low, high = (bound if np.isfinite(bound) else estimate.value for bound in (estimate.low, estimate.high))
        axes.plot([low * scale, high * scale], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([estimate.value * scale], [place], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)])
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)


def counted_label(name: str, estimate: Estimate) -> str:
    return f"{name}\nn = {estimate.n:,}"


def changes(signals: Signals, delta: float) -> str:
    """D, H and P, C: what the verdict is made of, each with what counts as none."""
    held_out, probe = signals.held_out, signals.probe
    sides = [("held-out", held_out, BLUE), *([("probe", probe, GREEN)] if probe and probe.d_change else [])]
    h = accuracy_shift(delta, held_out.spread)
    of_d = [(counted_label(name, side.d_change), side.d_change, colour) for name, side, colour in sides]
    if signals.gap is not None:
        of_d.append((f"K = H - P/2\nn = {held_out.n:,}, {probe.n:,}", signals.gap, MUTED))

    def draw(figure: Figure) -> None:
        rows = [len(sides), len(of_d), 2]
        first, second, third = figure.subplots(3, 1, height_ratios=[row + 1 for row in rows])
        accuracies = [(name, side.accuracy_change.change, colour) for name, side, colour in sides]
        accuracies = [(counted_label(name, estimate), estimate, colour) for name, estimate, colour in accuracies]
        draw_intervals(first, accuracies, f"change of accuracy, points (band: ±{100 * delta:g})", 100, delta)
        draw_intervals(second, of_d, f"change of d, nats per token (band: ±h = {h:.3g})", band=h)
        responses = (("chosen", held_out.chosen_change, GREEN), ("rejected", held_out.rejected_change, RED))
        responses = [(counted_label(name, estimate), estimate, colour) for name, estimate, colour in responses]
        draw_intervals(third, responses, f"change of log-probability, nats per token (band: ±{STILL_NATS})", band=STILL_NATS)
        if held_out.chosen_change.low < -COLLAPSE_NATS / 2:
            third.axvline(-COLLAPSE_NATS, color=RED, linewidth=0.8, linestyle="--")

    return svg_of(5.4, draw, "Intervals of the changes of accuracy, of d and of log-probabilities")


def run_accuracies(names: Sequence[str], estimates: Sequence[Estimate]) -> str:
    """Held-out accuracy of several runs."""
    bars = [(counted_label(shortened(name), estimate), estimate, BLUE) for name, estimate in zip(names, estimates, strict=True)]

    def draw(figure: Figure) -> None:
        draw_intervals(figure.subplots(), bars, "held-out accuracy by d, %", 100, origin=0.5)

    return svg_of(0.9 + 0.5 * len(bars), draw, "Held-out accuracy of each run")


def paired_differences(names: Sequence[str], estimates: Sequence[Estimate], delta: float) -> str:
    bars = [(counted_label(name, estimate), estimate, BLUE) for name, estimate in zip(names, estimates, strict=True)]

    def draw(figure: Figure) -> None:
        draw_intervals(figure.subplots(), bars, f"difference of accuracy by d, points (band: ±{100 * delta:g})", 100, delta)

    return svg_of(0.9 + 0.75 * len(bars), draw, "Paired differences of accuracy between runs")


def shortened(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else f"...{name[3 - longest :]}"


# ---- Pairs ----


def pair_by_pair(pairs: Pairs) -> str:
    """d of each pair before and after; what crossed an axis changed the accuracy."""
    before, after = pairs.before.d, pairs.after.d
    kinds = (
        ("right before and after", (before > 0) & (after > 0), MUTED),
        ("wrong before and after", (before <= 0) & (after <= 0), MUTED),
        ("turned right", (before <= 0) & (after > 0), GREEN),
        ("turned wrong", (before > 0) & (after <= 0), RED),
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        low, high = min(before.min(), after.min()), max(before.max(), after.max())
        axes.plot([low, high], [low, high], color=GRID, linewidth=1, zorder=0)
        axes.axhline(0, color=MUTED, linewidth=0.8, zorder=0)
        axes.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
        for name, members, colour in kinds:
            style = {"s": 14, "color": colour, "linewidths": 0, "alpha": 0.75}
            points = axes.scatter(before[members], after[members], label=f"{name}: {members.sum():,}", **style)
            points.set_rasterized(len(before) > MANY)
        axes.set_xlabel("d before the first step, nats per token")
        axes.set_ylabel("d after the last step, nats per token")
        figure.legend(loc="outside upper center", ncols=2, handletextpad=0.2, columnspacing=1.2)

    return svg_of(4.6, draw, "d of each held-out pair before and after")


def distributions(held_out: Pairs, probe: Pairs | None) -> str:
    """Where d stands before and after, held-out above, probe below."""
    sets = [("held-out", held_out), *([("training probe", probe)] if probe is not None and probe.before is not None else [])]
    everything = np.concatenate([scores.d for _, pairs in sets for scores in (pairs.before, pairs.after)])
    # Heavy tails would leave one bin for the rest.
    edges = np.linspace(*np.quantile(everything, [0.005, 0.995]), 41) if np.ptp(everything) > 0 else 10

    def draw(figure: Figure) -> None:
        for axes, (name, pairs) in zip(np.ravel(figure.subplots(len(sets), 1, sharex=True)), sets, strict=True):
            for label, values, style in (
                ("before", pairs.before.d, {"color": MUTED}),
                ("after", pairs.after.d, {"color": BLUE}),
            ):
                axes.hist(values, edges, histtype="step", linewidth=1.6, label=label, **style)
            axes.axvline(0, color=MUTED, linewidth=0.8)
            axes.set_title(f"{name}, n = {len(pairs):,}")
            axes.set_ylabel("pairs")
        axes.set_xlabel("d, nats per token (the outermost 1 % are not shown)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)

    return svg_of(1.0 + 1.8 * len(sets), draw, "Distribution of d before and after")


def by_length(lengths: Lengths) -> str:
    """Accuracy where chosen is longer, shorter, as long; and what a rule that sees length alone would get."""
    groups = lengths.groups

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, group in enumerate(groups):
            for offset, estimate, colour in ((-0.12, group.before, MUTED), (0.12, group.after, BLUE)):
                if estimate is not None:
                    axes.plot([place + offset] * 2, [100 * estimate.low, 100 * estimate.high], color=colour, linewidth=2.5)
                    axes.plot([place + offset], [100 * estimate.value], "o", color=colour, markersize=5)
        for name, value, style in (
            ("the longer one wins", lengths.longer_wins, "--"),
            ("the shorter one wins", lengths.shorter_wins, ":"),
        ):
            axes.axhline(100 * value, color=RED, linewidth=1, linestyle=style, label=f"{name}: {100 * value:.0f} % of all")
        for label, colour in (("before", MUTED), ("after", BLUE)):
            axes.plot([], [], "o-", color=colour, label=label)
        axes.set_xticks(range(len(groups)), [f"{group.name}\nn = {group.after.n:,}" for group in groups])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(-2, 102)
        axes.set_ylabel("accuracy by d, %")
        figure.legend(loc="outside upper center", ncols=2)

    return svg_of(3.6, draw, "Accuracy by length")


# ---- The log ----


def log_curves(log: Log, held_out: Log | None = None) -> str | None:
    """Margin and accuracy over the run: training, probe, held-out; None where none was logged."""
    apart = held_out or log
    curves = (("training", log, TRAIN, MUTED), ("probe", log, PROBE, GREEN), ("held-out", apart, apart.held_out, BLUE))
    panels = [
        (metric, title, [(name, source.series(split, metric), colour) for name, source, split, colour in curves])
        for metric, title in ((MARGIN, "reward margin, the run's units"), (ACCURACY, "accuracy by own reward"))
    ]
    panels = [panel for panel in panels if any(series for _, series, _ in panel[2])]
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        handles: dict[str, object] = {}
        for axes, (metric, title, lines) in zip(np.ravel(figure.subplots(len(panels), 1, sharex=True)), panels, strict=True):
            for name, series, colour in lines:
                if series:
                    width, marker = (1, None) if name == "training" and len(series) > 1 else (1.8, "o")
                    style = {"color": colour, "linewidth": width, "marker": marker, "markersize": 4}
                    (line,) = axes.plot(*zip(*series, strict=True), **style)
                    handles.setdefault(f"{name}, {counted(len(series), 'record')}", line)
            axes.set_title(title)
            axes.grid(color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            if metric == ACCURACY:
                axes.set_ylim(-0.02, 1.03)
                axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.set_xlabel("optimizer step" if log.has_steps else "record")
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, columnspacing=1.0)

    return svg_of(1.0 + 1.9 * len(panels), draw, "Margins and accuracies over the run")
