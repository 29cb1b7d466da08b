"""SimPOTrainer: the HF Trainer with the SimPO objective."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from alignment.data.chat import TEXT_COLUMNS
from alignment.data.prepare import longest_pair, to_tokens
from alignment.data.tokenization import SIDES, TOKEN_COLUMNS, LengthRules, tokenize_pairs
from alignment.errors import UserError
from alignment.model.adapters import add_adapter
from alignment.model.head import add_lm_head
from alignment.model.loading import disable_dropout, load_policy, parameter_dtype
from alignment.model.shared_prompt import use_shared_prompts, why_not
from alignment.preference.collate import Batch, PackedCollator, PaddedCollator
from alignment.preference.losses import response_sums, simpo_loss
from alignment.preference.steps import DividedSteps, StepClock, StepSize, check_token_budget, micro_batches
from alignment.preference.throughput import Throughput, dense_flops
from alignment.report.card import simpo_card
from alignment.run.durable import DurableTrainer
from alignment.run.guards import NonFiniteStep

from .simpo_config import SimPOConfig

logger = logging.getLogger(__name__)


FORWARD_COLUMNS = ("input_ids", "attention_mask", "position_ids", "shift_labels", "shared_prompt")


class PairScores(NamedTuple):
    """What one forward says of B pairs. mean_logp in nats per response token, tokens per response; all (B,)."""

    chosen_mean_logp: Tensor
    rejected_mean_logp: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_mean_logit: Tensor  # over response tokens and vocabulary
    rejected_mean_logit: Tensor
    router_loss: Tensor | None  # (), the load balancing of a mixture of experts that asks for it


class SimPOTrainer(DividedSteps, DurableTrainer):
    """Trains a causal language model on preference pairs with SimPO (Meng et al. 2024, https://arxiv.org/abs/2405.14734).

    model: a path or Hub name, loaded with args.model_init_kwargs, or a model.
    train_dataset, eval_dataset: rows of text (columns prompt, chosen, rejected) or of token ids (see
    `alignment.data.tokenization.TOKEN_COLUMNS`, with index); eval_dataset may be a dict of several.
    processing_class: the tokenizer.
    peft_config: adds an adapter, and trains only that.

    Raises UserError for columns it cannot use and for data too few for one step, and NonFiniteStep as soon as a step's
    log-probabilities or gradient are not finite, unless skip_nonfinite allows for it.
    """

    _tag_names = ("trl", "simpo")
    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SimPOConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        if processing_class is None:
            raise UserError("processing_class = None: SimPOTrainer needs the tokenizer")
        self.base_model_name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None)
        self.dataset_names: list[str] = []  # for the model card
        self.template_settings: dict[str, Any] | None = None  # the recipe's chat_template_kwargs, for the card too
        self.eval_pairs: dict[str, dict[str, np.ndarray]] = {}  # of the last evaluation, by metric prefix

        if args.max_length is None or args.max_prompt_length is None:
            logger.warning("max_length is %d and max_prompt_length %d tokens.", args.length_limit, args.prompt_limit)
        rules = args.length_rules
        train_dataset, eval_dataset = (
            tokenized(data, processing_class, rules, args.dataset_num_proc) for data in (train_dataset, eval_dataset)
        )
        if train_dataset is not None:
            args.refuse_zero_steps(len(train_dataset))
        if isinstance(model, str):
            model = load_policy(model, **{"dtype": parameter_dtype(None), **(args.model_init_kwargs or {})})
        policy = model.get_base_model() if isinstance(model, PeftModel) else model
        add_lm_head(policy, args.device.type)
        if peft_config is not None:
            model = add_adapter(model, peft_config, args)
        if args.disable_dropout and (switched_off := disable_dropout(model)):
            logger.info("Dropout off: %s", ", ".join(switched_off))
        padding = args.padding_value if args.padding_value is not None else processing_class.pad_token_id
        collator = PackedCollator() if packs(policy, args.pair_layout) else PaddedCollator(pad_token_id=padding)
        if args.max_tokens_per_micro_batch is not None:
            check_token_budget(args.max_tokens_per_micro_batch, collator, train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", collator),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        self.policy_config = policy.config.get_text_config()
        is_packed = isinstance(collator, PackedCollator)
        self.throughput = Throughput(dense_flops(policy, trainable_share(self.model)), args.device, is_packed=is_packed)
        self.add_callback(StepClock(self.throughput))
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))

    # ---- The objective ----

    def concatenated_forward(self, model: nn.Module, batch: Batch) -> PairScores:
        """Score B pairs in one forward, over 2B padded rows or one packed row (see alignment.preference.collate)."""
        inputs = {key: batch[key] for key in FORWARD_COLUMNS if key in batch}
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        logps, tokens = response_sums(output.log_probs, batch["is_response"])  # (2B,) nats, (2B,) tokens
        logits, _ = response_sums(output.mean_logits, batch["is_response"])
        columns = [half for column in (logps / tokens, tokens, logits / tokens) for half in column.chunk(2)]
        return PairScores(*columns, router_loss=output.get("aux_loss"))

    def simpo_loss(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, chosen rewards and rejected rewards, each (B,), of (B,) mean log-probabilities; see preference.losses."""
        losses = simpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            beta=self.args.beta,
            gamma_beta_ratio=self.args.gamma_beta_ratio,
            loss_type=self.args.loss_type,
            label_smoothing=self.args.label_smoothing,
        )
        return losses, self.args.beta * policy_chosen_logps.detach(), self.args.beta * policy_rejected_logps.detach()

    def sft_terms(self, scores: PairScores, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and weight, both (B,), whose ratio of sums is the mean cross-entropy of the chosen responses.

        `published`: every pair weighs 1 and its nats are scaled by its micro-batch's mean length. `exact`: every pair
        weighs its tokens, so that the mean is over all chosen tokens of the step, however it is split.
        """
        nats = -scores.chosen_mean_logp * scores.chosen_tokens
        if self.args.preprocessing == "exact":
            return nats, scores.chosen_tokens
        return nats * scale, torch.ones_like(scores.chosen_tokens)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: StepSize | None = None,
    ) -> Tensor | tuple[Tensor, PairScores]:
        """This micro-batch's share of the step's loss: every pair of the step weighs the same, however it is split."""
        scores = self.concatenated_forward(model, inputs)
        losses, chosen_rewards, rejected_rewards = self.simpo_loss(scores.chosen_mean_logp, scores.rejected_mean_logp)
        step = self.step_size([inputs]) if num_items_in_batch is None else num_items_in_batch
        repeated = inputs.get("repeated", False)
        # Gradients are averaged over processes, each of which has divided by the pairs of all.
        share = 0.0 if repeated else self.accelerator.num_processes / step.pairs
        loss = losses.sum() * share
        metrics = pair_metrics(scores, chosen_rewards, rejected_rewards)
        sums = {name: (values.sum(), len(values)) for name, values in metrics.items()}
        if self.args.sft_weight > 0:
            nats, weight = self.sft_terms(scores, inputs["sft_scale"])
            total_weight = step.chosen_tokens if self.args.preprocessing == "exact" else step.pairs
            loss = loss + self.args.sft_weight * nats.sum() * share * step.pairs / total_weight
            sums["sft_loss"] = (nats.sum(), weight.sum())
        if scores.router_loss is not None:
            router_loss = scores.router_loss.to(loss.device) * len(losses)
            loss = loss + self.policy_config.router_aux_loss_coef * router_loss * share
            sums["router_loss"] = (router_loss, len(losses))
        if not repeated:
            self.step_sums.append(sums)
        rows = slice(0) if repeated else slice(None)
        self.note_rows(
            torch.isfinite(chosen_rewards + rejected_rewards)[rows],
            loss,
            index=inputs["index"][rows],
            chosen_reward=chosen_rewards[rows],
            rejected_reward=rejected_rewards[rows],
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
        if not isinstance(self.data_collator, PackedCollator):
            packing = ["pair_layout: auto: no padding, each prompt once"] if self.args.pair_layout == "padded" else []
            return [*packing, *super().smaller_batches()]
        longest = longest_pair(self.train_dataset)
        limit = self.args.max_tokens_per_micro_batch or longest
        tokens = self.micro_batch["token_counts"].distinct if self.micro_batch else limit
        if tokens <= longest:
            return []
        return [f"max_tokens_per_micro_batch: {max(tokens // 2, longest)}: the same steps, divided by tokens"]

    def floating_point_ops(self, inputs: Batch) -> float:
        """Of the distinct tokens, where the architecture is known well enough to tell."""
        if self.throughput.step_flops is None:
            return 0
        body, head = self.throughput.step_flops
        counts = [batch["token_counts"] for batch in micro_batches(inputs)]
        return sum(body * count.distinct + head * count.scored for count in counts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the running means and the speed to every training record."""
        if "loss" in logs:
            logs.update(self.train_means.flush(self.accelerator))
            logs.update(speed := self.throughput.flush(self.accelerator))
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.set_postfix({name: f"{value:.3g}" for name, value in speed.items()})
        super().log(logs, start_time)

    # ---- Evaluation: per pair, so that every held-out row counts once on any number of processes ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[Tensor, ...], None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.concatenated_forward(model, inputs)
            losses, *_ = self.simpo_loss(scores.chosen_mean_logp, scores.rejected_mean_logp)
        return None, (inputs["index"], losses, *self.sft_terms(scores, inputs["sft_scale"]), *scores[:6]), None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        index, losses, sft_nats, sft_weight, *columns = (torch.from_numpy(column) for column in output.predictions)
        scores = PairScores(*columns, router_loss=None)
        chosen, rejected = self.args.beta * scores.chosen_mean_logp, self.args.beta * scores.rejected_mean_logp
        finite = torch.isfinite(chosen + rejected)
        if not finite.all():
            raise NonFiniteStep(
                f"step {self.state.global_step}: the log-probabilities of {metric_key_prefix} rows "
                f"{index[~finite].tolist()} are not finite; the last checkpoint is as it was."
            )
        means = {name: values.double().mean().item() for name, values in pair_metrics(scores, chosen, rejected).items()}
        means["loss"] = losses.double().mean().item()
        if self.args.sft_weight > 0:
            means["sft_loss"] = (sft_nats.double().sum() / sft_weight.sum()).item()
            means["loss"] += self.args.sft_weight * means["sft_loss"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        self.eval_pairs[metric_key_prefix] = {
            "index": index.numpy(),
            "chosen_reward": chosen.numpy(),
            "rejected_reward": rejected.numpy(),
            "chosen_tokens": scores.chosen_tokens.numpy(),
            "rejected_tokens": scores.rejected_tokens.numpy(),
        }
        return output

    # ---- Saving ----

    def sums_since_log(self) -> dict[str, Any]:
        return {"means": self.train_means.state(), "throughput": self.throughput.state()}

    def restore_sums(self, sums: dict[str, Any]) -> None:
        self.train_means.restore(sums["means"], self.args.device)
        self.throughput.restore(sums["throughput"])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md: method, paper, settings, data, held-out figures. `push_to_hub` calls this too."""
        if not self.is_world_process_zero():
            return
        evaluations = [record for record in self.state.log_history if "eval_loss" in record]
        held_out = {key.removeprefix("eval_"): value for key, value in evaluations[-1].items()} if evaluations else {}
        steps = {"beta": self.args.beta, "gamma / beta": self.args.gamma_beta_ratio, "loss": self.args.loss_type}
        settings = {
            **steps,
            "SFT weight": self.args.sft_weight,
            "learning rate": self.args.learning_rate,
            "pairs per step": self.get_total_train_batch_size(self.args),
            "steps": self.state.global_step,
            "max_length / max_prompt_length": f"{self.args.length_limit} / {self.args.prompt_limit}",
            "preprocessing": self.args.preprocessing,
            "seed": self.args.seed,
            **({"chat template settings": f"`{self.template_settings}`"} if self.template_settings else {}),
        }
        name = (self.args.hub_model_id or self.args.run_name or Path(self.args.output_dir).name).split("/")[-1]
        card = simpo_card(
            name=name, base_model=self.base_model_name, datasets=self.dataset_names, settings=settings, held_out=held_out
        )
        Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")

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


def trainable_share(model: nn.Module) -> float:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # ds_numel under ZeRO-3
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def pair_metrics(scores: PairScores, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """The published metrics, pair by pair; each (B,)."""
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": scores.chosen_mean_logp,
        "logps/rejected": scores.rejected_mean_logp,
        "logits/chosen": scores.chosen_mean_logit,
        "logits/rejected": scores.rejected_mean_logit,
        "lengths/chosen": scores.chosen_tokens.float(),
        "lengths/rejected": scores.rejected_tokens.float(),
    }


def packs(model: PreTrainedModel, pair_layout: str) -> bool:
    """Whether batches are packed; prepares the model for them. Raises UserError if that is asked for and impossible."""
    if pair_layout == "padded":
        return False
    reason = why_not(model)
    if reason is None:
        use_shared_prompts(model)
        return True
    if pair_layout == "packed":
        raise UserError(f"pair_layout = packed: not possible with this model, because {reason}; use auto or padded")
    logger.info("Padded batches, each prompt computed twice: %s.", reason)
    return False


def tokenized(
    data: Dataset | dict[str, Dataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    rules: LengthRules,
    num_proc: int | None,
) -> Dataset | dict[str, Dataset] | None:
    """Token ids of a data set, of each of several, or of none; what is tokenized already is left as it is."""
    if data is None or isinstance(data, dict):
        return data and {name: tokenized(split, tokenizer, rules, num_proc) for name, split in data.items()}
    columns = set(data.column_names)
    if columns >= {*TOKEN_COLUMNS, "index"}:
        return data
    if not columns >= set(TEXT_COLUMNS):
        raise UserError(
            f"columns {sorted(columns)}: SimPOTrainer needs text in {', '.join(TEXT_COLUMNS)}, or token ids in "
            f"{', '.join((*TOKEN_COLUMNS, 'index'))}"
        )
    return to_tokens(data, tokenizer, rules, num_proc=num_proc)
