"""The ways of a GPU on the fake one: micro-batches of many models, whole steps of a trainer, and mutants of both.

`python -m tests.gpu_path` prints what it saw as JSON, one line a case. A process of its own: see tests/fakegpu/device.py.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from alignment.model import head, shared_prompt
from alignment.model.shared_prompt import PROVEN, SharedPrompt
from alignment.preference import collate
from alignment.preference.collate import PackedCollator, PaddedCollator, on_device
from alignment.preference.configs import PairConfig
from alignment.preference.reference import COLUMNS, TRAIN, ScoredFirst, StepZero
from tests.builders import bpe_tokenizer, token_rows
from tests.fakegpu import kernels
from tests.fakegpu.device import GPU, moved, on_the_host
from tests.fakegpu.kernels import gpu
from tests.fakegpu.watch import Watch
from tests.methods import METHODS
from tests.unit.model.test_proven_architectures import OWN

SIZES = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 1024, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
PAIRS = [(50, 30, 90), (20, 120, 40)]
LOGGED = 3  # every so many steps
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "simpo": ("simpo", {}),
    "simpo with SFT": ("simpo", {"sft_weight": 0.1}),
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "orpo": ("orpo", {}),
}


@dataclass(frozen=True)
class Case:
    """A micro-batch of a model: forward, the loss and backward, every layer computed again."""

    kind: str
    attention: str = "sdpa"
    precision: str = "autocast"
    layout: str = "auto"  # pair_layout: packed rows, and for eager attention flex_attention's kernel
    head: str = "matrix"  # or adapter
    method: str = "simpo"
    layers: int = 2
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.attention} {self.precision} {self.layout} {self.head} {self.method} {self.layers}"


# ---- Cases ----


def precision_for(settings: dict[str, Any]) -> str:
    """Autocast leaves the experts' product in float32, which a GPU computes one by one and torch's fake tensors refuse."""
    return "bfloat16" if any("expert" in name for name in settings) else "autocast"


AXES = {
    "attention": ("sdpa", "eager", "flash_attention_2", "flex_attention"),
    "precision": ("float32", "autocast", "bfloat16"),
    "layout": ("auto", "packed", "padded"),
    "head": ("matrix", "adapter"),
    "method": tuple(OBJECTIVES),
}
WINDOW = (("sliding_window", 64),)
KINDS = {"llama": (), "mistral": WINDOW, "qwen3": (), "gemma2": WINDOW}


def can_meet(kind: str, attention: str, precision: str) -> bool:
    """transformers has no sdpa for Gemma-2, flash-attn no float32."""
    return (kind, attention) != ("gemma2", "sdpa") and (attention, precision) != ("flash_attention_2", "float32")


def all_pairs(options: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Few of the options, in which any two values meet that meet in one of them: each time the one with most new pairs."""
    pairs = {option: set(combinations(enumerate(option), 2)) for option in options}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(options, key=lambda option: len(pairs[option] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


PAIRWISE = [
    Case(kind, *option, settings=settings)
    for kind, settings in KINDS.items()
    for option in all_pairs([values for values in product(*AXES.values()) if can_meet(kind, *values[:2])])
]
ARCHITECTURES = [
    Case(kind, own.pop("attn_implementation", "sdpa"), precision_for(own), settings=tuple(own.items()))
    for kind, own in ((kind, {**OWN.get(kind, {}), "head_dim": 16}) for kind in sorted(PROVEN))
]
# What a layer may launch forward and backward, recomputed: what it does today and a little.
LAUNCHES = {
    Case("llama", "sdpa", "bfloat16"): 170,  # 165
    Case("llama", "sdpa", "bfloat16", "padded"): 205,  # 199
    Case("llama", "sdpa", "autocast"): 207,  # 201
    Case("gemma2", "eager", "bfloat16"): 237,  # 230
    Case("gemma2", "eager", "bfloat16", "packed"): 555,  # 539
    Case("gemma2", "eager", "bfloat16", "padded"): 276,  # 268
}


# ---- A micro-batch ----


def plain_model(case: Case) -> PreTrainedModel:
    """With real numbers, in host memory."""
    settings = {**SIZES, "num_hidden_layers": case.layers, **dict(case.settings)}
    config = AutoConfig.for_model(case.kind, **settings)
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=case.attention)


def model_of(case: Case) -> nn.Module:
    model = plain_model(case)
    if case.head == "adapter":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"]))
        model.enable_input_require_grads()
    return model


def micro_batch(case: Case) -> Watch:
    """Forward, loss and backward from a batch in host memory, by the method's trainer; raises where a GPU would."""
    method, options = OBJECTIVES[case.method]
    with tempfile.TemporaryDirectory() as folder, gpu() as device:
        args = arguments(method, folder, pair_layout=case.layout, **options)
        model = moved(on_the_host(model_of)(case), device)
        with trainer_on(device):
            trainer = METHODS[method].trainer(model, args, rows_of(PAIRS), processing_class=bpe_tokenizer())
            trainer.begin()
            trainer.reference_table(trainer.train_dataset)  # goes there once a run
            trainer.accelerator.gradient_state._set_sync_gradients(False)  # not a step's last: that one is asked once
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
            rows = on_the_host(trainer.data_collator)(list(trainer.train_dataset))
            with Watch(selected=len(rows["scored"])) as watch:
                batch = on_device(rows, device)
                with torch.autocast(GPU, torch.bfloat16, enabled=case.precision == "autocast"):
                    loss = trainer.compute_loss(model, batch)
                assert loss.dtype == torch.float32
                loss.backward()
        check_gradients(model)
    return watch


def arguments(method: str, folder: str, **options: Any) -> PairConfig:
    """Before the device is another."""
    return METHODS[method].config(
        output_dir=folder, report_to="none", gradient_checkpointing=True, max_length=512, max_prompt_length=256,
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2 * LOGGED, logging_steps=LOGGED,
        save_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True, **options,
    )  # fmt: skip


def rows_of(pairs: list[tuple[int, int, int]]) -> Dataset:
    return Dataset.from_list(token_rows(pairs))


def check_gradients(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".experts." not in name and "router" not in name:
            found = parameter.grad
            assert found is not None, f"{name} has no gradient"
            assert (found.shape, found.dtype, found.device) == (parameter.shape, parameter.dtype, parameter.device), name


def figures(case: Case) -> dict[str, Any]:
    watch = micro_batch(case)
    return {"launches": watch.launches.total(), "waits": watch.waits}


def launches_per_layer(case: Case) -> dict[str, Any]:
    two, four = (micro_batch(replace(case, layers=layers)).launches for layers in (2, 4))
    return {"launches": (four.total() - two.total()) / 2, "kernels": (four - two).most_common(8)}


# ---- Steps of a trainer ----

STEPS = {
    "simpo": ("simpo", {"sft_weight": 0.1}),
    "simpo by tokens": ("simpo", {"max_tokens_per_micro_batch": 400}),
    "simpo padded by tokens": ("simpo", {"max_tokens_per_micro_batch": 800, "pair_layout": "padded"}),
    "dpo": ("dpo", {}),
    "dpo by tokens": ("dpo", {"max_tokens_per_micro_batch": 400}),
    "orpo by tokens": ("orpo", {"max_tokens_per_micro_batch": 400}),
}


class WaitsOfSteps(TrainerCallback):
    """What was waited for up to the end of each step, and in each log, which comes behind it."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self.steps: list[dict[str, int]] = []
        self.logs: list[dict[str, int]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(self.taken())

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.logs.append(self.taken())

    def taken(self) -> dict[str, int]:
        taken = dict(self.watch.waits)
        self.watch.waits.clear()
        return taken


def steps(method: str, options: dict[str, Any]) -> dict[str, Any]:
    pairs = [(50, 30, 90), (20, 120, 40), (10, 70, 70), (60, 40, 50)] * 16
    with tempfile.TemporaryDirectory() as folder, gpu() as device:
        args = arguments(method, folder, **options)
        model = moved(on_the_host(plain_model)(Case("llama", precision="bfloat16")), device)
        with trainer_on(device), Watch() as watch:
            counted = WaitsOfSteps(watch)
            METHODS[method].trainer(model, args, rows_of(pairs), processing_class=bpe_tokenizer(), callbacks=[counted]).train()
    return {"steps": counted.steps, "logs": counted.logs}


def score_on_the_host(trainer: ScoredFirst) -> None:
    """The reference's log-probabilities of the training pairs, which could not be read from fake tensors."""
    index = torch.tensor(trainer.train_dataset["index"])
    trainer.step_zero = {TRAIN: StepZero("", {name: index if name == "index" else index.float() for name in COLUMNS})}


def table_there(scored: StepZero, device: torch.device, plain: Callable[..., Tensor] = StepZero.by_index) -> Tensor:
    return on_the_host(plain)(scored, torch.device("cpu")).to(device)


@contextmanager
def trainer_on(device: torch.device) -> Iterator[None]:
    """What the Trainer and accelerate ask of a device; collators work on the host."""
    with (
        mock.patch.dict(PartialState._shared_state, device=device),
        mock.patch.object(torch.accelerator, "is_available", return_value=True),  # so that data loaders pin
        mock.patch.object(ScoredFirst, "begin", on_the_host(score_on_the_host)),
        mock.patch.object(StepZero, "by_index", table_there),
        mock.patch.object(nn.Module, "to", lambda self, *_, **__: self),  # it is there
        mock.patch.object(TrainingArguments, "device", property(lambda self: device)),
        mock.patch.object(PackedCollator, "__call__", on_the_host(PackedCollator.__call__)),
        mock.patch.object(PaddedCollator, "__call__", on_the_host(PaddedCollator.__call__)),
    ):
        yield


# ---- Mutants ----


def wide_bounds(lengths: list[tuple[int, int, int]]) -> SharedPrompt:
    layout = shared_prompt.shared_prompt_layout(lengths)
    return SharedPrompt(layout.segments, layout.numbers.long())


def untransposed(query: Tensor, key: Tensor, value: Tensor, *args: Any, plain: Callable[..., Tensor], **options: Any) -> Tensor:
    return plain(query, key.transpose(0, 1), value.transpose(0, 1), *args, **options)


def float32_queries(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return query.float(), key, value


def table_each_time(trainer: ScoredFirst, rows: Dataset) -> Tensor:
    return trainer.step_zero[TRAIN].by_index(trainer.args.device)


def found_by_mask(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=values.device).index_fill(0, places, True)
    spread = values.new_zeros(shape.numel())
    spread[mask] = values
    return spread.view(shape)


def mutants() -> dict[str, tuple[Any, Case]]:
    """Name -> a patch that breaks the way of a GPU, and a case that has to show it."""
    packed = Case("llama", "sdpa", "bfloat16")
    flash, flex = replace(packed, attention="flash_attention_2"), replace(packed, attention="eager")
    padded_flex = Case("llama", "flex_attention", "autocast", "padded")
    swapped = partial(untransposed, plain=kernels.checked_varlen)
    return {
        "a layout left on the CPU": (mock.patch.object(SharedPrompt, "to", lambda self, *_, **__: self), packed),
        "int64 bounds": (mock.patch.object(collate, "shared_prompt_layout", wide_bounds), packed),
        "int64 bounds, flash": (mock.patch.object(collate, "shared_prompt_layout", wide_bounds), flash),
        "untransposed keys": (mock.patch.object(kernels, "checked_varlen", swapped), packed),
        "float32 queries": (mock.patch.object(shared_prompt, "in_autocast_dtype", float32_queries), flex),
        "what autocast leaves": (mock.patch.object(shared_prompt, "in_autocast_dtype", lambda *heads: heads), padded_flex),
        "a reference fetched each time": (
            mock.patch.object(ScoredFirst, "reference_table", table_each_time), replace(packed, method="dpo")
        ),
        "a boolean mask as an index": (mock.patch.object(head, "spread", found_by_mask), packed),
        "a batch that is waited for": (mock.patch.object(sys.modules[__name__], "on_device", collate.send_to_device), packed),
    }  # fmt: skip


def broken(name: str) -> dict[str, Any]:
    patch, case = mutants()[name]
    with patch:
        return figures(case)


# ---- All of it ----


def jobs() -> dict[str, Callable[[], dict[str, Any]]]:
    named: dict[str, Callable[[], dict[str, Any]]] = {}
    named |= {f"micro-batch: {case}": partial(figures, case) for case in [*PAIRWISE, *ARCHITECTURES]}
    named |= {f"per layer: {case}": partial(launches_per_layer, case) for case in LAUNCHES}
    named |= {f"steps: {name}": partial(steps, *asked) for name, asked in STEPS.items()}
    return named | {f"mutant: {name}": partial(broken, name) for name in mutants()}


def main(chosen: list[str]) -> None:
    """Cases whose name begins with one of `chosen`; without any, all."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, job in jobs().items():
        if not chosen or name.startswith(tuple(chosen)):
            try:
                seen = job()
            except Exception as error:  # noqa: BLE001  what a GPU would refuse, whatever it is
                seen = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            print(json.dumps({"name": name, **seen}), flush=True)
    os._exit(0)  # torch's own teardown knows nothing of this device


if __name__ == "__main__":
    main(sys.argv[1:])
