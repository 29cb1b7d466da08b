"""config.json and generation_config.json of what was trained: as they came, where the run had no reason to change them,
and in words that transformers 4 and 5 both read.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from .tokenizer_files import write_json

logger = logging.getLogger(__name__)

# Where transformers 5 has rope_parameters for the layers that see a window, version 4 has a number of its own.
LOCAL_THETAS = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}
GLOBAL_AND_LOCAL = {"modernbert-decoder": ("global_rope_theta", "local_rope_theta")}
NEOX = ("gpt_neox", "gpt_neox_japanese")


def whole_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that has a config: below an adapter, its base."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def config_as_came(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """The config.json that a model was loaded with; empty for one that was made in memory."""
    config = whole_model(model).config
    name = getattr(config, "_name_or_path", None)
    if not name:
        return {}
    revision = getattr(config, "_commit_hash", None)
    path = cached_file(name, CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


@contextmanager
def weights_alone(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Inside, save_pretrained writes weights and nothing that it might refuse to write."""
    parts = [part for part in (whole_model(model).config, whole_model(model).generation_config) if part is not None]
    for part in parts:
        vars(part)["save_pretrained"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for part in parts:
            del vars(part)["save_pretrained"]


def write_configs(model: PreTrainedModel | PeftModel, folder: Path, came: dict[str, Any], *, dtype: str | None = None) -> None:
    """config.json, but of a whole model only, and generation_config.json.

    came: see `config_as_came`. dtype: of the weights that were saved, where they are not in the model's own.
    """
    base = whole_model(model)
    if not isinstance(model, PeftModel):
        if base.config._auto_class is not None:
            custom_object_save(base.config, folder, config=base.config)
        written = json.loads(base.config.to_json_string(use_diff=True))
        write_json(folder / CONFIG_NAME, saved_config(written, came, base.config, dtype=dtype))
    if base.can_generate():
        base.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])


def saved_config(
    written: dict[str, Any], came: dict[str, Any], config: PreTrainedConfig, *, dtype: str | None
) -> dict[str, Any]:
    """What transformers 5 writes of a config, with the values of `came` where the run changed them for itself alone.

    These are dropouts, the cache, a pad token that is eos, whose embedding the next reader would not train; and what is left
    out because it is the default of this version, which need not be another's.
    """
    result = dict(written)
    for key in set(written) | set(came):
        if borrowed(key, written.get(key), config):
            result.pop(key, None)
            if key in came:
                result[key] = came[key]
        elif key not in written and not key.startswith("rope_"):
            # By its present name: the old one is read with a warning.
            value = getattr(config, "dtype" if key == "torch_dtype" else key, None)
            result |= {key: came[key]} if unchanged(came[key], value) else {}
    own = dtype or written.get("dtype")
    if own is not None:
        result["dtype"] = result["torch_dtype"] = own
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig) and isinstance(result.get(name), dict):
            part_dtype = dtype if written[name].get("dtype") is not None else None
            result[name] = saved_config(written[name], came.get(name) or {}, part, dtype=part_dtype)
    return {**result, **rotary_keys(result.get("rope_parameters"), came, config)}


def borrowed(key: str, value: Any, config: PreTrainedConfig) -> bool:
    """Whether a run sets a key for its own time."""
    ends = getattr(config, "eos_token_id", None)
    return (
        key == "use_cache"
        or ("dropout" in key or key.endswith(("pdrop", "layerdrop")))
        or (key == "pad_token_id" and value is not None and value in (ends if isinstance(ends, list) else [ends]))
    )


def unchanged(came: Any, now: Any) -> bool:
    return not isinstance(came, dict) and came == now


def rotary_keys(parameters: dict[str, Any] | None, came: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """rope_parameters in the words of transformers 4, which reads none and takes 10,000 for every base it does not find."""
    if not parameters:
        return {}
    layers = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    whole = layers.get("full_attention") or next(iter(layers.values()), parameters) if layers else parameters
    local = layers.get("sliding_attention")
    theta, kind = whole.get("rope_theta"), whole.get("rope_type", "default")
    keys: dict[str, Any] = {"rope_theta": theta}
    if config.model_type in NEOX:
        keys["rotary_emb_base"] = theta
    share = whole.get("partial_rotary_factor")
    if share is not None:
        keys["partial_rotary_factor"] = share
        if config.model_type in NEOX:
            keys["rotary_pct"] = share
    if local is not None and config.model_type in LOCAL_THETAS:
        keys[LOCAL_THETAS[config.model_type]] = local.get("rope_theta")
    if local is not None and config.model_type in GLOBAL_AND_LOCAL:
        keys |= dict(zip(GLOBAL_AND_LOCAL[config.model_type], (theta, local.get("rope_theta")), strict=True))
    if came.get("rope_scaling"):
        keys["rope_scaling"] = came["rope_scaling"]
    elif kind != "default":
        keys["rope_scaling"] = scaling(whole, kind, config)
    return {key: value for key, value in keys.items() if value is not None}


def scaling(parameters: dict[str, Any], kind: str, config: PreTrainedConfig) -> dict[str, Any]:
    """rope_scaling as version 4 wants it: without what stands beside it."""
    rest = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if config.model_type in ("phi3", "phimoe"):  # exactly three keys, or four
        rest = {key: value for key, value in rest.items() if key.endswith(("_factor", "_mscale"))}
        return {"type": kind, **rest}
    return rest
