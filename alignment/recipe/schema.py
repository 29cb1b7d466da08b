"""A JSON schema of what H4ArgumentParser reads, for editors: completion, help and red lines while a recipe is written.

It is never stricter than the parser, which also knows ranges and what does not go together; what it refuses, the parser does.
"""

from collections.abc import Sequence
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from .parser import DROPPED, RENAMED, SWITCHES, H4ArgumentParser, Target, default_of


def words(*choices: str) -> JsonSchemaValue:
    """Text that is one of them, in any case: JSON schema's patterns have no flag for that."""
    spelt = ("".join(f"[{letter}{letter.upper()}]" if letter.isalpha() else letter for letter in word) for word in choices)
    return {"type": "string", "pattern": rf"^\s*({'|'.join(spelt)})\s*$"}


INF = "[iI][nN][fF]([iI][nN][iI][tT][yY])?"
NUMBER = {"type": "string", "pattern": rf"^\s*[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*|{INF})([eE][-+]?[0-9_]+)?\s*$"}
SHARED: dict[str, JsonSchemaValue] = {
    "number": {"anyOf": [{"type": "number"}, NUMBER]},
    "whole_number": {"anyOf": [{"type": "integer"}, NUMBER]},
    "yes_or_no": {
        "anyOf": [
            {"type": "boolean"},
            words("true", "yes", "on", "y", "t", "1", "false", "no", "off", "n", "f", "0"),
            {"enum": [0, 1]},
        ]
    },
    "null": {"anyOf": [{"type": "null"}, words("null", "none")]},
}


def recipe_schema(parser: H4ArgumentParser, title: str, head: str) -> JsonSchemaValue:
    """Of the recipes that `parser` reads. title: of the schema; head: what it says of itself."""
    fields = {name: (kind_of(target), described(target)) for name, target in parser.targets.items()}
    for kind in parser.dataclass_types:  # another library's spellings
        for name, (of, meaning) in getattr(kind, "rewritten_keys", {}).items():
            known = fields[name][1].description if name in fields else ""
            fields[name] = (of, Field(default=None, description=f"{known} {meaning}".strip()))
    for old, present in parser.old_spellings.items():
        fields[old] = old_spelling(old, present, parser)
    return schema_of(create_model(title, __config__=CONFIG, **fields), head)


def schema_of(model: type[BaseModel], head: str) -> JsonSchemaValue:
    """The schema of a model, as lenient as the parser."""
    schema = with_shared(TypeAdapter(model).json_schema(schema_generator=AsTheParserReads))
    schema["$defs"] = {**schema.get("$defs", {}), **SHARED}
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "description": head}


def with_shared(schema: Any) -> Any:
    """With every scalar's schema as a reference to the one in SHARED."""
    for name, shared in SHARED.items():
        if schema == shared:
            return {"$ref": f"#/$defs/{name}"}
    if isinstance(schema, dict):
        return {key: with_shared(entry) for key, entry in schema.items()}
    return [with_shared(entry) for entry in schema] if isinstance(schema, list) else schema


# A key that is unknown is an error; so is no key's name to pydantic, which reserves some.
CONFIG = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)


def kind_of(target: Target) -> Any:
    """As Target.read takes it."""
    kind, metadata = target.kind, target.field.metadata
    if "choices" in metadata:
        names = Literal[tuple(metadata["choices"])]
        return names | None if NoneType in get_args(kind) else names
    if "const" in metadata:
        kind = bool | kind
    return kind | bool | None if target.field.default == "none" else kind


def described(target: Target) -> Any:
    """Default and help of a key."""
    default = default_of(target.field)
    return Field(default=default.value if isinstance(default, Enum) else default, description=help_of(target))


def help_of(target: Target) -> str:
    """In one line; argparse doubles its percent signs."""
    return " ".join(target.field.metadata.get("help", "").split()).replace("%%", "%")


def old_spelling(old: str, present: str, parser: H4ArgumentParser) -> tuple[Any, Any]:
    """Type and description of a key that is called otherwise now, or that does nothing any more."""
    if old in DROPPED:
        return Any, Field(default=None, description=f"Ignored: {DROPPED[old]}.", deprecated=True)
    if old in SWITCHES:
        return bool, Field(default=None, description=f"Old spelling of {present}.", deprecated=True)
    target = parser.targets[RENAMED[old]]
    words = f"Old spelling of {present}, as in published recipes. {help_of(target)}"
    return kind_of(target), Field(default=None, description=words)


class AsTheParserReads(GenerateJsonSchema):
    """Values in the spellings that `values.read_as` takes: numbers and lists as text, `null` as a word."""

    def int_schema(self, schema: Any) -> JsonSchemaValue:
        return SHARED["whole_number"]

    def float_schema(self, schema: Any) -> JsonSchemaValue:
        return SHARED["number"]

    def bool_schema(self, schema: Any) -> JsonSchemaValue:
        return SHARED["yes_or_no"]

    def literal_schema(self, schema: Any) -> JsonSchemaValue:
        return {"enum": with_no(schema["expected"])}

    def enum_schema(self, schema: Any) -> JsonSchemaValue:
        return {"enum": with_no([member.value for member in schema["members"]])}

    def list_schema(self, schema: Any) -> JsonSchemaValue:
        return {"anyOf": [super().list_schema(schema), {"type": "string"}]}

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        return {"anyOf": [super().dict_schema(schema), {"type": "string", "pattern": r"^\{"}]}

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        return {"anyOf": [*alternatives(self.generate_inner(schema["schema"])), SHARED["null"]]}

    def union_schema(self, schema: Any) -> JsonSchemaValue:
        choices = [choice[0] if isinstance(choice, tuple) else choice for choice in schema["choices"]]
        if any(choice["type"] == "enum" for choice in choices):
            # `SchedulerType | str` means a name of the enum.
            choices = [choice for choice in choices if choice["type"] != "str"]
        return {"anyOf": [kind for choice in choices for kind in alternatives(self.generate_inner(choice))]}

    def dataclass_schema(self, schema: Any) -> JsonSchemaValue:
        return SHARED["null"]  # an object that no recipe can spell

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # it would repeat the key

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return SHARED["null"]

    def encode_default(self, dft: Any) -> Any:
        return [*dft] if isinstance(dft, tuple) else super().encode_default(dft)


def with_no(choices: Sequence[Any]) -> list[Any]:
    """YAML reads a bare no as false."""
    return [*choices, False] if "no" in choices else [*choices]


def alternatives(schema: JsonSchemaValue) -> list[JsonSchemaValue]:
    """Of a union, its members, so that unions do not nest; what is SHARED stays whole."""
    return schema["anyOf"] if [*schema] == ["anyOf"] and schema not in SHARED.values() else [schema]
