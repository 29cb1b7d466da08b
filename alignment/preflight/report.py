"""What a dry run prints, section by section, as soon as each is known."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.splits import Prepared
from ..preference.memory import GIB
from .disk import Disk
from .lengths import PairFacts, Spread
from .memory import MOST_TOKENS, Fit, Memory
from .model import Skeleton
from .settings import Origin, shown
from .steps import Duration, Schedule, Speed, StepTokens

WIDTH = 120  # columns, where no terminal says how many there are
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "layer", "head", "gathered", "step")
MEANINGS = {
    "activations": "activations, forward to backward",
    "layer": "one layer, running",
    "head": "head and embedding",
    "gathered": "gathered weights, buffers",
    "step": "optimizer's temporaries",
}


def new_console() -> Console:
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


class Report:
    """Prints to one console; nothing is kept."""

    def __init__(self, console: Console):
        self.console = console

    def section(self, title: str) -> None:
        self.console.print()
        self.console.print(Text(f"== {title}", style="bold"))

    def lines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.console.print(Text(line))

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Text in the first column, figures in the others."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.console.print(table)

    # ---- Sections ----

    def recipe(self, place: str, found: Sequence[Origin]) -> None:
        self.section(f"Recipe: {place}")
        given = [origin for origin in found if not origin.is_default]
        width = max((len(origin.key) for origin in given), default=0)
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=width, no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for origin in given:
            table.add_row(Text(origin.key), Text(shown(origin)), Text(origin.source, style="dim"))
        self.console.print(table)

    def defaults(self, found: Sequence[Origin]) -> None:
        self.section("At their defaults")
        defaults = " · ".join(f"{origin.key} = {shown(origin)}" for origin in found if origin.is_default)
        self.console.print(Text(defaults, style="dim"))

    def model(self, name: str, skeleton: Skeleton, template: str, attention: str) -> None:
        self.section(f"Model: {name}")
        trained = "" if skeleton.trained == skeleton.parameters else f", {skeleton.trained / 1e6:,.1f} million trained"
        layouts = [] if skeleton.why_padded is None else [f"pairs are padded: {skeleton.why_padded}"]
        self.lines([
            f"{skeleton.config.model_type}, {skeleton.parameters / 1e6:,.1f} million parameters{trained}, "
            f"{str(skeleton.dtype).removeprefix('torch.')}, attention {attention}",
            *layouts,
            f"chat template: {template}",
        ])  # fmt: skip

    def data(self, splits: dict[str, Prepared]) -> None:
        self.section("Data")
        for name, split in splits.items():
            self.lines([f"{name}: {split.report}"])
            self.lines(f"  {note}" for note in [*split.notes[1:], *split.report.places])

    def pairs(self, facts: dict[str, PairFacts], shared: int | None) -> None:
        self.section("Lengths, in tokens")
        rows = [(f"{split} {part}", *figures(spread)) for split, fact in facts.items() for part, spread in fact.lengths.items()]
        self.table(("", "least", "median", "mean", "95 %", "most"), rows)
        self.console.print()
        counts = [
            ("pairs", lambda fact: f"{fact.pairs:,}"),
            ("truncated", lambda fact: f"{fact.truncated:,}"),
            ("dropped, no token left to score", lambda fact: f"{fact.dropped:,}"),
            ("both responses the same tokens", lambda fact: f"{fact.identical:,}"),
            ("prompt of an earlier pair", lambda fact: f"{fact.repeated_prompts:,}"),
            ("the longer response wins", lambda fact: f"{fact.chosen_longer:.1%}"),
            ("the shorter response wins", lambda fact: f"{fact.rejected_longer:.1%}"),
        ]
        self.table(("", *facts), [(what, *(count(fact) for fact in facts.values())) for what, count in counts])
        if shared is not None:
            self.lines([f"held-out pairs whose prompt is trained on: {shared:,}"])

    def conversations(self, spreads: dict[str, tuple[Spread, int]]) -> None:
        self.section("Lengths, in tokens")
        rows = [(name, *figures(spread), f"{cut:,}") for name, (spread, cut) in spreads.items()]
        self.table(("", "least", "median", "mean", "95 %", "most", "truncated"), rows)

    def steps(self, schedule: Schedule, rows: int, tokens: StepTokens, what: str, outlook: str) -> None:
        self.section("Steps")
        self.lines([
            f"{rows:,} {what}, {schedule.rows_per_step:,} a step ({schedule.per_device} x {schedule.accumulation} x "
            f"{counted(schedule.processes, 'process', 'es')}): {schedule.steps_per_epoch:,} steps an epoch, "
            f"{schedule.steps:,} in all ({schedule.epochs:.3g} epochs)",
            f"tokens a step, over all processes: {tokens.mean:,.0f} on average, {tokens.least:,} to {tokens.most:,}, standard "
            f"deviation {tokens.deviation:,.0f}; {tokens.epoch:,} an epoch",
            f"{counted(schedule.evaluations, 'evaluation')}, {counted(schedule.checkpoints, 'checkpoint')}",
            f"output_dir: {outlook}",
        ])  # fmt: skip

    def memory(self, memory: Memory, gpu_memory: float | None) -> None:
        plan = memory.plan
        self.section(f"Memory of each device, estimated: {plan.strategy}, {counted(plan.processes, 'process', 'es')}")
        self.table(
            ("GiB", "longest step", "usual step"),
            [
                ("tokens of a micro-batch", *(f"{batch.tokens:,}" for batch in (memory.longest, memory.usual))),
                *((MEANINGS.get(name, name), *cells(memory, name)) for name in CATEGORIES),
                ("peak", *cells(memory, "total")),
                ("highest in", *(batch.peak.where for batch in (memory.longest, memory.usual))),
            ],
        )
        recomputed = f"{memory.division.recompute_layers} of {memory.layers} layers computed again in the backward pass"
        reasons = {
            "chosen": "chosen as a run on such a GPU would",
            "least": "the least that a run can do with",
            "given": "as the recipe says",
        }
        self.lines([f"{recomputed}; {reasons[memory.reason]}"])
        if plan.device_type == "cuda":
            low, high = memory.context
            self.lines([
                f"Besides, CUDA and NCCL take {low} to {high} GiB: a guess, not measured. A micro-batch is expected to fit "
                f"where its peak and {high} GiB do."
            ])  # fmt: skip
        self.console.print()
        header = (
            "device",
            "largest max_tokens_per_micro_batch",
            "this run's micro-batch",
            "layers computed again",
            "peak, GiB",
        )
        self.table(header, map(fit_row, memory.fits))

    def time(self, duration: Duration, speed: Speed, price: float | None) -> None:
        self.section("Time")
        cost = "" if duration.cost is None else f"; at {price:g} for a GPU and hour, {duration.cost:,.2f}"
        self.lines([
            f"{hours(duration.hours)}: {hours(duration.training)} of training and {hours(duration.scoring)} of scoring, at "
            f"{speed.tokens_per_second:,.0f} distinct tokens/s of all processes ({speed.source}){cost}. Loading and saving "
            "come on top."
        ])  # fmt: skip

    def disk(self, disk: Disk) -> None:
        self.section("Disk")
        kept = f"{disk.kept} x {disk.checkpoint / 1e9:,.2f} GB of checkpoints" if disk.kept else "no checkpoints"
        self.lines([
            f"{disk.most / 1e9:,.2f} GB at most: {kept}, {disk.end / 1e9:,.2f} GB of the model at the end ({disk.end_dtype}); "
            f"{disk.free / 1e9:,.0f} GB free here"
        ])  # fmt: skip


def counted(number: int, what: str, ending: str = "s") -> str:
    return f"{number:,} {what}{ending * (number != 1)}"


def figures(spread: Spread) -> list[str]:
    return [f"{spread.least:,}", f"{spread.median:,}", f"{spread.mean:,.0f}", f"{spread.p95:,}", f"{spread.most:,}"]


def cells(memory: Memory, name: str) -> list[str]:
    return [gib(getattr(batch.peak, name)) for batch in (memory.longest, memory.usual)]


def gib(size: float) -> str:
    """Three digits, so that small models are told from nothing."""
    value = size / GIB
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.4f}"


def fit_row(fit: Fit) -> tuple[str, ...]:
    largest = f"{fit.largest:,}{'+' * (fit.largest == MOST_TOKENS)}" if fit.largest else "not even one fits"
    if fit.division is None:
        return f"{fit.gib:g} GiB", largest, "does not fit", "", ""
    return f"{fit.gib:g} GiB", largest, f"{fit.division.max_tokens:,}", str(fit.division.recompute_layers), gib(fit.peak.total)


def hours(value: float) -> str:
    return f"{value:,.1f} h" if value >= 1 else f"{value * 60:.0f} min" if value * 60 >= 1 else f"{value * 3600:.0f} s"
