"""A tokenizer is what its files say: read so, and left in every folder so that any reader gets the ids that were trained on.

transformers 5 builds some tokenizers anew from their vocabulary, with a pre-tokenizer and normalizer of its own, and drops
keys when it saves them. So what is loaded is compared with tokenizer.json, and the files are handed on as they came.
"""

import hashlib
import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import cached_file

from ..errors import UserError, reason_of

logger = logging.getLogger(__name__)

LFS_POINTER = b"version https://git-lfs"
SENTENCEPIECE_FILE = "tokenizer.model"
FILES = (FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, SENTENCEPIECE_FILE)
ANY_READER = "PreTrainedTokenizerFast"  # tokenizer.json as it is, in transformers 4 and 5
SETTINGS = ("pad_token", "eos_token", "bos_token", "unk_token", "chat_template", "truncation_side", "padding_side")
# Newlines, digits, spaces, marks, letters of several scripts: where pre-tokenizers and normalizers differ.
TELLING_TEXTS = (
    "Here are 12:\n\n1. one\r\n2. two\n", "What's 650841823 + 7?", "  two  spaces ", "I'm SURE. You'll see",
    "print('hi')\n    return x\t#\n\n\n", "Café Cafe\u0301 東京 🙂 ﬁ ①", "a_b-c/d...!?", "один два", "x\u00a0y\u3000z",
)  # fmt: skip
MARKS = 8  # special tokens that texts are put behind


# ---- Reading ----


def load_as_written(path: str, revision: str | None, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer that the files at `path` describe, and which of them there are.

    Raises UserError where transformers cannot read them as they are, OSError or ValueError where there are none.
    """
    found = {name: cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False) for name in FILES}
    files = {name: Path(file) for name, file in found.items() if file is not None}
    check_sentencepiece(path, files)
    written = written_tokenizer(files)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if differs := difference_from_file(tokenizer, written):
        exact = TokenizersBackend.from_pretrained(path, revision=revision)
        if still := difference_from_file(exact, written):
            raise UserError(
                f"{path}: transformers reads its tokenizer.json otherwise than it is written ({still}). Save the tokenizer "
                "anew in a folder of its own (AutoTokenizer.from_pretrained, then save_pretrained), train on what that file "
                "then says, and name it with tokenizer_name_or_path"
            )
        logger.info(
            "Tokenizer: tokenizer.json as it is, for %s would read it otherwise: %s.", type(tokenizer).__name__, differs
        )
        tokenizer = exact
    tokenizer.source = TokenizerSource(files, settings_of(tokenizer), state_of(tokenizer), trust_remote_code)
    return tokenizer


class TokenizerSource:
    """The files that a tokenizer was read from, and what it was like then."""

    def __init__(self, files: dict[str, Path], settings: dict[str, Any], state: str, trust_remote_code: bool):
        self.texts = {name: path.read_bytes() for name, path in files.items() if path.suffix == ".json"}
        self.others = {name: path for name, path in files.items() if name not in self.texts}
        self.settings, self.state, self.trust_remote_code = settings, state, trust_remote_code


def check_sentencepiece(path: str, files: dict[str, Path]) -> None:
    if FULL_TOKENIZER_FILE in files or SENTENCEPIECE_FILE not in files:
        return
    missing = [
        name for name, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")) if not has(module)
    ]
    if missing:
        raise UserError(
            f"{path}: its tokenizer is a {SENTENCEPIECE_FILE} without a {FULL_TOKENIZER_FILE}, which needs the package "
            f"{' and '.join(missing)} to be read; run `pip install {' '.join(missing)}`"
        )


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that is not there either
        return False


def written_tokenizer(files: dict[str, Path]) -> Tokenizer | None:
    """What tokenizer.json says by itself, whole texts and no padding; None without one. Raises ValueError for half a file."""
    if FULL_TOKENIZER_FILE not in files:
        return None
    try:
        written = Tokenizer.from_file(str(files[FULL_TOKENIZER_FILE]))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(unreadable_file(files[FULL_TOKENIZER_FILE], error)) from error
    written.no_truncation()
    written.no_padding()
    return written


def unreadable_file(file: Path, error: Exception) -> str:
    """What is wrong with a file that came in part, or not at all."""
    with file.open("rb") as beginning:
        is_pointer = beginning.read(len(LFS_POINTER)) == LFS_POINTER
    fault = "a pointer of Git LFS: run `git lfs pull` there" if is_pointer else f"damaged ({reason_of(error)}); copy it again"
    return f"{file.name} is {fault}"


def difference_from_file(tokenizer: PreTrainedTokenizerBase, written: Tokenizer | None) -> str | None:
    """The first text that the tokenizer and its own tokenizer.json read differently, with both readings; None: none."""
    is_custom = not type(tokenizer).__module__.startswith("transformers.")  # whose own code may add rules
    return None if written is None or not tokenizer.is_fast or is_custom else difference(tokenizer, written)


def difference(tokenizer: PreTrainedTokenizerBase, other: Tokenizer) -> str | None:
    for text in telling_texts(other):
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = other.encode(text, add_special_tokens=False)
        if ours != theirs.ids:
            return f"{text!r} is {theirs.tokens[:8]} there and {tokenizer.convert_ids_to_tokens(ours)[:8]} here"
    return None


def telling_texts(tokenizer: Tokenizer) -> list[str]:
    marks = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special][:MARKS]
    behind = [text for mark in marks for text in (f"{mark}Hello", f"{mark}[x] 1", f"{mark}\nHello", f"Hello {mark} you{mark}")]
    return [*TELLING_TEXTS, *behind]


def settings_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: getattr(tokenizer, name, None) for name in SETTINGS}


def state_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of vocabulary and rules, without truncation and padding, which every use may change."""
    if not tokenizer.is_fast:
        return str(len(tokenizer))
    written = tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(written[written.index('"added_tokens"') :].encode()).hexdigest()


# ---- Writing ----


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, eos_token: str | None = None) -> None:
    """The tokenizer's files into `folder`, as they came where nothing of theirs was changed, in words that transformers 4
    and 5 both know.

    eos_token: what generation stops at, where that is another token than the one which ended texts in training.
    """
    tokenizer.save_pretrained(folder)
    source: TokenizerSource | None = getattr(tokenizer, "source", None)
    config_path = folder / TOKENIZER_CONFIG_FILE
    written = json.loads(config_path.read_text(encoding="utf-8"))
    if source is None or state_of(tokenizer) != source.state:
        config = kept_settings(written, tokenizer)
        changes = {}
    else:
        for name, content in source.texts.items():
            (folder / name).write_bytes(content)
        for name, path in source.others.items():
            shutil.copyfile(path, folder / name)
        config = json.loads(source.texts.get(TOKENIZER_CONFIG_FILE, b"{}"))
        changes = {name: value for name, value in settings_of(tokenizer).items() if value != source.settings[name]}
        if "auto_map" in written:
            config.setdefault("auto_map", written["auto_map"])
    if eos_token is not None:
        changes["eos_token"] = eos_token
    if not isinstance(config.get("chat_template"), str):  # else for readers that know no chat_template.jinja
        changes.pop("chat_template", None)
        config.pop("chat_template", None)
    elif isinstance(tokenizer.chat_template, str):
        config["chat_template"] = tokenizer.chat_template
    config = in_both_dialects({**config, **changes})
    if (replaced := getattr(tokenizer, "saved_class", None)) is not None:
        config["tokenizer_class"] = replaced
    write_json(config_path, config)
    map_path = folder / SPECIAL_TOKENS_MAP_FILE
    if map_path.is_file() and (tokens := {key: value for key, value in changes.items() if key.endswith("_token")}):
        write_json(map_path, {**json.loads(map_path.read_text(encoding="utf-8")), **tokens})


def kept_settings(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What save_pretrained wrote, with the settings that it leaves out although reading depends on them."""
    left_out = ("add_bos_token", "add_eos_token", "legacy")
    return {**config, **{key: tokenizer.init_kwargs[key] for key in left_out if key in tokenizer.init_kwargs}}


def in_both_dialects(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 and 5 read alike."""
    config = dict(config)
    if config.get("tokenizer_class") == TokenizersBackend.__name__:
        config["tokenizer_class"] = ANY_READER
    if isinstance(config.get("extra_special_tokens"), list):  # version 4 takes a dict there, and nothing else
        extra = config.pop("extra_special_tokens")
        if extra and "additional_special_tokens" not in config:
            config["additional_special_tokens"] = extra
    if isinstance(config.get("auto_map"), list):
        config["auto_map"] = {"AutoTokenizer": config["auto_map"]}
    return config


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def settle_class(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: list[list[int]]) -> None:
    """Choose the class that the files name, by reading `folder`, where `save_tokenizer` has just written them.

    Raises UserError if no class gives the ids of the tokenizer.
    """
    if problem := misread(tokenizer, folder, rows):
        tokenizer.saved_class = ANY_READER
        save_tokenizer(tokenizer, folder)
        if misread(tokenizer, folder, rows):
            raise UserError(
                f"{tokenizer.name_or_path}: what would be saved of its tokenizer is read by transformers otherwise than it is "
                f"trained on ({problem}), so that the model would be served other tokens than it learnt. Save the tokenizer "
                "anew in a folder of its own (AutoTokenizer.from_pretrained, then save_pretrained) and name that with "
                "tokenizer_name_or_path: then what is trained on is what is read"
            )


def misread(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: list[list[int]]) -> str | None:
    """How the tokenizer that AutoTokenizer finds in `folder` differs from this one; None if it does not.

    rows: token ids of training rows, which must give the same text, and as text the same ids.
    """
    source = getattr(tokenizer, "source", None)
    try:
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=source is not None and source.trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        return f"it cannot be read: {type(error).__name__}: {error}"
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
    if tokenizer.is_fast:
        texts += telling_texts(tokenizer.backend_tokenizer)
    for text in texts:
        ours, theirs = (side(text, add_special_tokens=False)["input_ids"] for side in (tokenizer, saved))
        if ours != theirs:
            place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            here, there = (side.convert_ids_to_tokens(ids[max(place - 2, 0) : place + 4])
                           for side, ids in ((tokenizer, ours), (saved, theirs)))  # fmt: skip
            return f"{text[:60]!r} is {here} in training and {there} from the folder, at token {place}"
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) != getattr(saved, name):
            return f"{name} is {getattr(tokenizer, name)} in training and {getattr(saved, name)} from the folder"
    return None
