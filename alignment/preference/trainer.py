"""PairTrainer: the HF Trainer on preference pairs, whatever the objective."""

import logging
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback

from ..data.chat import TEXT_COLUMNS
from ..data.handed import pair_tokens
from ..data.prepare import longest_pair
from ..data.tokenization import SIDES, tokenize_pairs
from ..errors import UserError
from ..model.adapters import add_adapter
from ..model.config_files import whole_model
from ..model.head import add_lm_head
from ..model.layers import use_fused_kernels
from ..model.loading import disable_dropout, load_policy, parameter_dtype
from ..model.shared_prompt import use_shared_prompts, why_not
from ..model.text_part import freeze_other_parts
from ..run.card import write_card
from .by_tokens import smaller_budget
from .collate import Batch, PackedCollator, PaddedCollator
from .configs import PairConfig
from .evaluation import EvaluatedPairs
from .losses import response_sums
from .scores import CrossEntropy, PairLosses, PairScores, pair_metrics
from .steps import StepClock, StepSize, check_token_budget, counts_of
from .throughput import Throughput, dense_flops

logger = logging.getLogger(__name__)

# Arguments of the HF Trainer that mean nothing here.
UNUSED = {
    "model_init": "the model is loaded once, from `model`; make a trainer for each trial",
    "compute_loss_func": "an objective is a method of its own: override pair_losses (docs/add-an-objective.md)",
    "preprocess_logits_for_metrics": "logits of whole vocabularies never exist here; compute_metrics gets rewards",
}
FORWARD_COLUMNS = ("input_ids", "attention_mask", "position_ids", "shift_labels", "scored", "shared_prompt")


class PairTrainer(EvaluatedPairs):
    """Trains a causal language model on preference pairs; a subclass says what their losses are, in `pair_losses`.

    model: a path or Hub name, loaded with args.model_init_kwargs, or a model.
    train_dataset, eval_dataset: rows of conversations, text or token ids (see `alignment.data.handed.pair_tokens`);
    eval_dataset may be a dict of several. `evaluate` and `predict` take the same.
    compute_metrics: gets each held-out pair's rewards, (N, 2), chosen and rejected, as predictions, and (N,) zeros, the column
    that is to be the higher, as label_ids; what it returns is logged with the other metrics.
    processing_class: the tokenizer.
    peft_config: adds an adapter, and trains only that.

    Raises UserError for columns it cannot use and for data too few for one step, and NonFiniteStep as soon as a step's
    log-probabilities or gradient are not finite, unless skip_nonfinite allows for it.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PairConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        refuse_arguments(type(self).__name__, model, processing_class, kwargs)
        self.base_model_name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None)
        self.dataset_names: list[str] = []  # for the model card
        self.template_settings: dict[str, Any] | None = None  # the recipe's chat_template_kwargs, for the card too
        self.eval_pairs: dict[str, dict[str, np.ndarray]] = {}  # of the last evaluation, by metric prefix; and the PROBE's
        self.objective = args.objective

        if args.max_length is None or args.max_prompt_length is None:
            logger.warning("max_length is %d and max_prompt_length %d tokens.", args.length_limit, args.prompt_limit)
        train_dataset = self.tokenized("train_dataset", train_dataset, processing_class, args)
        eval_dataset = self.tokenized("eval_dataset", eval_dataset, processing_class, args)
        if train_dataset is not None:
            args.refuse_zero_steps(len(train_dataset))
        model = prepared(model, peft_config, args)
        policy = whole_model(model)
        padding = args.padding_value if args.padding_value is not None else processing_class.pad_token_id
        is_packed, scores_prompt = packs(policy, args.pair_layout), self.objective.scores_prompt
        collator = PackedCollator(scores_prompt) if is_packed else PaddedCollator(padding, scores_prompt)
        if isinstance(args.max_tokens_per_micro_batch, int):
            check_token_budget(args.max_tokens_per_micro_batch, collator, train_dataset)
        use_fused_kernels(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", None) or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        logger.info("Attention: %s.", self.attention_kernel())
        self.policy_config = policy.config.get_text_config()
        self.throughput = Throughput(dense_flops(policy, trainable_share(self.model)), args.device, is_packed=is_packed)
        self.add_callback(StepClock(self.throughput))
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(["trl", self.objective.tag])

    def tokenized(
        self, name: str, data: Dataset | dict[str, Dataset] | None, tokenizer: PreTrainedTokenizerBase, args: PairConfig
    ) -> Dataset | dict[str, Dataset] | None:
        """Token ids of a data set, or of each of several held-out ones."""
        if data is None:
            return None
        if isinstance(data, dict) and name == "eval_dataset":
            return {key: pair_tokens(f"{name}[{key!r}]", rows, tokenizer, args) for key, rows in data.items()}
        return pair_tokens(name, data, tokenizer, args)

    def attention_kernel(self, layout: str = "padded") -> str:
        """Of the pairs, as they are laid out."""
        if isinstance(self.data_collator, PackedCollator):
            layout = "kept" if self.args.pair_layout == "packed" else "packed"
        return super().attention_kernel(layout)

    # ---- The objective ----

    def pair_losses(self, scores: PairScores) -> PairLosses:
        """Losses and rewards of B pairs: what a method is."""
        raise NotImplementedError

    def concatenated_forward(self, model: nn.Module, batch: Batch) -> PairScores:
        """Score B pairs in one forward, over 2B padded rows or one packed row (see alignment.preference.collate)."""
        inputs = {key: batch[key] for key in FORWARD_COLUMNS if key in batch}
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        logps, tokens = response_sums(output.log_probs, batch["is_response"])  # (2B,) nats, (2B,) tokens
        logits, _ = response_sums(output.mean_logits, batch["is_response"])
        columns = [half for column in (logps, tokens, logits / tokens) for half in column.chunk(2)]
        whole = (None, None)
        if "is_chosen_row" in batch:
            whole = response_sums(output.log_probs[: len(batch["index"])], batch["is_chosen_row"])  # (B,), (B,)
        return PairScores(*columns, *whole, router_loss=output.get("aux_loss"))

    def cross_entropies(self, scores: PairScores, batch: dict[str, Tensor], step: StepSize | None) -> list[CrossEntropy]:
        """What is added to the pairs' losses: of the chosen responses, as the recipe says; of whole chosen rows, for ORPO."""
        terms = []
        if self.args.sft_weight > 0:
            total = step and step.chosen_tokens
            nats, tokens, scale = -scores.chosen_logp, scores.chosen_tokens, batch["sft_scale"]
            terms.append(CrossEntropy("sft_loss", self.args.sft_weight, nats, tokens, scale, total))
        if self.objective.scores_prompt:
            total = step and step.whole_chosen_tokens
            nats, tokens, scale = -scores.whole_chosen_logp, scores.whole_chosen_tokens, batch["whole_scale"]
            terms.append(CrossEntropy("nll_loss", 1.0, nats, tokens, scale, total))
        return terms

    # ---- Training ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: StepSize | None = None,
    ) -> Tensor | tuple[Tensor, PairScores]:
        """This micro-batch's share of the step's loss: every pair of the step weighs the same, however it is split."""
        scores = self.concatenated_forward(model, inputs)
        outcome = self.pair_losses(self.with_reference(scores, inputs["index"], self.train_dataset))
        step = self.step_size([inputs["token_counts"]]) if num_items_in_batch is None else num_items_in_batch
        repeated = inputs.get("repeated", False)
        # Gradients are averaged over processes, each of which has divided by the pairs of all.
        share = 0.0 if repeated else self.accelerator.num_processes / step.pairs
        loss = outcome.losses.sum() * share
        metrics = pair_metrics(scores, outcome, per_token=self.objective.per_token)
        sums = {name: (values.sum(), len(values)) for name, values in metrics.items()}
        for term in self.cross_entropies(scores, inputs, step):
            nats, weight = term.terms(self.args.preprocessing)
            total_weight = term.step_tokens if self.args.preprocessing == "exact" else step.pairs
            loss = loss + term.weight * nats.sum() * share * step.pairs / total_weight
            sums[term.name] = (nats.sum(), weight.sum())
        if scores.router_loss is not None:
            router_loss = scores.router_loss.to(loss.device) * len(outcome.losses)
            loss = loss + self.policy_config.router_aux_loss_coef * router_loss * share
            sums["router_loss"] = (router_loss, len(outcome.losses))
        if not repeated:
            self.step_sums.append(sums)
        rows = slice(0) if repeated else slice(None)
        self.note_rows(
            torch.isfinite(outcome.chosen_rewards + outcome.rejected_rewards)[rows],
            loss,
            index=inputs["index"][rows],
            chosen_reward=outcome.chosen_rewards[rows],
            rejected_reward=outcome.rejected_rewards[rows],
            chosen_tokens=scores.chosen_tokens[rows],
            rejected_tokens=scores.rejected_tokens[rows],
        )
        return (loss, scores) if return_outputs else loss

    def describe_batch(self, inputs: Batch) -> str:
        counts, rows = inputs["token_counts"], set(inputs["index"].tolist())
        numbers = [number for number, index in enumerate(self.train_dataset["index"]) if index in rows]
        return (
            f"{len(rows)} pairs, {counts.distinct:,} distinct tokens ({counts.padded:,} if padded), the longest pair "
            f"{longest_pair(self.train_dataset.select(numbers)):,}"
        )

    def smaller_batches(self) -> list[str]:
        packing = ["pair_layout: auto: no padding, each prompt once"] if self.args.pair_layout == "padded" else []
        if self.next_budget() is not None:
            return packing
        is_padded = isinstance(self.data_collator, PaddedCollator)
        longest = int(self.tokens_of_pairs().max())
        tokens = self.max_tokens or longest
        if self.micro_batch:
            counts = self.micro_batch["token_counts"]
            tokens = counts.padded if is_padded else counts.distinct
        return [*packing, *smaller_budget(tokens, longest)]

    def floating_point_ops(self, inputs: Batch) -> float:
        """Of the distinct tokens, where the architecture is known well enough to tell."""
        if self.throughput.step_flops is None:
            return 0
        body, head = self.throughput.step_flops
        return sum(body * count.distinct + head * count.scored for count in counts_of(inputs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the running means and the speed to every training record."""
        if "loss" in logs:
            logs.update(self.train_means.flush(self.accelerator))
            logs.update(speed := self.throughput.flush(self.accelerator))
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.set_postfix({name: f"{value:.3g}" for name, value in speed.items()})
        super().log(logs, start_time)

    # ---- Saving ----

    def sums_since_log(self) -> dict[str, Any]:
        return {"means": self.train_means.state(), "throughput": self.throughput.state()}

    def restore_sums(self, sums: dict[str, Any]) -> None:
        self.train_means.restore(sums["means"], self.args.device)
        self.throughput.restore(sums["throughput"])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md: method, paper, settings, data, held-out figures. `push_to_hub` calls this too."""
        settings = {
            "SFT weight": self.args.sft_weight,
            "pairs per step": self.get_total_train_batch_size(self.args),
            "max_length / max_prompt_length": f"{self.args.length_limit} / {self.args.prompt_limit}",
            **({"chat template settings": f"`{self.template_settings}`"} if self.template_settings else {}),
        }
        write_card(self, self.objective, base_model=self.base_model_name, datasets=self.dataset_names, settings=settings)

    # ---- Published names, for code that calls them ----

    def tokenize_row(self, feature: dict[str, str], model: PreTrainedModel | None = None) -> dict[str, list[int]]:
        """One text row in the published columns: {prompt, chosen, rejected}_input_ids and _attention_mask, and _labels."""
        batch = {column: [feature[column]] for column in TEXT_COLUMNS}
        tokens = tokenize_pairs(batch, [0], self.processing_class, self.args.length_rules)
        row: dict[str, list[int]] = {}
        for side in SIDES:
            ids, prompt = tokens[f"{side}_input_ids"][0], tokens[f"{side}_prompt_length"][0]
            row[f"{side}_input_ids"], row[f"{side}_attention_mask"] = ids, [1] * len(ids)
            row[f"{side}_labels"] = [self.args.label_pad_token_id] * prompt + ids[prompt:]
        prompt = row["chosen_input_ids"][: tokens["chosen_prompt_length"][0]]
        return {**row, "prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}

    @staticmethod
    def get_batch_logps(
        logits: Tensor, labels: Tensor, average_log_prob: bool = True, label_pad_token_id: int = -100
    ) -> Tensor:
        """(R,) log-probabilities of the labelled tokens, mean or sum, from (R, T, V) logits and (R, T) unshifted labels."""
        targets = labels[:, 1:].masked_fill(labels[:, 1:] == label_pad_token_id, -100)
        logps = logits[:, :-1].float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        sums, tokens = response_sums(logps, targets != -100)
        return sums / tokens if average_log_prob else sums


def prepared(
    model: str | PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: PairConfig
) -> PreTrainedModel | PeftModel:
    """Loaded, with the head that scores, the adapter that is trained, and no dropout."""
    if isinstance(model, str):
        model = load_policy(model, **{"dtype": parameter_dtype(None), **(args.model_init_kwargs or {})})
    policy = whole_model(model)
    if frozen := freeze_other_parts(policy):
        logger.info("Only the language model is trained; no text passes %s.", ", ".join(frozen))
    add_lm_head(policy)
    if peft_config is not None:
        model = add_adapter(model, peft_config, args)
    if args.disable_dropout and (switched_off := disable_dropout(model)):
        logger.info("Dropout off: %s", ", ".join(switched_off))
    return model


def refuse_arguments(name: str, model: Any, tokenizer: Any, others: dict[str, Any]) -> None:
    """Raises UserError for what a trainer of pairs lacks, and for what would have no effect on it."""
    if tokenizer is None:
        raise UserError(f"processing_class = None: {name} needs the tokenizer")
    for key, advice in UNUSED.items():
        if others.get(key) is not None:
            raise UserError(f"{key}: {advice}")
    if model is None:
        raise UserError(f"model = None: {name} needs a path, a name on the Hub or a model")


def trainable_share(model: nn.Module) -> float:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # ds_numel under ZeRO-3
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def packs(model: PreTrainedModel, pair_layout: str) -> bool:
    """Whether batches are packed; prepares the model for them. Raises UserError if that is asked for and impossible."""
    if pair_layout == "padded":
        return False
    reason = why_not(model)
    if reason is None:
        use_shared_prompts(model, keeps_eager=pair_layout == "packed")
        logger.info("Packed batches, each prompt computed once.")
        return True
    if pair_layout == "packed":
        raise UserError(f"pair_layout = packed: not possible with this model, because {reason}; use auto or padded")
    logger.info("Padded batches, each prompt computed twice: %s.", reason)
    return False
