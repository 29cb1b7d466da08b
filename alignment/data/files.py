"""Files of rows -> one JSON text a row with its place, kept in a file that is named after their content."""

import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.table import InMemoryTable, MemoryMappedTable

from ..errors import UserError, not_utf8

LINES, PARQUET = "JSON", "Parquet"
FORMATS = {".jsonl": LINES, ".ndjson": LINES, ".json": LINES, ".parquet": PARQUET}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# By a file's first bytes, because a download may have unpacked what its name still calls packed.
OPENERS: dict[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
SCHEMA = pa.schema([("record", pa.binary()), ("place", pa.string())])
BATCH_ROWS = 1000

Record = tuple[bytes, str]
"""A row as JSON text, and its place: file and line."""


def local_path(name: str) -> Path | None:
    """The file or folder of this very name, whatever characters it has; else of the name behind ~; None if there is none."""
    for spell in (Path, lambda text: Path(text).expanduser()):
        try:
            if (path := spell(name)).exists():
                return path
        except PermissionError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from error
        except (OSError, ValueError, RuntimeError):  # too long for a name, a NUL in it, ~ of a user that there is not
            return None
    return None


def plain_name(file: Path) -> str:
    """The name without the ending of a compression."""
    return file.stem if file.suffix.lower() in COMPRESSED else file.name


def data_format(file: Path) -> str | None:
    return FORMATS.get(Path(plain_name(file)).suffix.lower())


def digest(files: Sequence[Path]) -> str:
    """Of names and contents: a copy with the old one's time and size is another file."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(f"{file}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return whole.hexdigest()


def kept_rows(key: str, records: Callable[[], Iterator[Record]]) -> Dataset:
    """The records as a data set, from the cache where an earlier run left them under this key."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "simpo-rows"
    folder.mkdir(parents=True, exist_ok=True)
    code = Path(__file__).read_bytes()
    name = hashlib.sha256(key.encode() + code).hexdigest()[:32]
    found = next(folder.glob(f"{name}-*.arrow"), None) or write_rows(folder, name, records())
    table = MemoryMappedTable.from_file(str(found))
    count = int(found.stem.rpartition("-")[2])
    if len(table) != count:  # a file that lost its last batches reads like a shorter one
        raise pa.ArrowInvalid(f"{len(table):,} of {count:,} rows")
    return Dataset(table, fingerprint=name)


def write_rows(folder: Path, name: str, records: Iterator[Record]) -> Path:
    """The file, whose name ends in the number of its rows, written aside and put in place in one move."""
    draft, count = folder / f"{name}.{os.getpid()}.incomplete", 0
    try:
        with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
            while batch := list(islice(records, BATCH_ROWS)):
                texts, places = zip(*batch, strict=True)
                stream.write_table(pa.table([pa.array(texts, pa.binary()), pa.array(places, pa.string())], schema=SCHEMA))
                count += len(batch)
        return draft.rename(folder / f"{name}-{count}.arrow")
    finally:
        draft.unlink(missing_ok=True)


def file_records(files: Sequence[Path], columns: Sequence[str]) -> Iterator[Record]:
    for file in files:
        read = parquet_records if data_format(file) == PARQUET else json_records
        try:
            yield from read(file, columns)
        except UserError:
            raise
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: {not_utf8(error)}") from error
        except (
            OSError, ValueError, RuntimeError, LookupError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException,
        ) as error:  # fmt: skip
            raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error


def open_plain(file: Path) -> IO[bytes]:
    with file.open("rb") as stream:
        start = stream.read(6)
    return next((opener(file) for magic, opener in OPENERS.items() if start.startswith(magic)), None) or file.open("rb")


def json_records(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """A row a line, whatever is in the lines, or one list of rows."""
    with open_plain(file) as stream:
        is_first = True
        for number, line in enumerate(iter(stream.readline, b""), 1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if is_first and text.startswith(b"["):
                rows = read_list(file, text + stream.read())
                yield from ((dump(row), f"{file}, row {index}") for index, row in enumerate(rows))
            elif text:
                yield text, f"{file}, line {number}"
                is_first = False


def read_list(file: Path, text: bytes) -> list[Any]:
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise UserError(f"{file}: cannot be read: nested too deeply") from None


def parquet_records(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    with open_plain(file) as stream:
        parquet = pq.ParquetFile(pa.BufferReader(stream.read()) if file.suffix.lower() in COMPRESSED else file)
        given = [name for name in parquet.schema_arrow.names if name in columns] or parquet.schema_arrow.names
        start = 0
        for batch in parquet.iter_batches(BATCH_ROWS, columns=given):
            rows = Dataset(InMemoryTable(pa.Table.from_batches([batch]))).to_list()
            yield from ((dump(without_nulls(row)), f"{file}, row {start + index}") for index, row in enumerate(rows))
            start += len(rows)


def dataset_records(rows: Dataset, place: str, columns: Sequence[str]) -> Iterator[Record]:
    rows = rows.with_format(None)
    rows = rows.select_columns([name for name in rows.column_names if name in columns] or rows.column_names)
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        for index, values in enumerate(zip(*batch.values(), strict=True), start):
            row = without_nulls(dict(zip(batch, values, strict=True)))
            yield dump(row), f"{place}, row {index}"


def without_nulls(value: Any) -> Any:
    """Arrow gives every row the keys of all rows; those that a row did not have are null."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def dump(row: Any) -> bytes:
    return json.dumps(row, default=str).encode()  # str: dates and the like, in columns that nobody reads
