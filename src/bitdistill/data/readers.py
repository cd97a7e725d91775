"""Rows and documents from files and the hub, with the place of every row for error messages. No torch import.

Files are streamed with caps, so that a hostile or broken file ends in one `DataError` and not in a full
memory: a line may have 16 MiB, and a compressed file may grow 200-fold once it passed 1 MiB.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bitdistill.artifact import hash_json, sha256_file
from bitdistill.data import hub
from bitdistill.errors import DataError, StorageError

MAX_LINE_BYTES = 16 * 2**20
MAX_RATIO = 200
RATIO_FREE_BYTES = 2**20
"""A compressed file may decode to this many bytes before MAX_RATIO counts."""

TABLE_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".csv", ".tsv", ".parquet")
DOCUMENT_SUFFIXES = (*TABLE_SUFFIXES, ".txt")
TEXT_FIELDS = ("text", "content")
"""Fields that hold a document's text, first match first (`content`: falcon-refinedweb)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row and the place it came from, for example `train.jsonl:17`."""

    fields: dict[str, Any]
    where: str


def read_rows(source: str, *, limit: int | None = None) -> list[Row]:
    """All rows (or the first `limit`) of a file or hub data set.

    Args:
        source: a .jsonl, .jsonl.zst, .jsonl.gz, .csv, .tsv or .parquet path, or
            `hub:owner/name[@revision][:config][:split]` (split `train` when none is given).

    Raises:
        DataError: no such file, unknown suffix, empty, or a bad row (named by file and line).
        StorageError: no permission to read it.
        MissingDependencyError: a hub source without the optional package `datasets`.
    """
    rows = list(itertools.islice(iter_rows(source), limit))
    if not rows:
        raise DataError(f"{source}: no rows; give a file with at least one row")
    return rows


def iter_rows(source: str) -> Iterator[Row]:
    """`read_rows` one by one, without the check for an empty source."""
    if hub.is_hub(source):
        spec = hub.parse(source)
        for number, fields in enumerate(hub.stream(spec), start=1):
            where = f"{source}:{number}"
            check_strings(fields, where)
            yield Row(fields, where)
        return
    path = _existing_file(source)
    yield from _reader_of(path)(path)


def source_fingerprint(source: str) -> str:
    """Hex SHA-256 that names the content of a source.

    A file: its bytes. A folder: names and bytes of its documents. A hub name: name, config, split and
    revision (without `@revision` the hub may change the content under the same fingerprint).
    """
    if hub.is_hub(source):
        return hash_json(hub.parse(source).as_dict())
    path = Path(source).expanduser()
    if path.is_dir():
        files = document_files(source)
        return hash_json([[p.relative_to(path).as_posix(), sha256_file(p)] for p in files])
    return sha256_file(_existing_file(source))


def read_documents(source: str) -> Iterator[str]:
    """The texts of a corpus: see `iter_documents`."""
    return (str(row.fields["text"]) for row in iter_documents(source))


def iter_documents(source: str) -> Iterator[Row]:
    """Documents of a corpus as rows whose field `text` is a non-empty string.

    Args:
        source: a table file or hub name with a field `text` (or `content`), a .txt file (one document), or
            a folder of such files, read in sorted order.

    Raises:
        DataError: as `read_rows`, or a row without text, or a folder without documents.
    """
    if hub.is_hub(source):
        yield from _documents_of_rows(iter_rows(source))
        return
    for path in document_files(source):
        if path.name.lower().endswith(".txt"):
            text = _read_text(path)
            if text.strip():
                yield Row({"text": text}, str(path))
        else:
            yield from _documents_of_rows(_reader_of(path, DOCUMENT_SUFFIXES)(path))


def check_documents(source: str) -> None:
    """Read a local corpus up to its first text (of a .txt file up to its first line with one).

    Raises:
        DataError: as `iter_documents`, or there is no text at all.
    """
    for path in document_files(source):
        if path.name.lower().endswith(".txt"):
            if any(_decode(line, f"{path}:{number}").strip() for number, line in _lines(path)):
                return
        elif next(_documents_of_rows(_reader_of(path, DOCUMENT_SUFFIXES)(path)), None) is not None:
            return
    raise DataError(f"{source}: no text; give a corpus with at least one document")


def document_files(source: str) -> list[Path]:
    """The document files of a path: itself, or all below a folder in sorted order (hidden ones left out)."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return [_existing_file(source)]
    files = sorted(
        (p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(DOCUMENT_SUFFIXES)),
        key=lambda p: p.relative_to(path).as_posix(),
    )
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise DataError(
            f"{source}: no documents here; a corpus folder holds {', '.join(DOCUMENT_SUFFIXES)} files"
        )
    return files


def _documents_of_rows(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        name = next((f for f in TEXT_FIELDS if f in row.fields), None)
        if name is None:
            have = ", ".join(map(str, row.fields)) or "none"
            raise DataError(
                f"{row.where}: no field `text` or `content` (fields here: {have}); rename the text's field"
            )
        text = row.fields[name]
        if not isinstance(text, str):
            raise DataError(
                f"{row.where}: field `{name}` is {type(text).__name__}, not text; mend or drop the row"
            )
        if text.strip():
            yield Row({**row.fields, "text": text}, row.where)


def _existing_file(source: str) -> Path:
    if "\0" in source:
        raise DataError(f"{source!r}: a path with a NUL character; check the recipe")
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"{source}: a folder; name one file of rows ({', '.join(TABLE_SUFFIXES)})")
    if not path.is_file():
        raise DataError(
            f"{source}: no such file; check the path (or write hub:owner/name for a hub data set)"
        )
    return path


def _reader_of(path: Path, known: Sequence[str] = TABLE_SUFFIXES) -> Callable[[Path], Iterator[Row]]:
    """The reader of a table; `known` are the suffixes that the caller reads, for the message."""
    name = path.name.lower()
    for suffix, reader in _READERS.items():
        if name.endswith(suffix):
            return reader
    raise DataError(f"{path}: unknown kind of file; use one of {', '.join(known)}")


class _Limited(io.RawIOBase):
    """A decompressed stream that refuses to grow past MAX_RATIO times the file it comes from."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path, self._size, self._read = stream, path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._read += len(data)
        if self._read > RATIO_FREE_BYTES and self._read > MAX_RATIO * self._size:
            raise DataError(
                f"{self._path}: grows more than {MAX_RATIO}-fold when decompressed "
                f"({self._size} bytes packed); unpack the file by hand if it is honest"
            )
        return len(data)


def _open_bytes(path: Path) -> IO[bytes]:
    """The decompressed bytes of a file, buffered. A truncated or corrupt frame raises OSError on reading."""
    codec = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix.lower())
    if codec is None:
        return path.open("rb", buffering=1 << 20)
    import pyarrow as pa  # bounded output a read, joined frames, and truncation is an error

    return io.BufferedReader(_Limited(pa.CompressedInputStream(pa.OSFile(str(path)), codec), path), 1 << 20)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line without its end) of a possibly compressed file."""
    number = 0
    try:
        with _open_bytes(path) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB; split or drop it"
                    )
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.rstrip(b"\r\n")
    except PermissionError as error:
        raise _not_allowed(path) from error
    except (OSError, EOFError) as error:
        raise DataError(
            f"{path}:{number + 1}: cannot be read ({error}); the file is cut off or corrupt"
        ) from error


def _not_allowed(path: Path) -> StorageError:
    return StorageError(f"{path}: no permission to read it; mend its permissions")


def _decode(line: bytes, where: str) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(
            f"{where}: byte {error.start} (0x{byte:02x}) is not UTF-8; convert the file to UTF-8"
        ) from None
    if "\0" in text:
        raise DataError(
            f"{where}: a NUL character at {text.index(chr(0))}; the file is not text, or drop the character"
        )
    return text


def _read_text(path: Path) -> str:
    """A whole text file; its size is capped only by memory, its lines by MAX_LINE_BYTES."""
    return "\n".join(_decode(line, f"{path}:{number}") for number, line in _lines(path))


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        text = _decode(line, where)
        try:
            fields = json.loads(text, parse_constant=no_constant)
        except RecursionError:
            raise DataError(f"{where}: nested too deeply; drop the row") from None
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); one JSON object a line is expected") from None
        if not isinstance(fields, dict):
            raise DataError(
                f'{where}: a JSON {type(fields).__name__}, not an object; write {{"field": value}} a line'
            )
        # Only an escape can smuggle these in: the decoder above refused raw ones.
        if "\\u" in text:
            check_strings(fields, where)
        yield Row(fields, where)


def no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def check_strings(fields: dict[str, Any], where: str) -> None:
    """Refuse strings that tokenizers choke on.

    Raises:
        DataError: a NUL character or a lone surrogate in a text field.
    """
    for name, value in fields.items():
        for text in value if isinstance(value, list) else (value,):
            if isinstance(text, str):
                check_text(text, f"{where}: field `{name}`")


def check_text(text: str, where: str) -> None:
    """Refuse a text that tokenizers choke on.

    Raises:
        DataError: a NUL character or a lone surrogate.
    """
    if "\0" in text:
        raise DataError(f"{where} holds a NUL character; drop the character")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{where} holds a lone surrogate (half a character); drop it")


def _read_delimited(path: Path, delimiter: str) -> Iterator[Row]:
    last = 0

    def text_lines() -> Iterator[str]:
        nonlocal last
        for number, line in _lines(path):
            last = number
            # csv needs the line end to keep newlines inside quotes.
            yield _decode(line, f"{path}:{number}") + "\n"

    csv.field_size_limit(MAX_LINE_BYTES)
    records = csv.reader(text_lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = last + 1
        where = f"{path}:{start}"
        try:
            record = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{where}: not a well-formed row ({error}); check its quotes") from None
        if not record:
            continue
        if header is None:
            header = _check_header(record, where)
        elif len(record) != len(header):
            raise DataError(
                f"{where}: {len(record)} values, the header names {len(header)}; check quotes and delimiters"
            )
        else:
            yield Row(dict(zip(header, record, strict=True)), where)


def _check_header(names: list[str], where: str) -> list[str]:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice or "" in names:
        what = f"names {twice[0]!r} twice" if twice else "has an empty name"
        raise DataError(f"{where}: the header {what}; the first line must name each column once")
    return names


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    where = f"{path}:{number}"
                    check_strings(fields, where)
                    yield Row(fields, where)
    except PermissionError as error:
        raise _not_allowed(path) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}:{number + 1}: unreadable parquet ({message}); the file is cut off or corrupt"
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".csv": lambda path: _read_delimited(path, ","),
    ".tsv": lambda path: _read_delimited(path, "\t"),
    ".parquet": _read_parquet,
}
