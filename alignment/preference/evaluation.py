"""Evaluation of pairs, one by one, so that every held-out row counts once on any number of processes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from ..data.handed import pair_tokens
from ..run.guards import NonFiniteStep
from .collate import Batch
from .records import pair_columns, rows_of
from .reference import PROBE, TRAIN, ScoredFirst
from .scores import PairLosses, PairScores, pair_metrics
from .steps import DividedSteps


class EvaluatedPairs(DividedSteps, ScoredFirst):
    """A Trainer that evaluates pairs, and keeps each one's scores.

    The subclass scores pairs (`concatenated_forward`), says what their losses are (`pair_losses`, `cross_entropies`) and
    tokenizes what it is handed (`tokenized`). `eval_pairs`: columns of the last evaluation, by metric prefix, and the PROBE's.
    """

    eval_pairs: dict[str, dict[str, np.ndarray]]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not isinstance(eval_dataset, str):  # the name of one of several
            eval_dataset = self.tokenized("eval_dataset", eval_dataset, self.processing_class, self.args)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """The HF Trainer's, of pairs: predictions are (N, 2) rewards, label_ids (N,) zeros, see compute_metrics."""
        return super().predict(pair_tokens("test_dataset", test_dataset, self.processing_class, self.args), *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[Tensor, ...], None]:
        scored: dict[str, list[Tensor]] = {}
        order: list[int] = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for part, places in self.in_parts(self._prepare_inputs(inputs)):
                columns = self.concatenated_forward(model, part).per_pair()
                columns |= {name: part[name] for name in ("index", "sft_scale", "whole_scale")}
                for name, column in columns.items() if places else ():
                    scored.setdefault(name, []).append(column)
                order += places
        place = torch.tensor(order, device=self.args.device).argsort()
        whole = {name: torch.cat(columns)[place] for name, columns in scored.items()}
        self.scored_columns = tuple(whole)
        return None, tuple(whole.values()), None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        columns = dict(zip(self.scored_columns, map(torch.from_numpy, output.predictions), strict=True))
        about = {name: columns.pop(name) for name in ("index", "sft_scale", "whole_scale")}
        rows = dataloader.dataset
        scores = self.with_reference(PairScores(**columns), about["index"], rows)
        outcome = self.pair_losses(scores)
        finite = torch.isfinite(outcome.chosen_rewards + outcome.rejected_rewards)
        if not finite.all():
            raise NonFiniteStep(
                f"step {self.state.global_step}: the log-probabilities of {metric_key_prefix} rows "
                f"{about['index'][~finite].tolist()} are not finite; the last checkpoint is as it was."
            )
        means = self.evaluation_means(scores, outcome, about)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        if metric_key_prefix == next(iter(self.held_out_sets()), None):
            output.metrics.update(self.probe_metrics())
        self.eval_pairs[metric_key_prefix] = pair_columns(self.state.global_step, rows, about["index"], scores, outcome)
        rewards = torch.stack([outcome.chosen_rewards, outcome.rejected_rewards], dim=1).cpu().numpy()
        output = output._replace(predictions=rewards, label_ids=np.zeros(len(rewards), dtype=np.int64))
        if self.compute_metrics is not None:
            own = self.compute_metrics(EvalPrediction(predictions=output.predictions, label_ids=output.label_ids))
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in own.items()})
        return output

    def probe_metrics(self) -> dict[str, float]:
        """The metrics of the probe's pairs, whose columns are kept as the held-out ones' are."""
        drawn = self.probe_rows()
        if drawn is None:
            return {}
        scored = self.score(drawn, "the training probe")
        scores = self.with_reference(PairScores.of(scored), scored["index"], self.train_dataset)
        outcome = self.pair_losses(scores)
        self.eval_pairs[PROBE] = pair_columns(self.state.global_step, drawn, scored["index"], scores, outcome)
        metrics = pair_metrics(scores, outcome, per_token=self.objective.per_token)
        # What is kept of scores has no logits.
        known = {name: values.double().mean().item() for name, values in metrics.items() if not name.startswith("logits/")}
        return {f"probe_{name}": value for name, value in known.items()}

    def pair_records(self, of: str = "eval") -> list[dict[str, Any]]:
        """A row for each held-out pair, or each of the PROBE, before the first step and in the last evaluation."""
        before, rows = self.before_training(of), self.train_dataset if of == PROBE else self.eval_dataset
        tables = []
        if before is not None:
            scores = self.with_reference(PairScores.of(before), before["index"], rows)
            tables.append(pair_columns(0, rows, before["index"], scores, self.pair_losses(scores)))
        tables += [self.eval_pairs[of]] if of in self.eval_pairs else []
        return [row for table in tables for row in rows_of(table)]

    def before_training(self, of: str) -> dict[str, Tensor] | None:
        """Columns of the scores before the first step; the probe's are among the training pairs', where those were scored."""
        if not self.args.score_step_0:
            return None
        if of in self.step_zero:
            return self.step_zero[of].columns
        drawn = self.probe_rows() if of == PROBE and TRAIN in self.step_zero else None
        if drawn is None:
            return None
        columns = self.step_zero[TRAIN].columns
        members = torch.isin(columns["index"], torch.tensor(list(drawn["index"])))
        return {name: column[members] for name, column in columns.items()}

    def evaluation_means(self, scores: PairScores, outcome: PairLosses, about: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of a data set, over all its pairs."""
        metrics = pair_metrics(scores, outcome, per_token=self.objective.per_token)
        means = {name: values.double().mean().item() for name, values in metrics.items()}
        means["loss"] = outcome.losses.double().mean().item()
        for term in self.cross_entropies(scores, about, step=None):
            nats, weight = term.terms(self.args.preprocessing)
            means[term.name] = (nats.double().sum() / weight.sum()).item()
            means["loss"] += term.weight * means[term.name]
        return means
