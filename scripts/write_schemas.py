"""Write the JSON schemas that recipes name in line two: `python scripts/write_schemas.py` (`--check`: compare only)."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model

from alignment.ablation.matrix import PLACES
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser
from alignment.recipe.schema import CONFIG, recipe_schema, schema_of
from on_policy_data_gen.recipe import KINDS
from scripts.dpo_config import DPOConfig
from scripts.orpo_config import ORPOConfig
from scripts.sft_config import SFTConfig
from scripts.simpo_config import SimPOConfig

FOLDER = Path(__file__).resolve().parents[1] / "training_configs/schemas"
METHODS = {"simpo": SimPOConfig, "dpo": DPOConfig, "orpo": ORPOConfig, "sft": SFTConfig}
COMMAND = "Generated from the dataclasses: make schemas."
Keys = dict[str, Any]
Values = dict[str, Keys]
MATRIX = {
    "base": (str, Field(description="The recipe that all cells start from, named from this file's folder.")),
    "settings": (Keys | None, Field(default=None, description="Keys of every cell, before the base's.")),
    "method": (Literal[tuple(METHODS)] | None, Field(default=None, description="What trains, where no axis says it.")),
    "axes": (
        dict[str, list[Any] | Values],
        Field(description="axis: {name: {key: value, ...}, ...}, or key: [value, ...]; the first value is the incumbent."),
    ),
    "one_at_a_time": (bool | None, Field(default=False, description="Search one axis after the other, not the grid.")),
    "fallback": (Values | None, Field(default=None, description="Stands in for a value of the axis that sets method.")),
    "launch": (
        str | Keys | None,
        Field(
            default=None, description=f"An accelerate config, or {{on: {' or '.join(PLACES)}, accelerate_config: FILE, ...}}."
        ),
    ),
    "output_dir": (str | None, Field(default=None, description="Folder of all cells; null: outputs/ablations/NAME.")),
}


def schemas() -> dict[str, dict[str, Any]]:
    """Name of the file, without .json -> its schema."""
    made = {
        name: recipe_schema(
            H4ArgumentParser((ModelArguments, DataArguments, config)), config.__name__,
            f"A recipe of scripts/run_{name}.py. {COMMAND}",
        )
        for name, config in METHODS.items()
    }  # fmt: skip
    made["on_policy"] = recipe_schema(H4ArgumentParser(KINDS), "OnPolicy", f"A recipe of scripts/run_on_policy.py. {COMMAND}")
    made["ablation"] = schema_of(
        create_model("Ablation", __config__=CONFIG, **MATRIX), f"A matrix of scripts/run_ablation.py. {COMMAND}"
    )
    return made


def main(*, check: bool) -> None:
    FOLDER.mkdir(exist_ok=True)
    old = []
    for name, schema in schemas().items():
        path, text = FOLDER / f"{name}.json", json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(path.name)
            if not check:
                path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(old) or 'none'}")
    sys.exit(2 if check and old else 0)


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
