"""What the scoring forward says of a few tokens against what the model itself says: measured in every run, for every layout.

A head that is more than a matrix, an attention that does not read the layout, a router that balances otherwise: the list of
what is known cannot name them all.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.tokenization import SIDES
from ..errors import UserError
from .collate import Batch, PackedCollator, PaddedCollator, Row
from .losses import response_sums

logger = logging.getLogger(__name__)

PAIRS, TOKENS = 2, 12  # of the training data; tokens of a prompt, and of a response
# Nats per token, in 32 and in 16 bits, of |mean log-probability| + 1; and how much more than rounding does between two plain
# forwards a scoring one may differ.
SLACK, NOISE = {False: 1e-4, True: 1e-2}, 10
REFUSALS = (AttributeError, TypeError, ValueError, KeyError, IndexError, NotImplementedError, RuntimeError)
FORWARD_COLUMNS = ("input_ids", "attention_mask", "position_ids", "shift_labels", "scored", "shared_prompt")


def settle_scoring(
    model: nn.Module, policy: PreTrainedModel, rows: list[Row], collator: Any, *, pad: int, half: bool, device: torch.device
) -> None:
    """Compare; score by the plain forward from now on where the other differs. On all processes alike.

    model: as it is trained, in whatever a strategy wraps around it. policy: what has the scoring forward. rows: training pairs.
    half: computed in 16 bits. Raises UserError where no forward gives what the model says.
    """
    rows = [short(row) for row in rows[:PAIRS]]
    padded = on_device(PaddedCollator(pad)(rows), device)
    with evaluating(model):
        alone = torch.stack([plain_mean(model, row, side, device) for side in SIDES for row in rows])  # (2B,)
        if not alone.isfinite().all():
            return  # the first step stops at it, and names the rows
        together, router = plain_means(model, padded)
        noise, limit = (alone - together).abs().max().item(), SLACK[half] * (1 + alone.abs().max().item())
        if noise > 2 * NOISE * limit:
            raise UserError(
                f"{type(policy).__name__}: the rows of a padded batch change one another, by {noise:.3g} nats per token; this "
                "model cannot be trained on batches. Set per_device_train_batch_size: 1 and pair_layout: packed, if it can be"
            )
        limit += NOISE * noise
        if problem := disagreement(lambda: scored_means(model, padded), alone, router, limit):
            policy.scores_plainly = True
            if still := disagreement(lambda: scored_means(model, padded), alone, router, limit):
                raise UserError(f"{type(policy).__name__}: its log-probabilities cannot be scored ({still})")
            logger.warning(
                "Scored by the model's own forward, all of its logits at once, because the head's way without them is not what "
                "%s computes: %s.", type(policy).__name__, problem,
            )  # fmt: skip
        layout = "padded"
        if isinstance(collator, PackedCollator):
            layout = "padded and packed"
            batch = on_device(PackedCollator()(rows), device)
            if problem := disagreement(lambda: scored_means(model, batch), alone, None, limit):
                raise UserError(
                    f"{type(policy).__name__}: packed batches do not give what the model says of a pair ({problem}); set "
                    "pair_layout: padded"
                )
    logger.info("Scoring, measured on %d pairs: %s rows give what the model's plain forward says.", len(rows), layout)


def short(row: Row) -> Row:
    """The end of a pair's prompt, and the beginnings of its responses."""
    changes: Row = {}
    for side in SIDES:
        ids, prompt = row[f"{side}_input_ids"], row[f"{side}_prompt_length"]
        start = max(prompt - TOKENS, 0)
        cut = ids[start : prompt + TOKENS]
        changes |= {
            f"{side}_input_ids": cut,
            f"{side}_prompt_length": prompt - start,
            f"{side}_length": len(cut) - (prompt - start),
        }
    return {**row, **changes}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, no gradients, and the random numbers of training left where they were."""
    was_training = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(was_training)


def on_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


# ---- The three forwards. Mean log-probability of each response, in nats per token ----


def plain_mean(model: nn.Module, row: Row, side: str, device: torch.device) -> Tensor:
    """Of one response, by itself; ()."""
    ids, prompt = torch.tensor([row[f"{side}_input_ids"]], device=device), max(row[f"{side}_prompt_length"], 1)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logps = output.logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    return logps[prompt - 1 :].mean().cpu()


def plain_means(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Of the 2B responses of a padded batch, (2B,), and the model's own router loss."""
    wanted = {"output_router_logits": True} if routes(model) else {}
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **wanted)
    labels = batch["shift_labels"].clamp(min=0)
    logps = output.logits.float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    sums, tokens = response_sums(logps * batch["is_response"], batch["is_response"])
    router = output.get("aux_loss") if routes(model) else None
    if routes(model) and router is None:
        raise UserError(
            "output_router_logits = True: this model's forward gives no load-balancing loss; set it to false, in its "
            "config.json or by model_init_kwargs"
        )
    return (sums / tokens).cpu(), router


def scored_means(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """As `plain_means`, by the forward that trains."""
    inputs = {key: batch[key] for key in FORWARD_COLUMNS if key in batch}
    output = model(**inputs, use_cache=False, fused_lm_head=True)
    sums, tokens = response_sums(output.log_probs, batch["is_response"])
    return (sums / tokens).float().cpu(), output.get("aux_loss")


def routes(model: nn.Module) -> bool:
    bare = getattr(model, "module", model)
    return bool(getattr(bare.config.get_text_config(), "output_router_logits", False))


def disagreement(
    forward: Callable[[], tuple[Tensor, Tensor | None]], wanted: Tensor, router: Tensor | None, limit: float
) -> str | None:
    """What is wrong with a forward; None if nothing is."""
    try:
        found, found_router = forward()
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    off = (found - wanted).abs().max().item()
    if not off <= limit:
        return f"off by {off:.3g} nats per token, {limit:.2g} allowed"
    if router is not None and (found_router is None or not abs(found_router.item() - router.item()) <= limit):
        found_here = "none" if found_router is None else f"{found_router.item():.4g}"
        return f"its load-balancing loss is {router.item():.4g}, and {found_here} was found"
    return None
