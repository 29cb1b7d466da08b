"""A recipe (YAML) and a command line become dataclasses, or one error that lists everything wrong with them."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import ConfigError, Problem, UserError, not_utf8, shown
from .values import (
    Doubtful,
    Mismatch,
    expanded,
    expanded_input,
    expanded_template,
    read_as,
    read_bool,
    read_choice,
    read_float,
)

# What published recipes say, and what it is called now. An entry counts where the new name is a field.
RENAMED = {
    "dtype": "torch_dtype",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "warmup_ratio": "warmup_steps",
}
SWITCHES = {
    "group_by_length": ("train_sampling_strategy", {True: "group_by_length", False: "random"}),
    "use_flash_attention_2": ("attn_implementation", {True: "flash_attention_2", False: None}),
}
DROPPED = {
    "logging_dir": "TensorBoard reads the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "what output_dir holds decides whether the run resumes",
    "save_safetensors": "weights are always safetensors",
}
# What trackers read from the environment, and no recipe: the beginnings of such names.
ENVIRONMENT = ("wandb_", "mlflow_", "tensorboard_", "comet_", "neptune_", "clearml_", "swanlab_", "hf_", "nccl_", "cuda_")
# Fields that name files and folders: `~/runs` and `$SCRATCH/runs` mean there what they mean to a shell.
PATHS: dict[str, Callable[[str], str]] = {
    "output_dir": expanded,
    "chat_template": expanded_template,
    **dict.fromkeys(
        ("model_name_or_path", "tokenizer_name_or_path", "resume_from_checkpoint", "deepspeed", "fsdp_config",
         "accelerator_config", "chat_template_path", "dataset_mixer", "sample_prompts", "speed_of"),
        expanded_input,
    ),
}  # fmt: skip
MOST_COMPLAINTS = 40  # in one message; who has more has given another kind of file
# Texts that end in _token and open no door.
SPECIAL_TOKENS = ("bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token", "unk_token")


class RecipeError(UserError):
    """Everything wrong with a recipe and its command line, one line each."""

    def __init__(self, complaints: Iterable[str]):
        self.complaints = list(complaints)
        more = len(self.complaints) - MOST_COMPLAINTS
        rest = [f"... and {more} more of the kind"] if more > 0 else []
        super().__init__("\n".join([*self.complaints[:MOST_COMPLAINTS], *rest]))


class Given(NamedTuple):
    """A key and its value as the user wrote them."""

    place: str  # the recipe file and its line, or the option as typed
    key: str
    value: Any

    @property
    def is_option(self) -> bool:
        return self.place.startswith("--")

    def __str__(self) -> str:
        if self.is_option:
            return self.place
        value = "..." if is_secret(self.key) else shown(self.value)
        return f"{self.place}: {self.key} = {value}"


# Problems of all fields of all dataclasses together, as they were given or at their defaults.
Check = Callable[[SimpleNamespace], list[Problem]]


class Setting(NamedTuple):
    """A value of the type that its field declares, where it came from, and what to tell about an old spelling."""

    value: Any
    given: Given
    notice: str | None


# ---- The recipe ----


class Loader(yaml.SafeLoader):
    """YAML in which 5e-7 is a number, 2024-01-01 is text and a key given twice is an error."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        node = super().compose_node(parent, index)
        if node.end_mark is None:  # an alias of something that has not ended yet
            raise yaml.MarkedYAMLError(problem="an alias stands in what it names", problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


# 010 and 1:30, which YAML 1.1 counts in eights and in sixties.
DOUBTFUL = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)$")


class Dumper(yaml.SafeDumper):
    """YAML that Loader and PyYAML's own loaders read back equal."""


Loader.yaml_implicit_resolvers = {
    start: [("!doubtful", DOUBTFUL), *((tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp"))]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_constructor("!doubtful", lambda loader, node: Doubtful(node.value))
Loader.add_constructor(  # !!int 010 too
    "tag:yaml.org,2002:int",
    lambda loader, node: Doubtful(node.value) if DOUBTFUL.match(node.value) else loader.construct_yaml_int(node),
)
SCIENTIFIC = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)[eE][-+]?[0-9]+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+.0123456789"))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+.0123456789"))


def read_recipe(path: str) -> list[Given]:
    """The keys of a flat YAML mapping. Raises RecipeError where there is none."""
    try:
        document = only_document(Path(path).read_text(encoding="utf-8"))
        loader = Loader("")
        content = None if document is None else loader.construct_document(document)
    except FileNotFoundError:
        siblings = [sibling.name for sibling in Path(path).parent.glob("*.y*ml")]
        raise RecipeError([f"{path}: no such file{suggestion(closest(Path(path).name, siblings))}"]) from None
    except OSError as error:
        raise RecipeError([f"{path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError([f"{path}, line {line}: {not_utf8(error)}"]) from error
    except yaml.MarkedYAMLError as error:
        raise RecipeError([f"{path}, {complaint_about_yaml(error)}"]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError([f"{path}: {one_line(error)}"]) from error
    except RecursionError as error:
        raise RecipeError([f"{path}: is nested too deeply"]) from error
    if content is None:
        raise RecipeError([f"{path}: is empty; expected lines of `key: value`"])
    if not isinstance(content, dict):
        raise RecipeError([f"{path}, line 1: holds a {type(content).__name__}; expected lines of `key: value`"])
    lines = {loader.construct_object(key, deep=True): key.start_mark.line + 1 for key, _ in document.value}
    return [Given(f"{path}, line {lines[key]}", str(key), value) for key, value in content.items()]


# What is behind some of YAML's complaints, by a part of them.
USUAL_CAUSES = {
    "unhashable key": "; text that begins with { or [, such as Jinja, needs quotes, or a | and lines of its own",
    "'\\t'": "; YAML takes spaces where a tab is",
    "could not find expected ':'": "; a key and its value stand as `key: value`, with a space",
    "cannot start any token": "; text that begins so needs quotes",
    "mapping values are not allowed": "; text with a colon and a space needs quotes, and all keys begin in the first column",
}


def complaint_about_yaml(error: yaml.MarkedYAMLError) -> str:
    """With the line where the thing began that YAML found no end of."""
    began = error.context is not None and error.context.startswith(
        ("while scanning a simple key", "while scanning a quoted scalar", "while parsing a flow")
    )
    mark = error.context_mark if began and error.context_mark else error.problem_mark
    hint = next((hint for part, hint in USUAL_CAUSES.items() if part in error.problem), "")
    return f"line {mark.line + 1}: {error.problem}{hint}"


def only_document(text: str) -> yaml.Node | None:
    """Empty ones aside, such as what stands behind a last `---`."""
    documents = [node for node in yaml.compose_all(text, Loader) if node.tag != "tag:yaml.org,2002:null"]
    if len(documents) > 1:
        raise yaml.MarkedYAMLError(problem="a second document begins", problem_mark=documents[1].start_mark)
    return documents[0] if documents else None


def closest(word: str, candidates: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, candidates, n=1, cutoff=0.7)), None)


def suggestion(word: str | None) -> str:
    return "" if word is None else f" (did you mean {word!r}?)"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- The command line ----


def split_command_line(words: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The recipe's path, if there is one, and the options."""
    if not words or words[0].startswith("--"):
        return None, words
    if not words[0].endswith((".yaml", ".yml")):
        raise RecipeError([f"{words[0]}: expected a recipe, a file that ends in .yaml or .yml, or --key=value"])
    return words[0], words[1:]


def read_options(words: Sequence[str], known: Collection[str]) -> list[Given]:
    """`--key=value`, `--key value`, `--key value value`, `--flag` and `--no_flag`, with hyphens or underscores."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)
    return [read_option(group, known) for group in groups]


def read_option(words: list[str], known: Collection[str]) -> Given:
    name, equals, first = words[0].partition("=")
    values = [first, *words[1:]] if equals else words[1:]
    key = name[2:].replace("-", "_")
    if not values:
        flag = key.removeprefix("no_")
        return Given(name, flag, False) if key not in known and flag in known else Given(name, key, True)
    value = values[0] if len(values) == 1 else values
    place = f"{name}=..." if is_secret(key) else " ".join(words).replace("\n", "\\n")
    return Given(place, key, value)


# ---- Values, as the fields declare them ----


class Target(NamedTuple):
    """A field of a dataclass, and the type that it declares."""

    field: dataclasses.Field
    kind: Any

    def read(self, value: Any) -> Any:
        metadata = self.field.metadata
        if value is False and self.field.default == "none":
            return "none"  # `report_to: no`
        # What transformers lets stand as a bare flag takes booleans, whatever its annotation says: `fsdp: true`.
        result = read_as(bool | self.kind if "const" in metadata else self.kind, value)
        if result is None and self.field.default == "none":
            return "none"  # `report_to`, which takes null for the name of a tracker
        # Keys of dataset_mixer are paths; those of settings that may also be a file's path are not.
        is_settings = isinstance(result, dict) and self.field.name != "dataset_mixer"
        if (expand := PATHS.get(self.field.name)) is not None and not is_settings:
            result = with_expanded(expand, result)
        return result if result is None or "choices" not in metadata else read_choice(metadata["choices"], result)


def with_expanded(expand: Callable[[str], str], value: Any) -> Any:
    """A path, or the paths that are the keys of a mapping."""
    if isinstance(value, dict):
        if len(entries := {expand(key): entry for key, entry in value.items()}) < len(value):
            raise Mismatch("every path once")
        return entries
    return expand(value) if isinstance(value, str) else value


# ---- Old spellings ----


def translate(key: str, value: Any) -> tuple[str | None, Any, str]:
    """The present key and value of an old spelling, and how it is read; no key where nothing is left to set."""
    if key in DROPPED:
        if key == "save_safetensors" and not read_bool(value):
            raise Mismatch(f"true: {DROPPED[key]}")
        return None, None, f"{key} is ignored: {DROPPED[key]}"
    if key in SWITCHES:
        present, values = SWITCHES[key]
        value = values[read_bool(value)]
        return present, value, f"{key} is read as {present} = {value!r}"
    if key == "warmup_ratio":
        value = read_float(value)
        if not 0 <= value < 1:
            raise Mismatch("a ratio, at least 0 and below 1")
    return RENAMED[key], value, f"{key} is read as {RENAMED[key]}"


def settle(first: Setting, second: Setting) -> Setting:
    """Which of two settings of one field, given in one place, counts. Raises Mismatch where they contradict."""
    if first.given.key == second.given.key:
        return second
    if first.value == second.value:
        return second._replace(notice=first.notice or second.notice)
    ratio, steps = sorted((first, second), key=lambda setting: setting.given.key != "warmup_ratio")
    if ratio.given.key != "warmup_ratio":
        raise Mismatch(f"the same as {first.given.key} = {first.value!r}, its other spelling; keep one of them")
    if not steps.value:
        return ratio
    return steps._replace(notice=f"{ratio.given.place}: warmup_ratio is ignored, because warmup_steps is given too")


# ---- All together ----


class H4ArgumentParser(HfArgumentParser):
    """Fills dataclasses from `[RECIPE.yaml] [--key=value ...]`; the command line beats the recipe.

    After parse(), `recipe` maps every given key, under its present name, to its value of the declared type, `settings` to
    that with where it was given; `notices` has a line for every old spelling that was understood and for every value that a
    config remarks on, `lacks` one for all that only this machine is in the way of, where a dry run is asked for.
    """

    recipe: dict[str, Any]
    notices: list[str]
    lacks: list[str]

    def __init__(self, dataclass_types: Iterable[type]):
        # Two dataclasses may share a field: trust_remote_code of ModelArguments and of TRL's configs.
        super().__init__(dataclass_types, usage="%(prog)s [RECIPE.yaml] [--key=value ...]", conflict_handler="resolve")
        self.targets = {
            field.name: Target(field, get_type_hints(kind)[field.name])
            for kind in self.dataclass_types
            for field in init_fields(kind)
        }
        self.old_spellings = old_spellings(self.targets)

    def parse(self, argv: Sequence[str] | None = None, checks: Sequence[Check] = ()) -> tuple[Any, ...]:
        """One object of each dataclass. Raises RecipeError, which lists everything that is wrong.

        checks: what a dataclass cannot know, such as whether a package is installed; their problems are listed with the rest.
        """
        words = sys.argv[1:] if argv is None else argv
        if "-h" in words or "--help" in words:
            self.print_help()
            self.exit()
        path, options = split_command_line(words)
        self.place = path or "the command line"
        self.notices, self.lacks = [], []
        self.complaints: list[str] = []
        # Keys whose value cannot be used: what is said about the defaults in their place would mislead.
        self.doubtful: set[str] = set()
        settings = self.accept(read_recipe(path) if path else [])
        settings |= self.accept(read_options(options, {*self.targets, *self.old_spellings}))
        objects = tuple(self.build(kind, settings) for kind in self.dataclass_types)
        self.settings, values = settings, self.values(settings)
        problems = [problem for check in checks for problem in check(values)]
        if getattr(values, "dry_run", False):
            self.lacks = [str(problem) for problem in problems if problem.is_local]
            problems = [problem for problem in problems if not problem.is_local]
        self.complain(problems, settings)
        if self.complaints:
            raise RecipeError(self.complaints)
        self.recipe = {key: setting.value for key, setting in settings.items()}
        return objects

    def refuse(self, problems: Iterable[Problem]) -> None:
        """Raises RecipeError for what turned out to be wrong after parse()."""
        if lines := self.placed(problems):
            raise RecipeError(lines)

    def placed(self, problems: Iterable[Problem]) -> list[str]:
        """A line for each, after parse()."""
        return [blame(problem, self.settings, self.place) for problem in problems]

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Inside, after parse(), a UserError that begins with a key or a source of dataset_mixer is told with its place."""
        try:
            yield
        except RecipeError:
            raise
        except UserError as error:
            begin = re.match(r"\w+(?= = |\.|:)", message := str(error))
            key = begin[0] if begin else None
            sources = self.settings["dataset_mixer"].value if "dataset_mixer" in self.settings else {}
            if any(message.startswith(f"{source}: ") for source in sources or {}):
                key = "dataset_mixer"
            if key not in self.settings:
                raise
            raise UserError(f"{self.settings[key].given.place}: {message}") from error

    def accept(self, source: Iterable[Given]) -> dict[str, Setting]:
        """The usable settings of one place, by present key; complaints about the others."""
        settings: dict[str, Setting] = {}
        for given in self.rewritten(list(source)):
            try:
                self.add(given, settings)
            except Mismatch as mismatch:
                self.complaints.append(f"{given}: expected {mismatch}")
                self.doubtful.add(self.present_key(given.key))
        self.notices += [setting.notice for setting in settings.values() if setting.notice]
        return settings

    def rewritten(self, source: list[Given]) -> list[Given]:
        """What is given in one place, in this suite's keys where a config knows another library's (`rewrite`)."""
        for kind in self.dataclass_types:
            if not source or not hasattr(kind, "rewrite"):
                continue
            place = "command line" if source[0].is_option else source[0].place
            before = {given.key: given for given in source}
            try:
                values, notices = kind.rewrite({key: given.value for key, given in before.items()})
            except Mismatch as mismatch:
                self.complaints.append(f"{place}: expected {mismatch}")
                continue
            self.notices += [f"{place}: {notice}" for notice in notices]
            source = [
                before[key] if key in before and before[key].value is value else Given(place, key, value)
                for key, value in values.items()
            ]
        return source

    def add(self, given: Given, settings: dict[str, Setting]) -> None:
        key, value, notice = given.key, given.value, None
        if key in self.old_spellings:
            key, value, reading = translate(key, value)
            notice = f"{given.place}: {reading}"
        if key is None:
            self.notices.append(notice)
        elif key not in self.targets:
            self.complaints.append(self.unknown_key(given, suggest=len(self.complaints) < MOST_COMPLAINTS))
        else:
            setting = Setting(self.targets[key].read(value), given, notice)
            settings[key] = settle(settings[key], setting) if key in settings else setting

    def present_key(self, key: str) -> str:
        return self.old_spellings.get(key, key)

    def unknown_key(self, given: Given, *, suggest: bool = True) -> str:
        for kind in self.dataclass_types:
            if reason := getattr(kind, "refused_keys", {}).get(given.key):
                return f"{given.place}: {given.key!r} is not read: {reason}"
        meant = closest(given.key, [*self.targets, *self.old_spellings]) if suggest else None
        if given.key.lower().startswith(ENVIRONMENT):
            return f"{given.place}: unknown key {given.key!r}; it is read from the environment: export {given.key.upper()}=..."
        if meant is not None:
            self.doubtful.add(self.present_key(meant))
        flat = "; a recipe is flat, without sections" if isinstance(given.value, dict) and meant is None else ""
        return f"{given.place}: unknown key {given.key!r}{suggestion(meant)}{flat}"

    def values(self, settings: Mapping[str, Setting]) -> SimpleNamespace:
        """Every field of every dataclass: as given, or the default where nothing usable is."""
        given = {key: deepcopy(setting.value) for key, setting in settings.items() if key not in self.doubtful}
        return SimpleNamespace(**{key: default_of(target.field) for key, target in self.targets.items()} | given)

    def build(self, kind: type, settings: Mapping[str, Setting]) -> Any:
        """The dataclass `kind`, or None and complaints about what it refuses."""
        own = {field.name for field in init_fields(kind)}
        # Copies, because TrainingArguments rewrites some of the mappings that it is given.
        values = {key: deepcopy(setting.value) for key, setting in settings.items() if key in own}
        try:
            built = kind(**values)
            remarks = built.remarks() if hasattr(built, "remarks") else []
            self.notices += [blame(remark, settings, self.place) for remark in remarks]
            return built
        except ConfigError as error:
            self.complain(error.problems, settings)
        except (ValueError, TypeError, OSError, ImportError) as error:
            if not words_of(str(error)) & self.doubtful:
                self.complaints.append(objection(kind, error, settings, self.place))
        return None

    def complain(self, problems: Iterable[Problem], settings: Mapping[str, Setting]) -> None:
        """One line for each, but for those that speak of a key whose value is wrong already."""
        telling = [problem for problem in problems if not words_of(problem.key, problem.advice) & self.doubtful]
        self.complaints += [blame(problem, settings, self.place) for problem in telling]
        self.doubtful |= {problem.key for problem in telling}


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def init_fields(kind: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.init]


def old_spellings(targets: Collection[str]) -> dict[str, str]:
    """Old key -> the field that it sets here, or itself if it sets none any more."""
    successors = RENAMED | {key: present for key, (present, _) in SWITCHES.items()}
    if "packing" not in targets:
        # Only where a row is one sequence, in SFT, does the old limit mean max_length.
        del successors["max_seq_length"]
    return {key: present for key, present in successors.items() if present in targets} | {key: key for key in DROPPED}


def words_of(*texts: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(texts)))


def blame(problem: Problem, settings: Mapping[str, Setting], elsewhere: str) -> str:
    """A config's problem, behind the place of its value, or of what it hangs on; `elsewhere`, if neither was given."""
    key = problem.key.split(".")[0]  # dataset_mixer.SOURCE
    if key.isupper():
        return f"environment: {problem}"
    if key not in settings:
        # The default fits not with what was given: the line to look at is that of the other setting.
        others = (settings[word].given.place for word in re.findall(r"\w+", problem.advice) if word in settings)
        place = next(others, elsewhere)
        return f"{place}: {key} {problem.advice}" if problem.value is None else f"{place}: {problem} ({key} is at its default)"
    given = settings[key].given
    if given.is_option and problem.key == key:
        return f"{given}: {problem.advice}"
    if RENAMED.get(given.key) == key and given.value == problem.value:
        problem = problem._replace(key=given.key)  # as it was written
    return f"{given.place}: {problem}"


def objection(kind: type, error: Exception, settings: Mapping[str, Setting], elsewhere: str) -> str:
    """An error of transformers', in one line, behind the settings that it speaks of."""
    if "bf16/gpu" in str(error):
        wanted = (key for key in ("bf16", "bf16_full_eval") if key in settings and settings[key].value)
        key = next(wanted, "bf16")
        advice = f"no GPU that computes in bf16; set {key}: false, or use_cpu: true to train on the CPU"
        return blame(Problem(key, True, advice), settings, elsewhere)
    words = words_of(str(error).replace("_", "").lower())  # `AcceleratorConfig` is about accelerator_config
    file = getattr(error, "filename", None)
    concerned = [
        str(setting.given)
        for key, setting in settings.items()
        if key.replace("_", "") in words or (file is not None and setting.value == file) or quoted(setting.value, str(error))
    ]
    return f"{', '.join(concerned) or elsewhere}: {one_line(error)}"


def quoted(value: Any, message: str) -> bool:
    """Whether a message shows a value: 4 is not what `base64` speaks of."""
    return re.search(rf"(?<!\w){re.escape(repr(value))}(?!\w)", message) is not None


# ---- What a run records ----


def dump_recipe(recipe: Mapping[str, Any]) -> str:
    """YAML that parses back to the same dataclasses; credentials are left out."""
    return yaml.dump(without_secrets(recipe), Dumper=Dumper, sort_keys=False, width=119)


def full_recipe(recipe: Mapping[str, Any], dataclass_types: Iterable[type]) -> str:
    """The given keys and, behind `# defaults`, every other field: YAML that parses back to the same dataclasses."""
    defaults = {
        field.name: default_of(field)
        for kind in dataclass_types
        for field in init_fields(kind)
        # transformers still reads a few old spellings, and prefers the new ones.
        if field.name not in recipe and field.name not in RENAMED
    }
    given = without_secrets(recipe)
    return f"{dump_recipe(given) if given else ''}# defaults\n{dump_recipe(defaults)}"


def without_secrets(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: without_secrets(value) if isinstance(value, dict) else value
        for key, value in recipe.items()
        if not (is_secret(str(key)) and isinstance(value, str))
    }


def is_secret(key: str) -> bool:
    return (key == "token" or key.lower().endswith(("_token", "_api_key"))) and key not in SPECIAL_TOKENS
