"""What a training step costs: ours, packed and padded, against the published algorithm, TRL's SimPO and Liger's.

    python benchmarks/train_step.py [--data PAIRS.jsonl --tokenizer FOLDER --vocab N] [--layers N ...] [--device cuda]

A step is the forward and backward of all pairs, in micro-batches, collation included. All contenders share one set of random
weights, get the same pairs, must report the same loss, and on a CPU take turns; what is printed are medians over repeats, with
the smallest and the largest. Seconds are those of all cores together on a CPU, and the device's on a GPU. A contender may be
given micro-batches of its own: `published@8` has 8 pairs in each, `packed@16384t` 16,384 tokens; and another method than
`--method`: beside DPO's step, `packed:simpo` is SimPO's. On a GPU each is printed as soon as it is measured.
"""

import argparse
import copy
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

# A thread that waits for another would spin, which counts as CPU seconds. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from alignment.launch.opening import opening

with opening():
    import datasets
    import torch
    import transformers
    from accelerate.utils import send_to_device
    from datasets import Dataset
    from torch import Tensor
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

    from alignment.data.tokenization import SIDES, LengthRules, tokenize_pairs
    from alignment.model.layers import recomputable_layers, recompute_first
    from alignment.preference.collate import PackedCollator, PaddedCollator, Row, divided, on_device
    from alignment.preference.trainer import PairTrainer
    from alignment.run.guards import peak_memory_gb
    from benchmarks.step_table import Measured, MicroBatch, Table, timed
    from benchmarks.tokenization import load_tokenizer, rendered_pairs
    from tests import builders, reference
    from tests.methods import METHODS

BETAS, GAMMA_BETA_RATIO = {"simpo": 2.5, "dpo": 0.1, "orpo": 0.1}, 0.55
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of the mean loss; bf16 logits have 8 bits
Loss = Callable[[list[Row]], Tensor]  # a micro-batch -> its mean loss, with its graph


class Setup(NamedTuple):
    """What every contender is made of. The model is its own, the weights are shared."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    folder: str
    method: str
    rows: list[Row]  # a reference is scored for
    recompute_layers: int | None  # of this suite's contenders, like what follows
    fused_layers: bool
    compiled_layers: bool

    @property
    def trainer_settings(self) -> dict[str, Any]:
        return {
            "output_dir": self.folder,
            "use_cpu": self.device.type == "cpu",
            "report_to": "none",
            "beta": BETAS[self.method],
        }


# ---- Contenders ----


def published(setup: Setup) -> Loss:
    def loss(rows: list[Row]) -> Tensor:
        with setup.device:
            return reference.simpo_step_loss(setup.model, rows, beta=BETAS["simpo"], gamma_beta_ratio=GAMMA_BETA_RATIO)

    return loss


def trl(setup: Setup) -> Loss:
    """TRL's trainer of the method; DPO's reference is precomputed, by the policy as it is."""
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    plain = {
        "bf16": False,  # the dtype is the weights' own
        "gradient_checkpointing": False,  # it is on already, if it shall be
        "max_length": None,
        **setup.trainer_settings,
    }
    unused = Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}])
    config, kind = {
        "simpo": (lambda: CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=GAMMA_BETA_RATIO * BETAS["simpo"], **plain),
                  CPOTrainer),
        "dpo": (lambda: DPOConfig(precompute_ref_log_probs=True, **plain), DPOTrainer),
        "orpo": (lambda: ORPOConfig(**plain), ORPOTrainer),
    }[setup.method]  # fmt: skip
    trainer = kind(setup.model, args=config(), train_dataset=unused, processing_class=setup.tokenizer)
    columns = trl_dpo_columns(setup) if setup.method == "dpo" else trl_columns

    def loss(rows: list[Row]) -> Tensor:
        batch = send_to_device(trainer.data_collator([columns(row) for row in rows]), setup.device)
        return trainer.compute_loss(trainer.model, batch)

    return loss


def trl_columns(row: Row) -> dict[str, list[int]]:
    sides: dict[str, list[int]] = {}
    for side in SIDES:
        ids, prompt = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
        labels = [-100] * prompt + ids[prompt:]
        sides |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids), f"{side}_labels": labels}
    return sides


def trl_dpo_columns(setup: Setup) -> Callable[[Row], dict[str, Any]]:
    scores = ours_trainer(setup._replace(model=twin(setup.model, checkpointing=False)), "padded").score(
        Dataset.from_list(setup.rows), "TRL's reference"
    )
    logps = {int(index): number for number, index in enumerate(scores["index"])}

    def columns(row: Row) -> dict[str, Any]:
        responses = {f"{side}_ids": row[f"{side}_input_ids"][row[f"{side}_prompt_length"] :] for side in SIDES}
        number = logps[row["index"]]
        reference_logps = {f"ref_{side}_logps": scores[f"{side}_logp"][number].item() for side in SIDES}
        return {"prompt_ids": row["chosen_input_ids"][: row["chosen_prompt_length"]], **responses, **reference_logps}

    return columns


def liger(setup: Setup) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    compiled = setup.device.type == "cuda"
    fused = LigerFusedLinearSimPOLoss(
        beta=BETAS["simpo"], gamma=GAMMA_BETA_RATIO * BETAS["simpo"], compute_nll_loss=False, compiled=compiled
    )
    collate = PaddedCollator(setup.tokenizer.pad_token_id)

    def loss(rows: list[Row]) -> Tensor:
        batch = send_to_device(collate(rows), setup.device)
        hidden = setup.model.base_model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
        return fused(setup.model.lm_head.weight, hidden, batch["shift_labels"])[0]

    return loss


def ours(setup: Setup, layout: str) -> Loss:
    trainer = ours_trainer(setup, layout)
    if setup.recompute_layers is not None:
        recompute_first(setup.model, setup.recompute_layers)
    if setup.compiled_layers:
        for layer in recomputable_layers(setup.model):
            layer.compile(dynamic=True)

    def loss(rows: list[Row]) -> Tensor:
        return trainer.compute_loss(trainer.model, on_device(trainer.data_collator(rows), setup.device))

    return loss


def ours_trainer(setup: Setup, layout: str) -> PairTrainer:
    method = METHODS[setup.method]
    own = {"simpo": {"gamma_beta_ratio": GAMMA_BETA_RATIO}}.get(setup.method, {})
    args = method.config(
        pair_layout=layout,
        max_length=1024,
        max_prompt_length=512,
        use_liger_kernel=setup.fused_layers,
        max_tokens_per_micro_batch=None,
        disable_tqdm=True,
        **own,
        **setup.trainer_settings,
    )
    return method.trainer(setup.model, args, processing_class=setup.tokenizer)


def reference_share(setup: Setup, epoch: float) -> float:
    """What scoring the reference of all pairs costs, as a share of an epoch's forward and backward, of `epoch` seconds."""
    trainer, rows = ours_trainer(setup, "packed"), Dataset.from_list(setup.rows)
    passed, _ = timed(setup.device, lambda: trainer.score(rows, "the reference"))
    return passed / epoch


CONTENDERS: dict[str, Callable[[Setup], Loss]] = {
    "published": published,
    "trl": trl,
    "liger": liger,
    "padded": lambda setup: ours(setup, "padded"),
    "packed": lambda setup: ours(setup, "packed"),
}
OURS = ("padded", "packed")


class Contender(NamedTuple):
    """One of CONTENDERS at work, in micro-batches of its own."""

    name: str
    method: str
    loss: Loss
    micro_batches: list[list[Row]]
    rotary: Callable[..., Any] | None  # Liger puts its own rotation into the model's file, where all contenders would find it
    cudnn_attention: bool  # whether torch may choose it: peers have what torch has, this suite keeps off it


def enter(
    name: str, model: PreTrainedModel, rows: list[Row], tokenizer: PreTrainedTokenizerBase, folder: str, args
) -> Contender:
    kind, _, size = name.partition("@")
    kind, _, method = kind.partition(":")
    method = method or args.method
    own = twin(model, checkpointing=args.gradient_checkpointing)
    file = sys.modules[type(model).__module__]
    before, cudnn_before = getattr(file, "apply_rotary_pos_emb", None), torch.backends.cuda.cudnn_sdp_enabled()
    loss = CONTENDERS[kind](set_up(own, tokenizer, folder, method, rows, args))
    rotary = getattr(file, "apply_rotary_pos_emb", None)
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled() if kind in OURS else cudnn_before
    if before is not None:
        file.apply_rotary_pos_emb = before
    torch.backends.cuda.enable_cudnn_sdp(cudnn_before)
    if size.endswith("t"):
        micro_batches = divided(rows, PaddedCollator(0) if kind == "padded" else PackedCollator(), int(size[:-1]))
    else:
        pairs = int(size or args.pairs_per_micro_batch)
        micro_batches = [rows[i : i + pairs] for i in range(0, len(rows), pairs)]
    return Contender(name, method, loss, micro_batches, rotary, cudnn_attention)


def set_up(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str, method: str, rows: list[Row], args
) -> Setup:
    settings = args.recompute_layers, args.fused_layers, args.compiled_layers
    return Setup(model, tokenizer, torch.device(args.device), folder, method, rows, *settings)


# ---- Model and pairs ----


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    config = AutoConfig.for_model(
        args.model_type,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        intermediate_size=args.intermediate,
        vocab_size=args.vocab,
        max_position_embeddings=args.max_length,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=args.attn,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return model.train()


def twin(model: PreTrainedModel, *, checkpointing: bool) -> PreTrainedModel:
    """Modules of its own around the same parameters, so that no contender changes another's forward."""
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if checkpointing:
        copied.activation_checkpointing_enable({"use_reentrant": False})
    return copied


def load_rows(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    count = args.pairs_per_micro_batch * args.micro_batches
    if args.data is None:
        return builders.token_rows(lengths(count, args))
    texts = rendered_pairs(args.data, count, tokenizer)
    columns = {key: [text[key] for text in texts] for key in texts[0]}
    rules = LengthRules(args.max_length, args.max_prompt_length, "keep_end", "published")
    tokens = tokenize_pairs(columns, list(range(count)), tokenizer, rules)
    return [dict(zip(tokens, row, strict=True)) for row in zip(*tokens.values(), strict=True)]


def lengths(count: int, args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Of prompt, chosen and rejected: log-normal around the means asked for, then truncated as the published code does.

    A logarithm's standard deviation is `spread` x 0.7 for prompts and x 1.0 for responses.
    """
    rng = random.Random(0)

    def draw(mean: int, sigma: float) -> int:
        return max(round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)), 1)

    def pair() -> tuple[int, int, int]:
        prompt = draw(args.prompt_tokens, 0.7 * args.spread)
        chosen, rejected = (draw(args.response_tokens, args.spread) for _ in range(2))
        if prompt + max(chosen, rejected) <= args.max_length:
            return prompt, chosen, rejected
        room = args.max_length - args.max_prompt_length
        return min(prompt, args.max_prompt_length), min(chosen, room), min(rejected, room)

    return [pair() for _ in range(count)]


# ---- Measuring ----


def train(model: PreTrainedModel, contender: Contender, micro_batches: list[list[Row]] | None = None) -> Tensor:
    """Forward and backward of every micro-batch; the mean loss of their pairs."""
    micro_batches = contender.micro_batches if micro_batches is None else micro_batches
    if contender.rotary is not None:
        sys.modules[type(model).__module__].apply_rotary_pos_emb = contender.rotary
    torch.backends.cuda.enable_cudnn_sdp(contender.cudnn_attention)
    model.zero_grad()
    total, pairs = torch.zeros((), device=model.device), sum(map(len, micro_batches))
    for rows in micro_batches:
        loss = contender.loss(rows) * (len(rows) / pairs)
        loss.backward()
        total += loss.detach()
    return total


def take_turns(model: PreTrainedModel, contenders: list[Contender], args: argparse.Namespace, table: Table) -> None:
    """Measure all, each as often as asked for, and let the table say so.

    Raises AssertionError if a contender's mean loss is not that of the first one of its method.
    """
    found = {contender.name: Measured() for contender in contenders}
    if args.device == "cuda":
        # One after the other: what one has freed does not suit the next, and the device is slow to give memory.
        for contender in contenders:
            own = found[contender.name]
            torch.cuda.empty_cache()
            warm_up(model, contender)
            torch.cuda.reset_peak_memory_stats()
            for _ in range(args.repeats):
                measure(model, contender, own)
            own.peak_gb = peak_memory_gb(model.device)
            own.micro_batch = first_micro_batch(model, contender) if args.profile else None
            table.add(contender.name, own)
    else:
        for contender in contenders:
            warm_up(model, contender)
        for _ in range(args.repeats):
            for contender in contenders:
                measure(model, contender, found[contender.name])
        for contender in contenders:
            own = found[contender.name]
            own.peak_gb = args.peaks[contender.name]
            own.micro_batch = first_micro_batch(model, contender) if args.profile else None
            table.add(contender.name, own)
    for method in {contender.method for contender in contenders}:
        means = [mean for contender in contenders if contender.method == method for mean in found[contender.name].means]
        equal = all(math.isclose(mean, means[0], rel_tol=TOLERANCE[args.dtype]) for mean in means)
        assert equal, f"{method}: losses differ: { {name: own.means for name, own in found.items()} }"


def warm_up(model: PreTrainedModel, contender: Contender) -> None:
    """Compile what is compiled, and get the memory that the largest micro-batch asks for."""
    for rows in {len(contender.micro_batches) - 1: contender.micro_batches[-1], 0: largest_micro_batch(contender)}.values():
        train(model, contender, [rows, rows])


def measure(model: PreTrainedModel, contender: Contender, found: Measured) -> None:
    passed, mean = timed(model.device, partial(train, model, contender))
    found.seconds.append(passed)
    found.means.append(mean.item())


def first_micro_batch(model: PreTrainedModel, contender: Contender) -> MicroBatch:
    """How far the device is busy in one: by the clock without torch's profiler, which slows the host, and by its kernels."""

    def work() -> None:
        train(model, contender, contender.micro_batches[:1])
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    work()
    started = time.perf_counter()
    work()
    wall = time.perf_counter() - started
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        work()
    kernels = [
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return MicroBatch(1000 * wall, sum(kernels) / 1000, len(kernels))


def largest_micro_batch(contender: Contender) -> list[Row]:
    return max(contender.micro_batches, key=distinct_tokens if contender.name.startswith("packed") else padded_tokens)


def own_process_gb(name: str) -> float:
    """Peak memory of a process that runs only this contender."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    # glibc would keep what is freed of tensors up to 32 MB in a fragmented heap: up to half a gigabyte that no tensor is in.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def padded_tokens(rows: list[Row]) -> int:
    return PackedCollator()(rows)["token_counts"].padded


def distinct_tokens(rows: list[Row]) -> int:
    return PackedCollator()(rows)["token_counts"].distinct


# ---- Running ----


def main() -> None:
    args = parse_arguments()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(args.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_rows(args, tokenizer)
    if (largest := max(max(row["chosen_input_ids"] + row["rejected_input_ids"]) for row in rows)) >= args.vocab:
        sys.exit(f"--vocab {args.vocab}: the pairs have a token {largest}; --vocab {len(tokenizer)} holds the tokenizer's")
    names = [args.only] if args.only else args.contenders
    # Before this process grows: a child's peak begins with its parent's.
    args.peaks = {} if args.only or args.device == "cuda" else {name: own_process_gb(name) for name in names}

    model = build_model(args)
    with tempfile.TemporaryDirectory() as folder:
        contenders = [enter(name, model, rows, tokenizer, folder, args) for name in names]
        if args.only:
            train(model, contenders[0], [largest_micro_batch(contenders[0])])
            print(json.dumps(peak_memory_gb(model.device)))
            return
        table = Table(args, model, rows)
        take_turns(model, contenders, args, table)
        if args.method == "dpo" and "packed" in table.seconds:
            own = set_up(twin(model, checkpointing=False), tokenizer, folder, args.method, rows, args)
            share = reference_share(own, statistics.median(table.seconds["packed"]))
            print(f"scoring the reference: {share:.0%} of an epoch of packed steps, the optimizer's not counted")
    table.end()


def contender_name(text: str) -> str:
    name, at, size = text.partition("@")
    kind, colon, method = name.partition(":")
    if kind not in CONTENDERS or bool(at) != size.removesuffix("t").isdigit() or bool(colon) != (method in METHODS):
        raise argparse.ArgumentTypeError(
            f"{text!r}: one of {', '.join(CONTENDERS)}, perhaps with :METHOD, and @PAIRS or @TOKENSt, behind it"
        )
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model, with random weights")
    model.add_argument("--model-type", default="llama", help="architecture, by its name in transformers")
    for name, size in {"hidden": 512, "layers": 12, "heads": 8, "intermediate": 1376, "vocab": 32000}.items():
        model.add_argument(f"--{name}", type=int, default=size)
    model.add_argument("--kv-heads", type=int, help="default: as many as heads")
    model.add_argument("--dtype", choices=TOLERANCE, default="float32")
    model.add_argument("--attn", default="sdpa", help="attention implementation")
    model.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    model.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--data", help="JSONL of chosen and rejected message lists; default: random tokens")
    pairs.add_argument("--tokenizer", help="folder or Hub name; default: the tokenizer of tests/builders.py")
    pairs.add_argument("--prompt-tokens", type=int, default=32, help="mean prompt of random pairs, before truncation")
    pairs.add_argument("--response-tokens", type=int, default=300, help="mean response of random pairs, before truncation")
    pairs.add_argument("--spread", type=float, default=1.0, help="how widely random lengths vary; 0: all are the means")
    pairs.add_argument("--max-length", type=int, default=1024)
    pairs.add_argument("--max-prompt-length", type=int, default=512)
    run = parser.add_argument_group("run")
    run.add_argument("--pairs-per-micro-batch", type=int, default=2)
    run.add_argument("--micro-batches", type=int, default=2)
    run.add_argument("--repeats", type=int, default=3)
    run.add_argument("--method", choices=METHODS, default="simpo", help="published and liger take part in simpo alone")
    run.add_argument("--contenders", nargs="+", type=contender_name, default=list(CONTENDERS), help=", ".join(CONTENDERS))
    run.add_argument("--recompute-layers", type=int, help="of this suite's contenders; default: all")
    run.add_argument("--fused-layers", action="store_true", help="Liger's kernels in the layers of this suite's contenders")
    run.add_argument("--compiled-layers", action="store_true", help="layers of this suite's contenders compiled by torch")
    run.add_argument("--profile", action="store_true", help="also time by the clock and in kernels of one micro-batch of each")
    run.add_argument("--json", type=Path, help="file for the figures, written after every contender")
    run.add_argument("--only", type=contender_name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method != "simpo":
        args.contenders = [name for name in args.contenders if name.partition("@")[0] not in ("published", "liger")]
    others = [name for name in args.contenders if name.partition("@")[0] != "liger"]
    if len(others) < len(args.contenders) and importlib.util.find_spec("liger_kernel") is None:
        args.contenders = others
        if not args.only:
            print("liger: skipped, because liger_kernel is not installed")
    return args


if __name__ == "__main__":
    main()
