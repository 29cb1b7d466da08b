"""A review in words and tables, for the terminal, review.md and the page."""

from collections.abc import Sequence

from .comparison import Cell, Comparison
from .conventions import LENGTH_EDGES, REPLY_BYTES, described
from .figures import (
    NONE,
    Table,
    counted,
    ends,
    factor,
    flips,
    half,
    half_share,
    nats,
    points,
    probability,
    sample,
    share,
)
from .logs import LogSignals
from .reading import Reading
from .signals import Lengths, PairSignals, Replies, Signals
from .verdict import (
    COLLAPSING,
    GENERALIZING,
    INFLATING,
    LENGTH,
    MEMORIZING,
    NO_VERDICT,
    NOT_DECIDABLE,
    OVER_OPTIMIZING,
    SATURATED,
    SMALL,
    UNDER_TRAINED,
    WORSENING,
    Verdict,
)

MEANINGS = {
    COLLAPSING: "chosen responses became half as likely per token, or replies repeat themselves",
    UNDER_TRAINED: "neither held-out pairs nor the training probe moved by what matters",
    GENERALIZING: "more held-out pairs are in the right order than before, and chosen moved away from rejected",
    OVER_OPTIMIZING: "training pairs moved, held-out ones by less than half as much, and their order did not improve by delta",
    INFLATING: "held-out margins grew, and the order of the pairs did not improve by delta: here margins show no learning",
    WORSENING: "fewer held-out pairs are in the right order than before; swapped labels look so",
    NOT_DECIDABLE: "what was recorded does not tell",
    NO_VERDICT: "too few held-out prompts",
    SMALL: "the gain in accuracy is smaller than delta",
    LENGTH: "what was learned may be to prefer a length: the length-matched change is not shown to be above 0",
    MEMORIZING: "training pairs moved by what matters, held-out ones by less than half as much",
    SATURATED: "accuracy at step 0 left no room for a rise of delta",
}  # fmt: skip


def headline(verdict: Verdict) -> str:
    return f"{verdict}: {MEANINGS[verdict.name]}"


def remarks(verdict: Verdict, n: int | None, delta: float) -> list[str]:
    """What stands below the headline, a sentence each."""
    lines = [f"{name}: {MEANINGS[name]}" for name in verdict.qualifiers]
    lines += [f"also {flag}: {MEANINGS[flag]}" if flag in MEANINGS else f"flag: {flag}" for flag in verdict.flags]
    lines += [f"missing: {what}" for what in verdict.missing]
    if verdict.fresh_pairs is not None:
        have = "" if n is None else f"; there are {n:,}"
        lines.append(
            f"fresh held-out pairs to decide a change of {100 * delta:g} points with 80 % power: about "
            f"{verdict.fresh_pairs:,}{have}"
        )
    if verdict.lean:
        lean = ", ".join([verdict.lean, *verdict.lean_qualifiers])
        lines.append(f"leans {lean}, by a finer measure of order; not a verdict")
    return lines


def summary(run: Reading, signals: Signals, verdict: Verdict, delta: float) -> str:
    """The terminal's: verdict, remarks, and the figures it rests on."""
    held_out, lines = signals.held_out, [f"{run.name}: {headline(verdict)}"]
    lines += [f"  {line}" for line in (*run.notes, *remarks(verdict, held_out and held_out.n, delta))]
    if held_out is not None:
        lines += [f"  {label:40} {value}" for label, value in key_figures(signals)]
    elif signals.log is not None:
        lines += [f"  {row[0]:40} {row[1]}" for row in log_table(signals.log).rows if row[1] != NONE]
    return "\n".join(lines)


def key_figures(signals: Signals) -> list[tuple[str, str]]:
    held_out, probe = signals.held_out, signals.probe
    found = [
        ("held-out accuracy by d, before", share(held_out.accuracy_before)),
        ("held-out accuracy by d, after", share(held_out.accuracy_after)),
        ("D, its change", points(held_out.accuracy_change and held_out.accuracy_change.change)),
        ("H, change of d, held-out", nats(held_out.d_change)),
        ("P, change of d, probe", nats(probe and probe.d_change)),
        ("K = H - P/2", nats(signals.gap)),
        ("C, change of the chosen", nats(held_out.chosen_change)),
        ("length-matched change of d", nats(held_out.matched.change)),
    ]
    return [(label, value) for label, value in found if value != NONE]


# ---- Tables ----


def pair_table(signals: Signals) -> Table:
    """What changed, on held-out pairs and on the probe."""
    held_out, probe = signals.held_out, signals.probe
    sides = [each for each in (held_out, probe) if each]

    def row(label: str, cell) -> tuple[str, ...]:
        return (label, *(cell(each) for each in sides))

    rows = [
        row("accuracy by d, step 0", lambda side: share(side.accuracy_before)),
        row("accuracy by d, last step", lambda side: share(side.accuracy_after)),
        row("D: change of accuracy", lambda side: points(side.accuracy_change and side.accuracy_change.change)),
        row("pairs that flipped", lambda side: flips(side.accuracy_change)),
        row("change of mean d (H, P)", lambda side: nats(side.d_change)),
        row("change of order M, in standard deviations of d", lambda side: nats(side.order_change, "sd")),
        row("accuracy by the run's own reward, last step", lambda side: share(side.own.accuracy)),
        row("its change", lambda side: points(side.own.change.change) if side.own.change else own_note(side)),
        row("mean reward margin, last step", lambda side: nats(side.own.margin, "units of reward")),
        row("C: change of the chosen log-probability", lambda side: nats(side.chosen_change)),
        row("perplexity of the chosen", lambda side: factor(side.chosen_change)),
        row("change of the rejected log-probability", lambda side: nats(side.rejected_change)),
        row("chosen responses that became less likely", lambda side: share(side.chosen_fell)),
    ]
    if held_out.saturation:
        rows += [
            row("pairs beyond the loss's margin, last step", lambda side: share(side.saturation.beyond)),
            row("gradient left, mean sigmoid(gamma - margin)", gradient_left),
        ]
    note = "Intervals 95 %. d: chosen minus rejected mean log-probability per token."
    if signals.gap is not None:
        note += f" K = H - P/2: {nats(signals.gap)}, with {sample(probe.n, probe.prompts)} of the probe."
    if held_out.truncated:
        note += f" {counted(held_out.truncated, 'held-out pair')} of {held_out.n:,} were truncated."
    return Table("What changed", ("", "held-out", *(["training probe"] if probe else [])), rows, note)


def own_note(side: PairSignals) -> str:
    p = probability(side.own.accuracy.p)
    return f"none: rewards are 0 at step 0 or unknown; against one half, {p} ({sample(side.n, side.prompts)})"


def gradient_left(side: PairSignals) -> str:
    saturation = side.saturation
    before = "" if saturation.gradient_before is None else f"{saturation.gradient_before:.3f} -> "
    return f"{before}{saturation.gradient_after:.3f} ({sample(side.n, side.prompts)})"


def length_table(held_out: PairSignals, lengths: Lengths) -> Table:
    rows = [(group.name, share(group.before), share(group.after)) for group in lengths.groups]
    matched = held_out.matched
    told = nats(matched.change) if matched.change else "none: these pairs cannot tell brevity from preference"
    n = counted(held_out.n, "pair")
    ranks = [f"{rank:+.2f} ({n})" if rank is not None else NONE for rank in (lengths.rank_before, lengths.rank_after)]
    rows += [
        ("rank correlation (Spearman) of length difference and d", *ranks),
        ('what "the longer one wins" would get', *[f"{100 * lengths.longer_wins:.1f} % ({n})"] * 2),
        ('what "the shorter one wins" would get', *[f"{100 * lengths.shorter_wins:.1f} % ({n})"] * 2),
        ("length-matched change of d", NONE, told),
    ]
    edges = ", ".join(map(str, LENGTH_EDGES))
    note = (
        f"Lengths in tokens. Length-matched: bins of |log(chosen / rejected)| at {edges}; {matched.pairs:,} pairs on the "
        "thinner sides of the bins. A model that only learned to be brief, or long, has none."
    )
    return Table("Accuracy by d and length, held-out", ("", "step 0", "last step"), rows, note)


def reply_table(replies: Replies) -> Table:
    n, change = counted(replies.n, "prompt"), replies.ratio_change
    ratio = NONE if change is None else nats(change, "").replace("pair", "prompt")
    rows = [
        ("length, before", f"{replies.length_before:.1f} {replies.unit} (mean, {n})"),
        ("length, after", f"{replies.length_after:.1f} {replies.unit} (mean, {n})"),
        ("change of the zlib ratio", ratio),
    ]
    note = f"zlib ratio: compressed / plain bytes, both replies cut to one length of {REPLY_BYTES} bytes at least."
    return Table("Sampled replies", ("", ""), rows, note)


def log_table(log: LogSignals) -> Table:
    """Figures of a bare log: no intervals, since a log has no pairs."""
    rows = [
        ("training margin, first half of the log", half(log.early_margin, " units of reward")),
        ("training margin, second half", half(log.late_margin, " units of reward")),
        ("training accuracy, second half", half_share(log.late_accuracy)),
        ("chosen reward, first half", half(log.early_chosen, " units of reward")),
        ("chosen reward, second half", half(log.late_chosen, " units of reward")),
        ("rejected reward, second half", half(log.late_rejected, " units of reward")),
        ("held-out margin", ends(log.held_out_margin, " units of reward")),
        ("held-out accuracy", ends(log.held_out_accuracy, " %", 100)),
        ("probe margin", ends(log.probe_margin, " units of reward")),
        ("probe accuracy", ends(log.probe_accuracy, " %", 100)),
    ]
    note = "Means of logged records, in the run's own units of reward; -> from the first to the last record, at its step."
    if log.malformed or log.not_finite:
        note += f" Left out: {log.malformed} malformed lines, {log.not_finite} values that are not finite."
    return Table("From the log", ("", ""), [row for row in rows if row[1] != NONE], note)


def convention_table(delta: float, spread: float | None) -> Table:
    note = "Thresholds are conventions. Others can be defended; --delta changes the one that matters most."
    return Table("Conventions", ("", ""), [tuple(row) for row in described(delta, spread)], note)


# ---- Several runs ----


def overview_table(runs: Sequence[Reading], signals: Sequence[Signals], verdicts: Sequence[Verdict]) -> Table:
    """A row each run."""
    rows = []
    for run, seen, verdict in zip(runs, signals, verdicts, strict=True):
        held_out, probe = seen.held_out, seen.probe
        rows.append((
            run.name,
            run.objective or NONE,
            str(verdict) + (f" (leans {verdict.lean})" if verdict.lean else ""),
            share(held_out.accuracy_after) if held_out else NONE,
            points(held_out.accuracy_change.change) if held_out and held_out.accuracy_change else NONE,
            nats(held_out.d_change) if held_out else NONE,
            nats(probe.d_change) if probe else NONE,
        ))  # fmt: skip
    header = ("run", "objective", "verdict", "held-out accuracy by d", "D", "H, held-out", "P, probe")
    return Table("The runs", header, rows, "Each run on its own held-out pairs, last step; intervals 95 %.")


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    rows = []
    for each in comparisons:
        alone = f"{each.n:,} pairs; {each.first_alone:,} and {each.second_alone:,} unmatched"
        agree = f"{each.agreeing:,} of {each.n:,} pairs have the same tokens"
        rows.append((
            f"{each.first} minus {each.second}" + (" (single seeds)" if each.single_seeds else ""),
            alone,
            f"{points(each.by_d.change)}, {probability(each.adjusted_d)}",
            f"{points(each.by_reward.change)}, {probability(each.adjusted_reward)}",
            f"{nats(each.d)}" if each.d else agree,
            f"{nats(each.chosen)}" if each.chosen else agree,
        ))  # fmt: skip
    note = (
        "Last step of each run, on the held-out pairs that both have. p by Holm, over "
        f"{counted(len(comparisons), 'comparison')} of each measure; intervals 95 %, not adjusted. Mean log-probabilities are "
        "compared where the responses have equally many tokens. Single seeds: such an interval speaks of pairs, not of seeds; "
        "where seeds spread by one point, two seeds of one recipe differ so in one case of seven at 500 pairs."
    )
    header = ("runs", "shared pairs", "accuracy by d", "accuracy by own reward", "mean d", "mean chosen log-probability")
    return Table("Paired differences", header, rows, note)


def seed_table(cells: Sequence[Cell]) -> Table:
    rows = []
    for cell in cells:
        sizes = f"{min(cell.pairs):,}" if len(set(cell.pairs)) == 1 else f"{min(cell.pairs):,} to {max(cell.pairs):,}"
        for name, values in (("d", cell.accuracies), ("own reward", cell.own_accuracies)):
            spread = "one seed" if len(values) == 1 else f"{100 * min(values):.1f} to {100 * max(values):.1f} %"
            mean = f"{100 * sum(values) / len(values):.1f} % ({sizes} pairs a seed)"
            rows.append((", ".join(cell.runs), name, counted(len(values), "seed"), mean, spread))
    deviations = [f"{100 * cell.deviation:.1f} points ({cell.runs[0]} ...)" for cell in cells if cell.deviation is not None]
    note = f"Held-out, last step. Standard deviation of the accuracy by d over seeds: {'; '.join(deviations)}."
    return Table("Seeds", ("runs of one recipe", "accuracy by", "seeds", "mean", "lowest to highest"), rows, note)
