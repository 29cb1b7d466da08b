"""Token ids against the rows of the embedding, before anything is trained."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError


def embedding_rows(model: PreTrainedModel | PeftModel) -> int:
    """How many tokens the model has a vector for; known also where ZeRO-3 has divided it."""
    return min(rows(part) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None)


def rows(part: nn.Module) -> int:
    """Of an embedding or a head, below what PEFT puts around it."""
    if isinstance(part, ModulesToSaveWrapper):
        part = part.original_module
    if isinstance(part, BaseTunerLayer):
        part = part.get_base_layer()
    weight = part.weight
    quantised = getattr(weight, "quant_state", None)  # 4-bit weights are packed into one column
    return (quantised or weight).shape[0] if quantised or not hasattr(weight, "ds_shape") else weight.ds_shape[0]


def highest_id(data: Dataset, columns: Iterable[str]) -> int:
    """The largest token id in columns of lists; -1 where there is none."""
    highest = -1
    for batch in data.with_format("arrow").select_columns(list(columns)).iter(1000):
        for column in batch.itercolumns():
            found = pc.max(pc.list_flatten(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)).as_py()
            highest = max(highest, -1 if found is None else found)
    return highest


def refuse_unknown_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, highest: int) -> None:
    """Raises UserError for a token of the data, an end or a padding that the model has no vector for."""
    size = embedding_rows(model)
    asked = {"the data": highest, "eos_token": tokenizer.eos_token_id, "pad_token": tokenizer.pad_token_id}
    beyond = {who: number for who, number in asked.items() if number is not None and number >= size}
    if beyond:
        places = ", ".join(f"{tokenizer.convert_ids_to_tokens(n)!r} (id {n}, of {who})" for who, n in beyond.items())
        raise UserError(
            f"the model has {size} rows of embeddings, and none for {places}. Give it rows (model.resize_token_embeddings("
            f"{len(tokenizer)}), then save_pretrained) and train them: whole, or under LoRA with lora_modules_to_save: "
            "[embed_tokens, lm_head]; or name the tokenizer that belongs to it with tokenizer_name_or_path"
        )


def train_every_row(model: PreTrainedModel | PeftModel) -> None:
    """Let the embedding of the padding token learn: where that is eos, it is read in conversations and has to."""
    for module in model.get_input_embeddings().modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
