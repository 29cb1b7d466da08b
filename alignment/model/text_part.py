"""The language model inside a model that also sees or hears: pairs of text train that alone."""

import re

from torch import nn
from transformers import PreTrainedModel


def other_parts(model: PreTrainedModel) -> list[str]:
    """Names of the topmost modules that text does not pass: towers for images and sound, and what projects them."""
    if model.config.get_text_config() is model.config:
        return []
    used = [part for part in (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()) if part]
    inside = {id(module) for part in used for module in part.modules()}

    def unused(module: nn.Module, prefix: str) -> list[str]:
        names = []
        for name, child in module.named_children():
            if id(child) in inside:
                continue
            holds_used = any(id(module) in inside for module in child.modules())
            names += unused(child, f"{prefix}{name}.") if holds_used else [prefix + name]
        return names

    return unused(model, "")


def freeze_other_parts(model: PreTrainedModel) -> list[str]:
    """They would get no gradient, for which processes wait that share theirs. Returns their names."""
    names = other_parts(model)
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return names


def outside_text(model: PreTrainedModel) -> str | None:
    """A pattern, for peft, of the modules that no adapter belongs on; None where all are the language model's."""
    names = other_parts(model)
    return rf"(.*\.)?({'|'.join(map(re.escape, names))})(\..*)?" if names else None
