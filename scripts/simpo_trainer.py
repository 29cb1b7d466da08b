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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from alignment.card import simpo_card
from alignment.chat import TEXT_COLUMNS
from alignment.collate import PackedCollator, PaddedCollator
from alignment.errors import TrainingStopped, UserError
from alignment.head import add_lm_head
from alignment.losses import response_sums, simpo_loss
from alignment.metrics import RunningMeans
from alignment.models import add_adapter, disable_dropout, load_policy
from alignment.prepare import to_tokens
from alignment.shared_prompt import use_shared_prompts, why_not
from alignment.tokenization import SIDES, TOKEN_COLUMNS, LengthRules, tokenize_pairs

from .simpo_config import SimPOConfig

logger = logging.getLogger(__name__)


class NonFiniteLogps(TrainingStopped):
    """Log-probabilities became NaN or infinite; no optimizer step was taken with them."""


class PairScores(NamedTuple):
    """What one forward says of B pairs. mean_logp in nats per response token, tokens per response; all (B,)."""

    chosen_mean_logp: Tensor
    rejected_mean_logp: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_mean_logit: Tensor  # over response tokens and vocabulary
    rejected_mean_logit: Tensor


class StepSize(NamedTuple):
    """What one optimizer step averages over, on all processes; scalar tensors."""

    pairs: Tensor
    chosen_tokens: Tensor


class SimPOTrainer(Trainer):
    """Trains a causal language model on preference pairs with SimPO (Meng et al. 2024, https://arxiv.org/abs/2405.14734).

    model: a path or Hub name, loaded with args.model_init_kwargs, or a model.
    train_dataset, eval_dataset: rows of text (columns prompt, chosen, rejected) or of token ids (see
    `alignment.tokenization.TOKEN_COLUMNS`, with index); eval_dataset may be a dict of several.
    processing_class: the tokenizer.
    peft_config: adds an adapter, and trains only that.

    Raises UserError for columns it cannot use, and NonFiniteLogps as soon as a step's log-probabilities are not finite.
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
        self.train_means = RunningMeans()
        self.step_checks: list[tuple[Tensor, Tensor]] = []  # of the running step: (B,) finite?, (B,) index
        self.eval_pairs: dict[str, dict[str, np.ndarray]] = {}  # of the last evaluation, by metric prefix

        if args.max_length is None or args.max_prompt_length is None:
            logger.warning("max_length is %d and max_prompt_length %d tokens.", args.length_limit, args.prompt_limit)
        rules = length_rules(args)
        train_dataset, eval_dataset = (
            tokenized(data, processing_class, rules, args.dataset_num_proc) for data in (train_dataset, eval_dataset)
        )
        if isinstance(model, str):
            model = load_policy(model, **(args.model_init_kwargs or {}))
        policy = model.get_base_model() if isinstance(model, PeftModel) else model
        add_lm_head(policy, args.device.type)
        if peft_config is not None:
            model = add_adapter(model, peft_config, args)
        if args.disable_dropout and (switched_off := disable_dropout(model)):
            logger.info("Dropout off: %s", ", ".join(switched_off))
        padding = args.padding_value if args.padding_value is not None else processing_class.pad_token_id
        collator = PackedCollator() if packs(policy, args.pair_layout) else PaddedCollator(pad_token_id=padding)
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
        unwrapped = self.accelerator.unwrap_model(self.model)
        if hasattr(unwrapped, "add_model_tags"):
            unwrapped.add_model_tags(list(self._tag_names))

    # ---- The objective ----

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Tensor]) -> PairScores:
        """Score B pairs in one forward, over 2B padded rows or one packed row (see alignment.collate)."""
        inputs = {key: value for key, value in batch.items() if key not in ("is_response", "index")}
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        logps, tokens = response_sums(output.log_probs, batch["is_response"])  # (2B,) nats, (2B,) tokens
        logits, _ = response_sums(output.mean_logits, batch["is_response"])
        columns = [half for column in (logps / tokens, tokens, logits / tokens) for half in column.chunk(2)]
        return PairScores(*columns)

    def simpo_loss(
        self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, chosen rewards and rejected rewards, each (B,), of (B,) mean log-probabilities; see alignment.losses."""
        losses = simpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            beta=self.args.beta,
            gamma_beta_ratio=self.args.gamma_beta_ratio,
            loss_type=self.args.loss_type,
            label_smoothing=self.args.label_smoothing,
        )
        return losses, self.args.beta * policy_chosen_logps.detach(), self.args.beta * policy_rejected_logps.detach()

    def sft_terms(self, scores: PairScores) -> tuple[Tensor, Tensor]:
        """Numerator and weight, both (B,), whose ratio of sums is the mean cross-entropy of the chosen responses.

        `published`: every pair weighs 1 and carries its micro-batch's mean per token. `exact`: every pair weighs its
        tokens, so that the mean is over all chosen tokens of the step, however it is split.
        """
        nats = -scores.chosen_mean_logp * scores.chosen_tokens
        if self.args.preprocessing == "exact":
            return nats, scores.chosen_tokens
        batch_mean = nats.sum() / scores.chosen_tokens.sum()
        return batch_mean.expand_as(nats), torch.ones_like(scores.chosen_tokens)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: StepSize | None = None,
    ) -> Tensor | tuple[Tensor, PairScores]:
        """This micro-batch's share of the step's loss: every pair of the step weighs the same, however it is split."""
        scores = self.concatenated_forward(model, inputs)
        losses, chosen_rewards, rejected_rewards = self.simpo_loss(scores.chosen_mean_logp, scores.rejected_mean_logp)
        step = self.step_size([inputs]) if num_items_in_batch is None else num_items_in_batch
        # Gradients are averaged over processes, each of which has divided by the pairs of all.
        processes = self.accelerator.num_processes
        loss = losses.sum() * processes / step.pairs
        if self.args.sft_weight > 0:
            nats, weight = self.sft_terms(scores)
            total = step.chosen_tokens if self.args.preprocessing == "exact" else step.pairs
            loss = loss + self.args.sft_weight * nats.sum() * processes / total
            self.train_means.add("sft_loss", nats.sum(), weight.sum())
        self.watch(scores, chosen_rewards, rejected_rewards, inputs["index"])
        return (loss, scores) if return_outputs else loss

    def watch(self, scores: PairScores, chosen_rewards: Tensor, rejected_rewards: Tensor, index: Tensor) -> None:
        """Add a training micro-batch to the running means; stop before the step's last backward if it is not finite."""
        for name, values in pair_metrics(scores, chosen_rewards, rejected_rewards).items():
            self.train_means.add(name, values.sum(), len(values))
        self.step_checks.append((torch.isfinite(chosen_rewards + rejected_rewards), index))
        if self.accelerator.sync_gradients:
            finite, rows = (torch.cat(column) for column in zip(*self.step_checks, strict=True))
            self.step_checks.clear()
            self.stop_unless_finite(finite, rows, "training")

    def stop_unless_finite(self, finite: Tensor, rows: Tensor, split: str) -> None:
        """Raises NonFiniteLogps on every process if a pair of any is not finite. One wait for the device a step."""
        if self.accelerator.reduce(finite.logical_not().sum(), reduction="sum") == 0:
            return
        bad = rows[~finite].tolist()
        raise NonFiniteLogps(
            f"step {self.state.global_step + 1}: the log-probabilities of {split} rows {bad or 'on another process'} are "
            "not finite. No step was taken with them; the last checkpoint is as it was. Usual causes: a learning rate "
            "that is too high, fp16, damaged weights."
        )

    # ---- Steps ----

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, StepSize | None]:
        """The micro-batches of one optimizer step, and how many pairs they are on all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, self.step_size(samples) if samples else None

    def step_size(self, batches: list[dict[str, Tensor]]) -> StepSize:
        pairs = sum(len(batch["index"]) for batch in batches)
        chosen = sum(batch["is_response"].chunk(2)[0].sum() for batch in batches)
        counts = torch.stack([torch.as_tensor(pairs, device=chosen.device), chosen]).to(self.args.device)
        return StepSize(*self.accelerator.reduce(counts, reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the running means to every training record."""
        if "loss" in logs:
            logs.update(self.train_means.flush(self.accelerator))
        super().log(logs, start_time)

    # ---- Evaluation: per pair, so that every held-out row counts once on any number of processes ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[Tensor, ...], None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self.concatenated_forward(model, inputs)
            losses, *_ = self.simpo_loss(scores.chosen_mean_logp, scores.rejected_mean_logp)
        return None, (inputs["index"], losses, *self.sft_terms(scores), *scores), None

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
        scores = PairScores(*columns)
        chosen, rejected = self.args.beta * scores.chosen_mean_logp, self.args.beta * scores.rejected_mean_logp
        finite = torch.isfinite(chosen + rejected)
        if not finite.all():
            raise NonFiniteLogps(
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, hub_token among them; the recipe beside it says the same in YAML.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

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
            "pairs per step": self.get_total_train_batch_size(self.args) * self.args.gradient_accumulation_steps,
            "steps": self.state.global_step,
            "max_length / max_prompt_length": f"{self.args.length_limit} / {self.args.prompt_limit}",
            "preprocessing": self.args.preprocessing,
            "seed": self.args.seed,
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
        tokens = tokenize_pairs(batch, [0], self.processing_class, length_rules(self.args))
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


def length_rules(args: SimPOConfig) -> LengthRules:
    return LengthRules(args.length_limit, args.prompt_limit, args.truncation_mode, args.preprocessing)


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
