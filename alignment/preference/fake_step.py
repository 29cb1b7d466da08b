"""A training step on tensors without data, for `alignment.preference.memory.estimate`: nine layers, watched stretch by stretch.

Three of them are recomputed in backward, three are not. The model, its head, its adapter, its layout and its sharding are
made by the code that makes the real ones; kernels that only a GPU has are stood for (see stand_ins). `answer` is the whole
program of an interpreter of its own.
"""

import contextlib
import copy
import importlib
import math
import os
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from ..model import head, shared_prompt
from ..model.config_files import whole_model
from ..model.head import add_lm_head
from ..model.layers import recomputable_layers, recompute_first
from ..model.shared_prompt import use_shared_prompts
from .collate import Batch, PackedCollator, PaddedCollator, Row
from .losses import response_sums, simpo_loss
from .memory import MemoryModel, Pair, Plan, Sample, Weights, Window, earlier_bytes, plus
from .stand_ins import fuse_layers, fused_attention, quantise, rotated_in_place

aten = torch.ops.aten
BLOCK = 512  # bytes: torch's allocator gives a GPU's memory in multiples of it
STOOD_FOR = "stand_in"  # what the attention of a GPU is called
# Two at each end also wait for, or clear away, what FSDP gathered for the embedding and the head, and the first kept one has
# its neighbour's traces. Of the others two each are USUAL, because layers can alternate.
LAYERS = ("recomputed",) * 4 + ("kept",) * 5
USUAL = {"recomputed": slice(2, 4), "kept": slice(5, 7)}
# Tokens of the micro-batches that are tried. What TRL's head needs stops growing at 4,096 scored tokens; on a CPU, attention
# goes block by block and the head tile by tile, which takes time and is linear sooner.
TRIED = {"cuda": (1024, 5120, 16384), "cpu": (256, 1024)}
FORWARD_COLUMNS = ("input_ids", "attention_mask", "position_ids", "shift_labels", "scored", "shared_prompt")


# ---- Watching ----


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive, fake or real, and what each stretch between two cuts did to them.

    Every storage that an operation returns counts once, in the blocks of the allocator, until it is freed. What `resize_`
    fills and empties, which is how FSDP gathers weights, counts as gathered.
    """

    def __init__(self, device_type: str = "cpu"):
        super().__init__()
        self.device_type = device_type
        self.sizes = WeakIdKeyDictionary()  # storage -> [bytes, of those gathered]
        self.now = self.gathered = 0
        self.highest = self.peak = self.peak_gathered = 0  # highest ever; peaks since the last cut
        self.start = (0, 0)
        self.windows: dict[str, Window] = {}
        self.paused = False

    def cut(self, name: str | None = None) -> None:
        """End a stretch, under its name, and begin the next; without a name what was before is forgotten."""
        if name is not None:
            now, gathered = self.start
            peak = self.peak - now, self.peak_gathered - gathered
            self.windows[name] = Window(self.now - now, peak[0], self.gathered - gathered, peak[1])
        self.start = (self.now, self.gathered)
        self.peak, self.peak_gathered = self.start

    def __enter__(self):
        self.entry = active_fake_mode()
        self.patches = contextlib.ExitStack()
        for owner, name, around in (
            (torch.UntypedStorage, "resize_", self._resize),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", self._propagate),
        ):
            self.patches.enter_context(replaced(owner, name, wrapped(around, getattr(owner, name))))
        return super().__enter__()

    def __exit__(self, *args: Any):
        self.patches.close()
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if not self.paused and active_fake_mode() is self.entry:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        tensor = getattr(tensor, "_local_tensor", getattr(tensor, "elem", tensor))  # of a DTensor, of a collective's result
        if tensor.device.type != self.device_type or (storage := tensor.untyped_storage()) in self.sizes:
            return
        box = [blocks(storage.nbytes()), 0]
        self.sizes[storage] = box
        weakref.finalize(storage, self._change, box, 0, 0)
        size, box[0] = box[0], 0
        self._change(box, size, 0)

    def _change(self, box: list[int], size: int, gathered: int) -> None:
        self.now += size - box[0]
        self.gathered += gathered - box[1]
        box[:] = size, gathered
        self.highest = max(self.highest, self.now)
        if self.now > self.peak:
            self.peak, self.peak_gathered = self.now, self.gathered

    def _resize(self, plain: Callable, storage: torch.UntypedStorage, size: int) -> Any:
        result = plain(storage, size)
        if (box := self.sizes.get(storage)) is not None:
            self._change(box, blocks(size), blocks(size))
        return result

    def _propagate(self, plain: Callable, *args: Any) -> Any:
        """DTensor asks for the shapes of whole tensors, which nobody allocates."""
        was, self.paused = self.paused, True
        try:
            return plain(*args)
        finally:
            self.paused = was


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute, until the context ends."""
    own = {name: vars(owner)[name]} if name in vars(owner) else {}  # else it is inherited, or there is none
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        for plain in own.values():
            setattr(owner, name, plain)


def wrapped(around: Callable, plain: Callable) -> Callable:
    """A plain function, so that it binds as a method where it is set on a class."""
    return lambda *args: around(plain, *args)


def blocks(size: int) -> int:
    return math.ceil(size / BLOCK) * BLOCK


class Answers(TorchDispatchMode):
    """Sizes and truths that depend on data, which fake tensors do not have. selected: what a mask of tokens leaves."""

    selected = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        packet = func.overloadpacket
        if func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else args[0].dtype.is_floating_point + 1
        if packet is aten.nonzero:
            rows = min(self.selected or 1, args[0].numel())
            return args[0].new_empty((rows, args[0].ndim), dtype=torch.int64)
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if packet in INDEXING else []
        if packet is aten.index and masks:
            return args[0].new_empty((self.selected, *args[0].shape[masks[0].ndim :]))
        if masks:
            return args[0] if packet in IN_PLACE_INDEXING else torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


IN_PLACE_INDEXING = (aten.index_put_, aten._index_put_impl_)
INDEXING = (aten.index, aten.index_put, aten._index_put_impl, *IN_PLACE_INDEXING)


def watch(model: nn.Module, ledger: Ledger) -> None:
    """Cut the ledger where a stretch ends: behind each module forward, and where a module's input has its gradient."""
    names = ["embedding", *map(str, range(len(LAYERS))), "head"]
    modules = [model.get_input_embeddings(), *recomputable_layers(model)]
    for module, name, following in zip(modules, names, names[1:], strict=False):
        module.register_forward_hook(partial(cut_behind, ledger, name, following))


def cut_behind(ledger: Ledger, name: str, following: str, _module: nn.Module, _args: Any, output: Any) -> None:
    ledger.cut(f"{name} forward")
    hidden = output[0] if isinstance(output, tuple) else output
    hidden.register_hook(lambda _grad: ledger.cut(f"{following} backward"))


def by_stretch(windows: dict[str, Window]) -> dict[str, Window]:
    """Windows of numbered layers -> of a recomputed and a kept one, and what both ends have over these.

    An end is two layers: FSDP gathers ahead, so that the second one's window holds what the model has in front of its layers.
    """
    found = {name: window for name, window in windows.items() if not name[0].isdigit()}
    for way in ("forward", "backward"):
        each = [windows[f"{number} {way}"] for number in range(len(LAYERS))]
        found |= {f"{kind} {way}": mean_of(each[numbers]) for kind, numbers in USUAL.items()}
        first, last = found[f"{LAYERS[0]} {way}"], found[f"{LAYERS[-1]} {way}"]
        found[f"first {way}"] = end_over(first, each[0], each[1], comes_second=way == "backward")
        found[f"last {way}"] = end_over(last, each[-1], each[-2], comes_second=way == "forward")
    return found


def end_over(usual: Window, outer: Window, inner: Window, *, comes_second: bool) -> Window:
    """What the two layers of an end have over two usual ones, as of the outer one. comes_second: it runs behind the inner."""
    more = plus(inner, usual, -1)
    before = more if comes_second else Window(0, 0)
    return plus(plus(outer, usual, -1), Window(more.held, before.held, more.gathered, before.gathered))


# ---- The model ----


def build(plan: Plan, layers: int, device: str = "cpu") -> PreTrainedModel:
    """The plan's policy on random weights, as the trainer makes it, with `layers` layers, none of them recomputed yet."""
    config = resized(plan.config, layers)
    with torch.device(device):
        dtype = plan.compute_dtype or plan.dtype if plan.strategy.startswith("zero") else plan.dtype
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=plan.attention)
        add_lm_head(model)
        if plan.layout == "packed":
            use_shared_prompts(model)
        if plan.quantised is not None:
            quantise(model, plan.quantised, plan.compute_dtype or plan.dtype)
        if plan.lora is not None:
            model = add_lora(model, plan)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def resized(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config with another number of layers; what it lists layer by layer begins as it did, or is repeated."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, [value[number % before] for number in range(layers)])
    text.num_hidden_layers = layers
    return config


def add_lora(model: PreTrainedModel, plan: Plan) -> nn.Module:
    rank, targets, saved = plan.lora
    model.enable_input_require_grads()
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        modules_to_save=list(saved) or None,
    )  # fmt: skip
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft trains in float32 on a base of fewer bits
            parameter.data = parameter.data.float()
    return model


def shard(model: nn.Module, plan: Plan) -> nn.Module:
    """By accelerate's own code, over a process group that sends nothing."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True, cpu_ram_efficient_loading=False
    )
    if plan.compute_dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(plan.compute_dtype, torch.float32, output_dtype=None)
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no" if plan.compute_dtype is None else "bf16",
        is_main_process=True,
        torch_device_mesh=dist.init_device_mesh("cpu", (plan.processes,), mesh_dim_names=("dp",)),
        parallelism_config=types.SimpleNamespace(fsdp_dim_names=["dp"]),
    )
    return fsdp2_prepare_model(accelerator, model)


@contextlib.contextmanager
def silent_processes(plan: Plan) -> Iterator[None]:
    """The process group of an FSDP plan, in which this process is the first and nobody answers."""
    if not plan.strategy.startswith("fsdp"):
        yield
        return
    importlib.import_module("torch.distributed._tools.fake_collectives")  # teaches fake tensors the collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=plan.processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- The step ----


def rows_of(pair: Pair, count: int, vocabulary: int) -> list[Row]:
    """Tokenized pairs, all of the same lengths."""
    prompt, chosen, rejected = pair
    start = [index % vocabulary for index in range(prompt)]
    sides = {"chosen": chosen, "rejected": rejected}
    row = {f"{side}_input_ids": start + [index % vocabulary for index in range(length)] for side, length in sides.items()}
    return [{**row, "chosen_prompt_length": prompt, "rejected_prompt_length": prompt, "index": n} for n in range(count)]


def batch_of(plan: Plan, pair: Pair, count: int) -> Batch:
    rows = rows_of(pair, count, plan.config.get_text_config().vocab_size)
    return (PackedCollator() if plan.layout == "packed" else PaddedCollator(0))(rows)


def micro_batch(
    model: nn.Module,
    batch: Batch,
    plan: Plan,
    between: Callable[[], None] = lambda: None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> None:
    """Forward and backward of the objective; `between` is called between the two."""
    zero = plan.strategy.startswith("zero")  # DeepSpeed's model computes in its own precision, without autocast
    on = plan.compute_dtype is not None and not zero
    with torch.autocast(batch["input_ids"].device.type, plan.compute_dtype, enabled=on):
        inputs = {name: batch[name] for name in FORWARD_COLUMNS if name in batch}
        output = model(**inputs, use_cache=False, fused_lm_head=True)
    logps, tokens = response_sums(output.log_probs, batch["is_response"])
    chosen, rejected = (logps / tokens).chunk(2)
    loss = simpo_loss(chosen, rejected, beta=2.0, gamma_beta_ratio=0.5).sum()
    del output, logps, chosen, rejected
    between()
    backward(loss)


def tokens_of(batch: Batch) -> int:
    """Tokens that are computed, padding included."""
    return batch["input_ids"].numel()


# ---- The answer ----


def probe(plan: Plan) -> MemoryModel:
    """What the plan's step does to memory, on a model of nine layers without data."""
    ledger, answers = Ledger(), Answers()
    with silent_processes(plan), movable_modules(), FakeTensorMode(allow_non_fake_inputs=True), ledger, answers:
        model = build(plan, len(LAYERS))
        recompute_first(model, LAYERS.count("recomputed"))
        with gpu_kernels(model, plan) if plan.device_type == "cuda" else contextlib.nullcontext():
            model = shard(model, plan) if plan.strategy.startswith("fsdp") else model
            watch(model, ledger)
            total, layers = weights_of(model), [weights_of(layer) for layer in recomputable_layers(model)]
            tried = partial(sample, model, plan, ledger, answers, held=total.parameters + earlier_bytes(plan, total))
            counts = pair_counts(plan)
            tried(plan.pair, 1)  # sets up what the others find: gradients, FSDP's groups
            longer = tried(plan.pair._replace(prompt=2 * plan.pair.prompt), counts[0])
            samples = tuple(tried(plan.pair, count) for count in counts)
    layer = mean_of(layers)
    rest = Weights(*(whole - len(layers) * each for whole, each in zip(total, layer, strict=True)))
    rest = rest._replace(largest=total.largest)
    return MemoryModel(plan, plan.config.get_text_config().num_hidden_layers, layer, rest, samples, longer)


def probes(plans: list[Plan]) -> list[MemoryModel]:
    """`probe` of several plans; those that differ in arithmetic alone are tried once."""
    tried: dict[bytes, MemoryModel] = {}
    models = []
    for plan in plans:
        key = pickle.dumps(as_tried(plan))
        if key not in tried:
            tried[key] = probe(as_tried(plan))
        models.append(replace(tried[key], plan=plan))
    return models


def as_tried(plan: Plan) -> Plan:
    """The plan without what its step on fake tensors does not depend on."""
    alike = {"ddp": "single", "zero3": "zero2", "fsdp1": "fsdp2"}
    processes = plan.processes if plan.strategy.startswith("fsdp") else 1
    return replace(plan, strategy=alike.get(plan.strategy, plan.strategy), processes=processes, optimizer=None)


def sample(model: nn.Module, plan: Plan, ledger: Ledger, answers: Answers, pair: Pair, count: int, *, held: float) -> Sample:
    """One micro-batch of so many pairs. held: bytes of parameters and gradients that are there before it."""
    batch = batch_of(plan, pair, count)
    answers.selected = batch["token_counts"].scored
    if not plan.accumulates:
        model.zero_grad()
    if plan.strategy.startswith("fsdp"):
        model.set_requires_gradient_sync(not plan.whole_gradients)
    ledger.windows.clear()
    ledger.cut()
    before = ledger.now
    micro_batch(model, batch, plan, between=partial(ledger.cut, "head forward"))
    ledger.cut("embedding backward")
    return Sample(tokens_of(batch), answers.selected, before - held, by_stretch(ledger.windows))


def pair_counts(plan: Plan) -> list[int]:
    """Pairs in each micro-batch that is tried, ever more of them."""
    tokens, counts = tokens_of(batch_of(plan, plan.pair, 1)), [0]
    for wanted in TRIED[plan.device_type]:
        counts.append(max(counts[-1] + 1, round(wanted / tokens)))
    return counts[1:]


def mean_of(rows: list[Any]) -> Any:
    """Column by column, of named tuples of numbers."""
    return type(rows[0])(*(sum(column) / len(column) for column in zip(*rows, strict=True)))


def weights_of(module: nn.Module) -> Weights:
    """What this process holds of a module's parameters and buffers."""
    parameters = [(local(parameter), parameter) for parameter in module.parameters()]
    trained = [own for own, parameter in parameters if parameter.requires_grad]
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    return Weights(
        parameters=buffers + sum(own.nbytes for own, _ in parameters),
        trained=sum(own.nbytes for own in trained),
        elements=sum(own.numel() for own in trained),
        whole_elements=sum(parameter.numel() for _, parameter in parameters),
        whole_trained=sum(parameter.numel() for _, parameter in parameters if parameter.requires_grad),
        largest=max((own.nbytes for own in trained), default=0),
    )


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def answer() -> None:
    """Pickled plans on standard input, their pickled models on standard output, whatever the libraries print."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    output.write(pickle.dumps(probes(pickle.load(sys.stdin.buffer))))
    output.flush()
    os._exit(0)  # a process group that sends nothing can hang at its end


# ---- What a GPU has ----


class Launched:
    """In the place of a Triton kernel: takes its arguments, allocates nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def gpu_kernels(model: nn.Module, plan: Plan) -> Iterator[None]:
    """TRL's head as on CUDA, attention and with Liger norms and MLPs as kernels; none of them computes.

    Only eager attention stays as it is, of packed rows by whole segments: it does hold its scores.
    """
    policy = whole_model(model)
    if plan.attention != "eager":
        name = policy.config.get_text_config()._attn_implementation
        attend = fused_attention(plan.attention != "flex_attention", plan.compute_dtype)
        AttentionInterface.register(STOOD_FOR, attend)
        AttentionMaskInterface.register(STOOD_FOR, ALL_MASK_ATTENTION_FUNCTIONS[name])
        policy.set_attn_implementation(STOOD_FOR)
    kernels = {
        "_use_triton": lambda device: True,
        "_forward_kernel": Launched(),
        "_backward_kernel": Launched(),
        "_addmm_fp32": lambda total, left, right: None,
        "triton": types.SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(shared_prompt, "QUERY_BLOCK", 2**30))
        for name, kernel in kernels.items():
            stack.enter_context(replaced(chunked_logprob, name, kernel))
        stack.enter_context(replaced(trl_utils, "_use_triton", kernels["_use_triton"]))
        stack.enter_context(replaced(head, "has_fused_kernel", kernels["_use_triton"]))
        if plan.liger:
            fuse_layers(policy)
            stack.enter_context(replaced(sys.modules[type(policy).__module__], "apply_rotary_pos_emb", rotated_in_place))
        yield


@contextlib.contextmanager
def movable_modules() -> Iterator[None]:
    """Module.to and .half over fake parameters, which torch will not swap while the fake mode remembers them."""

    def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(function)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    moved = function(parameter)
                if moved is not parameter:
                    self._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = function(buffer)
        return self

    with replaced(nn.Module, "_apply", _apply):
        yield
