"""alignment.data.sources and files: what a name stands for, and how rows are read from files as people have them."""

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from alignment.data.sources import file_purpose, split_purpose
from alignment.errors import UserError
from tests.unit.data.test_mixing import assistant, error_of, pair, pairs, questions, read, user, write


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def trained(name: str, **options) -> list[str]:
    return sorted(questions(read({name: 1.0}, **options)[0]["train"]))


def packed(path: str, rows: list[dict], opener) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wb") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


# ---- Names ----


@pytest.mark.parametrize(
    "name", ["[v2] pairs", "a*b", "what?", "x::y", "hf://z", "{{ a }}", "~pairs", "a,b", "owner/pairs:english"]
)
def test_a_folder_is_that_folder_whatever_characters_its_name_has(name):
    write(f"{name}/train.jsonl", pairs(2))
    write("axb/train.jsonl", pairs(1, "other"))
    write("v pairs/train.jsonl", pairs(1, "other"))
    assert trained(name, splits=["train"]) == ["q0", "q1"]


@pytest.mark.parametrize("name", ["pairs[1].jsonl", "pairs*.jsonl", "pairs?.jsonl"])
def test_a_file_is_that_file_and_not_what_its_name_would_match(name):
    write(name, pairs(2))
    write("pairs1.jsonl", pairs(1, "other"))
    assert trained(name) == ["q0", "q1"]


def test_a_pattern_may_stand_behind_a_folder_whose_name_looks_like_one():
    write("[v2] pairs/a.jsonl", pairs(1))
    write("v pairs/a.jsonl", pairs(1, "other"))
    assert trained("[v2] pairs/*.jsonl") == ["q0"]


@pytest.mark.parametrize("name", ["~nobody_of_this_name/pairs", "a" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_a_source_that_is_nowhere(name):
    assert "no file or folder of this name" in error_of({name: 1.0})


def test_a_folder_that_must_not_be_read_is_one_error(monkeypatch):
    write("closed/train.jsonl", pairs(1))
    monkeypatch.setattr(Path, "iterdir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert error_of({"closed": 1.0}) == "closed: cannot be read: Permission denied"


# ---- What the cache knows ----


def replaced(old: Path, new: Path) -> None:
    """new over old, with old's times, as rsync -t and image layers leave it."""
    stat = old.stat()
    shutil.copyfile(new, old)
    os.utime(old, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_other_rows_under_the_same_path_and_time_are_read_anew():
    write("data/train.jsonl", pairs(4, "old"))
    write("new.jsonl", pairs(6, "new"))
    assert len(trained("data")) == 4
    replaced(Path("data/train.jsonl"), Path("new.jsonl"))
    assert trained("data") == [f"new{number}" for number in range(6)]


def test_other_rows_of_the_same_size_are_read_anew():
    write("data/train.jsonl", pairs(4, "old"))
    write("new.jsonl", pairs(4, "new"))
    assert trained("data")[0] == "old0"
    replaced(Path("data/train.jsonl"), Path("new.jsonl"))
    assert trained("data")[0] == "new0"


def test_other_rows_in_a_parquet_file_or_a_saved_dataset_are_read_anew():
    Dataset.from_list(pairs(2, "old")).to_parquet("data/train.parquet")
    Dataset.from_list(pairs(2, "new")).to_parquet("new.parquet")
    Dataset.from_list(pairs(2, "old")).save_to_disk("saved")
    Dataset.from_list(pairs(2, "new")).save_to_disk("new")
    assert trained("data")[0] == trained("saved")[0] == "old0"
    replaced(Path("data/train.parquet"), Path("new.parquet"))
    replaced(Path("saved/data-00000-of-00001.arrow"), Path("new/data-00000-of-00001.arrow"))
    assert trained("data")[0] == trained("saved")[0] == "new0"


def test_the_same_rows_under_another_time_are_not_read_again(tmp_path):
    write("a.jsonl", pairs(3))
    trained("a.jsonl")
    before = sorted((tmp_path / "cache").rglob("*.arrow"))
    os.utime("a.jsonl", (1, 1))
    trained("a.jsonl")
    assert sorted((tmp_path / "cache").rglob("*.arrow")) == before


def test_kept_rows_that_lost_their_last_batch_are_not_taken_for_fewer(tmp_path):
    write("a.jsonl", pairs(2500))
    trained("a.jsonl")
    (kept,) = (path for path in (tmp_path / "cache/simpo-rows").glob("*-2500.arrow") if "cache" not in path.name)
    table = pa.ipc.open_stream(kept.read_bytes()).read_all()
    with pa.OSFile(str(kept), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table.slice(0, 2000))
    assert "2,000 of 2,500 rows" in error_of({"a.jsonl": 1.0})


# ---- Words of a split's name ----


@pytest.mark.parametrize(
    "name", ["train", "train_prefs", "my_training", "train_test", "trainTest", "TRAIN", "trainset", "train2"]
)
def test_a_split_is_for_training_by_a_whole_word(name):
    assert split_purpose(name) == "train"


@pytest.mark.parametrize("name", ["test", "test_prefs", "validation", "eval", "dev", "val", "prefs-eval", "myTest", "TEST_2"])
def test_a_split_is_for_evaluation_by_a_whole_word(name):
    assert split_purpose(name) == "test"


@pytest.mark.parametrize(
    "name", ["retrieval_pairs", "latest", "contest", "constraints", "device", "approval", "interval", "gen"]
)
def test_a_word_inside_another_says_nothing(name):
    assert split_purpose(name) is None
    write("source/train.jsonl", pairs(1))
    write(f"source/{name}.jsonl", pairs(1))
    assert error_of({"source": 1.0}, splits=["train", name]).startswith(f"dataset_splits: {name!r} could be for")


@pytest.mark.parametrize(
    ("name", "purpose"), [("evalSet.jsonl.gz", "test"), ("test.JSONL", "test"), ("latest.ndjson", "train")]
)
def test_the_words_of_a_files_name_are_read_alike(name, purpose):
    assert file_purpose(Path(name)) == purpose


# ---- Endings and folders ----


@pytest.mark.parametrize(
    ("ending", "opener"),
    [
        ("jsonl.gz", gzip.open),
        ("jsonl.bz2", bz2.open),
        ("json.xz", lzma.open),
        ("ndjson.gz", gzip.open),
        ("JSONL.GZ", gzip.open),
    ],
)
def test_compressed_files_are_read_and_named_with_their_lines(ending, opener):
    packed(f"source/train.{ending}", [pair("q0"), pair(chosen="")], opener)
    mixed, reports = read({"source": 1.0})
    assert len(mixed["train"]) == 2
    assert reports["train"].places == [f"source/train.{ending}, line 2: the last turn of chosen is empty"]


def test_zstandard_is_read_too():
    Path("source").mkdir()
    with pa.output_stream("source/train.jsonl.zst", compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in pairs(3)).encode())
    assert trained("source") == ["q0", "q1", "q2"]


def test_what_a_download_unpacked_keeps_its_name_and_is_read():
    write("train.jsonl.gz", pairs(2))
    packed("packed.jsonl", pairs(2), gzip.open)
    assert trained("train.jsonl.gz") == trained("packed.jsonl") == ["q0", "q1"]


@pytest.mark.parametrize("name", ["train.ndjson", "train.JSONL", "Train.Json", "TRAIN.jsonl", "train-00000-of-00001.JSONL"])
def test_a_split_is_found_whatever_the_case_and_the_ending(name):
    write(f"source/{name}", pairs(2))
    assert trained("source") == ["q0", "q1"]


def test_a_folder_a_split_is_read_with_all_its_files():
    for number in range(3):
        write(f"source/train/{number}.jsonl", pairs(1, f"n{number}-"))
    write("source/test/all.jsonl", pairs(1, "t"))
    mixed, _ = read({"source": 1.0}, do_eval=True)
    assert sorted(questions(mixed["train"])) == ["n0-0", "n1-0", "n2-0"]
    assert questions(mixed["test"]) == ["t0"]


def test_a_folder_a_split_is_found_in_data_too_and_when_it_is_named_itself():
    for number in range(2):
        write(f"source/data/train/{number}.jsonl", pairs(1, f"n{number}-"))
    assert trained("source") == trained("source/data/train") == ["n0-0", "n1-0"]


def test_what_is_passed_over_is_said_in_one_line():
    write("source/train.jsonl", pairs(1))
    write("source/._train.jsonl", [])
    for name in ("notes.txt", "train.jsonl~", "pairs.csv"):
        Path("source", name).write_text("text")
    _, reports = read({"source": 1.0})
    assert str(reports["train"]) == "1 row read; source: passed over ._train.jsonl, notes.txt, pairs.csv, train.jsonl~"


def test_what_a_data_set_says_of_itself_is_not_passed_over():
    Dataset.from_list(pairs(1)).save_to_disk("source/train")
    Path("source/dataset_dict.json").write_text('{"splits": ["train"]}')
    _, reports = read({"source": 1.0}, do_eval=False)
    assert reports["train"].notes == []


@pytest.mark.parametrize("source", ["source", "source/train.csv"])
def test_a_table_of_texts_is_refused_with_what_makes_pairs_of_it(source):
    Path("source").mkdir()
    Path("source/train.csv").write_text("prompt,chosen,rejected\nq,a,b\n", encoding="utf-8")
    assert error_of({source: 1.0}).endswith("; train.csv is a table of texts, of which docs/your-own-data.md makes pairs")


def test_splits_that_a_recipe_does_not_name_are_said():
    for name in ("train", "gen", "test"):
        write(f"source/{name}.jsonl", pairs(1))
    _, reports = read({"source": 1.0}, do_eval=False)
    assert reports["train"].notes == ["source: not named in dataset_splits: gen"]


def test_a_pattern_passes_over_what_is_no_data():
    write("source/a.jsonl", pairs(1))
    write("source/._a.jsonl", [])
    Path("source/README.md").write_text("text")
    mixed, reports = read({"source/*": 1.0})
    assert questions(mixed["train"]) == ["q0"]
    assert reports["train"].notes == ["source/*: passed over source/._a.jsonl, source/README.md"]


def test_files_of_a_split_may_be_compressed_each_in_its_own_way():
    write("source/train/a.jsonl", pairs(1, "a"))
    packed("source/train/b.JSONL.gz", pairs(1, "b"), gzip.open)
    packed("source/train/c.ndjson.xz", pairs(1, "c"), lzma.open)
    assert trained("source", splits=["train"]) == ["a0", "b0", "c0"]


@pytest.mark.parametrize("other", ["train.jsonl.gz", "train.json", "train/part.jsonl"])
def test_the_same_split_twice_is_refused(other):
    write("source/train.jsonl", pairs(1))
    write(f"source/{other}", pairs(1))
    assert "source" in error_of({"source": 1.0})


def test_a_folder_without_data_says_what_it_holds():
    Path("source").mkdir()
    Path("source/train.xlsx").write_text("a,b")
    assert error_of({"source": 1.0}).endswith("; it holds train.xlsx")


# ---- What is in the files ----


def test_a_file_that_is_not_utf8_is_one_error_with_its_line_and_a_way_out():
    write("a.jsonl", pairs(2))
    Path("a.jsonl").write_bytes(Path("a.jsonl").read_bytes() + json.dumps(pair("café"), ensure_ascii=False).encode("latin1"))
    message = error_of({"a.jsonl": 1.0})
    assert message.startswith("a.jsonl, line 3: is not UTF-8 (byte 0xe9); save it as UTF-8, e.g. iconv -f latin1 -t utf-8")


@pytest.mark.parametrize(("encoding", "content"), [("latin1", "café"), ("cp1252", "a “word”"), ("utf-16", "a")])
def test_the_advice_about_another_encoding_works(encoding, content):
    text = json.dumps(pair(content), ensure_ascii=False) + "\n"
    Path("a.jsonl").write_bytes(text.encode(encoding))
    message = error_of({"a.jsonl": 1.0})
    advised = message.partition("iconv -f ")[2].split()[0]
    Path("a.jsonl").write_text(Path("a.jsonl").read_bytes().decode(advised), encoding="utf-8")
    assert trained("a.jsonl") == [content]


def test_a_column_that_parquet_has_twice_is_one_error_that_names_the_file():
    sides = pa.array([pair()["chosen"]])
    pq.write_table(pa.Table.from_arrays([sides] * 3, names=["chosen", "rejected", "chosen"]), "a.parquet")
    assert error_of({"a.parquet": 1.0}).startswith("a.parquet: cannot be read: ")


@pytest.mark.parametrize(
    "content", ["café".encode("latin1"), "[{}]".encode("utf-16"), b"[" * 100_000, b"\x1f\x8bnot packed", b"[1"]
)
def test_what_cannot_be_read_is_one_error_that_names_the_file(content):
    Path("a.json").write_bytes(content)
    assert error_of({"a.json": 1.0}).startswith("a.json")


@pytest.mark.parametrize("line", ['"text"', "[1]", "3", "null", "NaN"])
def test_a_line_that_is_no_row_is_named(line):
    write("a.jsonl", pairs(1))
    Path("a.jsonl").write_text(Path("a.jsonl").read_text() + line + "\n")
    assert error_of({"a.jsonl": 1.0}).startswith("a.jsonl, line 2: is ")


def test_half_of_a_character_is_one_error_with_its_line():
    write("a.jsonl", [pair(), pair(chosen="\ud83d")])
    assert "a.jsonl, line 2: chosen has the turn" in error_of({"a.jsonl": 1.0})


def test_a_byte_order_mark_empty_lines_and_windows_line_ends_are_no_rows():
    write("a.jsonl", pairs(2))
    text = Path("a.jsonl").read_text().replace("\n", "\r\n\r\n")
    Path("a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert trained("a.jsonl") == ["q0", "q1"]


def test_a_malformed_row_is_named_by_its_file_and_line_among_several_files():
    for shard in range(3):
        rows = [pair("ok"), pair(chosen="") if shard == 1 else pair("ok"), pair("ok")]
        write(f"source/train-0000{shard}-of-00003.jsonl", rows)
    message = error_of({"source": 1.0}, preprocessing="exact")
    assert message.startswith("source/train-00001-of-00003.jsonl, line 2: the last turn of chosen is empty")


@pytest.mark.parametrize(
    "odd",
    [{"score": "high"}, {"score": [1]}, {"meta": {"a": 1}}, {"meta": {"b": [None]}}, {"at": 10**30}, {"prompt": 7}],
)
def test_columns_that_nobody_reads_stop_no_run(odd):
    write("source/train-0.jsonl", [{**pair("a"), "score": 1, "meta": {"a": "x"}} for _ in range(1200)])
    write("source/train.jsonl", [{**pair(f"q{number}"), "score": 1} for number in range(1200)] + [{**pair("odd"), **odd}])
    assert "odd" in trained("source", splits=["train", "train-0"])


def test_unused_keys_of_a_turn_stop_no_run_and_make_no_turns_different():
    odd = {"chosen": [{**user("q"), "id": 1}, assistant("c")], "rejected": [{**user("q"), "id": [2]}, assistant("r")]}
    write("a.jsonl", [*pairs(1200), odd])
    mixed, reports = read({"a.jsonl": 1.0}, preprocessing="exact")
    assert len(mixed["train"]) == 1201
    assert reports["train"].tolerated == {}


def test_shards_of_other_types_are_read_in_parquet_too():
    Dataset.from_list([{**pair("a"), "score": 1}]).to_parquet("source/train-00000-of-00002.parquet")
    Dataset.from_list([{**pair("b"), "score": "x", "more": [1]}]).to_parquet("source/train-00001-of-00002.parquet")
    assert trained("source") == ["a", "b"]


def test_a_missing_column_of_parquet_and_of_saved_rows_is_an_error_with_the_columns_there_are():
    rows = Dataset.from_list([{"chosen": pair()["chosen"], "score": 1}])
    rows.to_parquet("a.parquet")
    rows.save_to_disk("saved")
    for name in ("a.parquet", "saved"):
        assert error_of({name: 1.0}).startswith(f"{name}: no column 'rejected'; it has chosen")


# ---- Beginnings that are none ----

PARTIAL = {
    "a system turn in the prompt only": {"prompt": [{"role": "system", "content": "s"}, user("q")], **pair("q", "c", "r")},
    "white space": {"prompt": [user("q\n")], **pair("q", "c", "r")},
    "the last turn only": {"prompt": [user("q2")]}
    | {side: [user("q"), assistant("a"), user("q2"), assistant(side)] for side in ("chosen", "rejected")},
    "the first turn only": {"prompt": [user("q")]}
    | {side: [user("q"), assistant("a"), user("q2"), assistant(side)] for side in ("chosen", "rejected")},
    "two replies": {
        "prompt": [user("q")],
        "chosen": [assistant("a"), assistant("b")],
        "rejected": [assistant("a"), assistant("c")],
    },
}


@pytest.mark.parametrize("row", PARTIAL.values(), ids=PARTIAL)
def test_a_response_of_more_than_one_turn_is_refused_by_exact_and_told_by_published(row):
    write("a.jsonl", [pair(), row])
    reason = "more than a reply in a response"
    message = error_of({"a.jsonl": 1.0}, preprocessing="exact")
    assert message.startswith("a.jsonl, line 2: behind the prompt, chosen goes on with")
    _, reports = read({"a.jsonl": 1.0}, preprocessing="published")
    assert reports["train"].tolerated[reason] == 1
    mixed, reports = read({"a.jsonl": 1.0}, preprocessing="exact", bad_rows="drop")
    assert (len(mixed["train"]), reports["train"].dropped) == (1, {reason: 1})


def test_an_unreadable_file_is_a_user_error_and_no_other():
    Path("a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read"):
        read({"a.parquet": 1.0})
