"""DPO, IPO, length-normalized DPO and ORPO against TRL 1.16: the same tokens give the same losses and gradients.

Where TRL differs from what it says, the test goes around it: its `sigmoid` ignores label_smoothing, so the smoothed loss is
compared with the mixture of its own losses on pairs and swapped pairs; its `sigmoid_norm` logs rewards of summed log-ratios,
so rewards are not compared there.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOConfig as TRLDPOConfig
from trl import DPOTrainer as TRLDPOTrainer
from trl.experimental.orpo import ORPOConfig as TRLORPOConfig
from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

from alignment.data.tokenization import SIDES
from tests.builders import tiny_model
from tests.unit.preference.conftest import ROWS

PLAIN = {
    "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "max_length": None,
    "disable_tqdm": True,
}  # fmt: skip
DPO_KINDS = {
    "sigmoid": ({}, "sigmoid"),
    "hinge": ({"loss_type": "hinge"}, "hinge"),
    "ipo": ({"loss_type": "ipo"}, "ipo"),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, "robust"),
    "length-normalized": ({"length_normalized": True}, "sigmoid_norm"),
}
every_kind = pytest.mark.parametrize("kind", DPO_KINDS)


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The same with other weights: a policy that has left its reference."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def our_loss(trainer: Any, model: PreTrainedModel, rows: list[dict] = ROWS) -> Tensor:
    return trainer.compute_loss(model, trainer.data_collator(rows))


def our_dpo(build_of: Any, dtype: torch.dtype, **settings: Any) -> tuple[Any, PreTrainedModel]:
    """A trainer that scored its reference, and its policy some way from it."""
    trainer = build_of("dpo", tiny_model(dtype=dtype), learning_rate=0.0, beta=0.3, **settings)
    trainer.train()
    return trainer, moved(trainer.model)


def trl_dpo(tokenizer: Any, dtype: torch.dtype, tmp_path: Any, kind: str) -> TRLDPOTrainer:
    settings, loss_type = DPO_KINDS[kind]
    smoothing = {"label_smoothing": settings.get("label_smoothing", 0.0)}
    args = TRLDPOConfig(output_dir=str(tmp_path), loss_type=[loss_type], beta=0.3, **smoothing, **PLAIN)
    unused = Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}])
    policy = moved(tiny_model(dtype=dtype))
    return TRLDPOTrainer(policy, tiny_model(dtype=dtype), args, train_dataset=unused, processing_class=tokenizer)


def trl_batch(trainer: TRLDPOTrainer, rows: list[dict]) -> dict[str, Tensor]:
    columns = [
        {
            "prompt_ids": row["chosen_input_ids"][: row["chosen_prompt_length"]],
            **{f"{side}_ids": row[f"{side}_input_ids"][row[f"{side}_prompt_length"] :] for side in SIDES},
        }
        for row in rows
    ]
    return trainer.data_collator(columns)


def plain_head(model: PreTrainedModel) -> None:
    """In the place of TRL's fused head, which computes in float32: a log-softmax in the model's own precision."""
    forward = type(model).forward

    def scored(*arguments: Any, labels: Tensor, fused_lm_head: bool = False, **settings: Any) -> Any:
        logits = forward(model, *arguments, **settings).logits[:, :-1]
        targets = labels[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1).masked_fill(targets == -100, 0)
        zeros = torch.zeros_like(logps)
        return mock.Mock(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None)

    model.forward = scored


@every_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_dpo_and_its_kin_are_trls(build_of, tokenizer, tmp_path, kind, dtype, tolerance):
    """float32 with TRL's trainer untouched; float64 with a head of the model's own precision."""
    trainer, policy = our_dpo(build_of, dtype, pair_layout="padded", **DPO_KINDS[kind][0])
    theirs = trl_dpo(tokenizer, dtype, tmp_path / "trl", kind)
    if dtype == torch.float64:
        plain_head(theirs.model)
        plain_head(theirs.ref_model)
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, trl_batch(theirs, ROWS))
    ours = our_loss(trainer, policy)
    assert ours.item() == pytest.approx(loss.item(), rel=tolerance)
    assert_gradients_agree(gradients(policy, ours), gradients(theirs.model, loss), tolerance)


def assert_gradients_agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        distance = (ours[name] - gradient).norm() / gradient.norm()
        assert distance < 10 * tolerance, name


def test_smoothed_dpo_is_the_mixture_of_trls_losses_on_both_labels(build_of, tokenizer, tmp_path):
    trainer, policy = our_dpo(build_of, torch.float32, label_smoothing=0.1)
    theirs = trl_dpo(tokenizer, torch.float32, tmp_path / "trl", "sigmoid")
    swapped = [{key: row[other(key)] for key in row} for row in ROWS]
    right, wrong = (theirs.compute_loss(theirs.model, trl_batch(theirs, rows)).item() for rows in (ROWS, swapped))
    assert our_loss(trainer, policy).item() == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-5)


def other(key: str) -> str:
    """The same column of the other response."""
    first, second = SIDES
    return key.replace(first, second) if key.startswith(first) else key.replace(second, first)


def keep_precision(trainer: TRLORPOTrainer) -> None:
    """No cast of log-probabilities to float32; in the loss only, because models compute in float32 what they mean to."""
    loss = trainer.odds_ratio_loss

    def in_float64(*logps: Tensor) -> tuple[Tensor, ...]:
        with mock.patch.object(Tensor, "float", Tensor.double):
            return loss(*logps)

    trainer.odds_ratio_loss = in_float64


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_orpo_is_trls(build_of, tokenizer, tmp_path, dtype, tolerance):
    """float64 without TRL's cast of log-probabilities to float32."""
    args = TRLORPOConfig(output_dir=str(tmp_path / "trl"), beta=0.4, **PLAIN)
    unused = Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}])
    with mock.patch.dict("os.environ", TRL_EXPERIMENTAL_SILENCE="1"):
        theirs = TRLORPOTrainer(tiny_model(dtype=dtype), args, train_dataset=unused, processing_class=tokenizer)
    columns = [
        {
            f"{side}_{name}": values
            for side in SIDES
            for name, values in {
                "input_ids": row[f"{side}_input_ids"],
                "attention_mask": [1] * len(row[f"{side}_input_ids"]),
                "labels": [-100] * row[f"{side}_prompt_length"] + row[f"{side}_input_ids"][row[f"{side}_prompt_length"] :],
            }.items()
        }
        for row in ROWS
    ]
    if dtype == torch.float64:
        keep_precision(theirs)
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(columns))
    trainer = build_of("orpo", tiny_model(dtype=dtype), beta=0.4, pair_layout="padded", preprocessing="exact")
    ours = our_loss(trainer, trainer.model)
    assert ours.item() == pytest.approx(loss.item(), rel=tolerance)
    assert_gradients_agree(gradients(trainer.model, ours), gradients(theirs.model, loss), tolerance)
