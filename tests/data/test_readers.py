"""Readers: every format gives the same rows; every malformed file is one DataError with file and line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill.data import hub, readers
from bitdistill.errors import BitDistillError, DataError, MissingDependencyError, StorageError

ROWS = [{"text": 'Grüße, "Welt"\nzwei', "label": "yes"}, {"text": "\tтест 😀", "label": "no"}]


def write(path: Path, rows: list[dict]) -> str:
    """Write rows in the format of the suffix."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    name = path.name
    if name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif name.endswith(".zst"):
        half = len(lines) // 2  # two frames, as appending tools write them
        path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:10]) + gzip.compress(lines[10:]))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        quoted = [mark.join(rows[0])] + [
            mark.join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows
        ]
        path.write_bytes(("\ufeff" + "\r\n".join(quoted)).encode())
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".csv", ".tsv", ".parquet"])
def test_formats_agree(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path / f"rows{suffix}", ROWS)
    rows = readers.read_rows(source)
    fields = [row.fields for row in rows]
    if suffix in {".csv", ".tsv"}:  # a newline in quotes keeps its kind
        fields = [{k: v.replace("\r\n", "\n") for k, v in f.items()} for f in fields]
        # header is line 1, the first row spans lines 2 and 3
        assert [row.where for row in rows] == [f"{source}:2", f"{source}:4"]
    else:
        assert [row.where for row in rows] == [f"{source}:1", f"{source}:2"]
    assert fields == ROWS
    assert len(readers.read_rows(source, limit=1)) == 1


def test_blank_lines_and_bom_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(r.fields["a"], r.where) for r in readers.read_rows(str(path))] == [
        (1, f"{path}:1"),
        (2, f"{path}:4"),
    ]


GOOD = b'{"text": "a"}\n'
MALFORMED = {
    "list.jsonl": (GOOD + b"[1, 2]\n", r"list\.jsonl:2: a JSON list, not an object"),
    "number.jsonl": (b"3\n", r"number\.jsonl:1: a JSON int"),
    "syntax.jsonl": (GOOD + b'{"text": }\n', r"syntax\.jsonl:2: not JSON"),
    "cut.jsonl": (GOOD + b'{"text": "a', r"cut\.jsonl:2: not JSON"),
    "nan.jsonl": (b'{"text": NaN}\n', r"nan\.jsonl:1: .*NaN is not a JSON number"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", r"deep\.jsonl:1: (nested too deeply|not JSON)"),
    "digits.jsonl": (b'{"n": ' + b"9" * 5000 + b"}\n", r"digits\.jsonl:1: not JSON"),
    "latin.jsonl": (GOOD + b'{"text": "caf\xe9"}\n', r"latin\.jsonl:2: byte 13 \(0xe9\) is not UTF-8"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), r"utf16\.jsonl:1: byte 0 \(0xff\) is not UTF-8"),
    "nul.jsonl": (GOOD * 2 + b'{"text": "a\x00b"}\n', r"nul\.jsonl:3: a NUL character at 11"),
    "nul2.jsonl": (b'{"text": "a\\u0000b"}\n', r"nul2\.jsonl:1: field `text` holds a NUL"),
    "half.jsonl": (b'{"text": "a\\ud83d"}\n', r"half\.jsonl:1: field `text` holds a lone surrogate"),
    "half2.jsonl": (b'{"refs": ["ok", "\\udc00"]}\n', r"half2\.jsonl:1: field `refs` holds a lone surrogate"),
    "long.jsonl": (b'{"text": "' + b"a" * (16 << 20) + b'"}', r"long\.jsonl:1: a line of more than 16 MiB"),
    "empty.jsonl": (b"", r"empty\.jsonl: no rows"),
    "blank.jsonl": (b"\n \n", r"blank\.jsonl: no rows"),
    "cut.jsonl.zst": (zstandard.compress(GOOD * 50)[:-9], r"cut\.jsonl\.zst:\d+: cannot be read"),
    "junk.jsonl.zst": (zstandard.compress(GOOD) + b"junkjunk", r"junk\.jsonl\.zst:\d+: cannot be read"),
    "plain.jsonl.zst": (GOOD, r"plain\.jsonl\.zst:1: cannot be read"),
    "empty.jsonl.zst": (b"", r"empty\.jsonl\.zst: no rows"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 50)[:-12], r"cut\.jsonl\.gz:\d+: cannot be read"),
    "plain.jsonl.gz": (GOOD, r"plain\.jsonl\.gz:1: cannot be read"),
    "zeros.jsonl.zst": (zstandard.compress(bytes(1 << 26)), r"zeros\.jsonl\.zst: grows more than 200-fold"),
    "rows.jsonl.gz": (
        gzip.compress((b"{}" + b" " * 200 + b"\n") * (1 << 14)),
        r"rows\.jsonl\.gz: grows more than 200-fold",
    ),
    "wide.csv": (b"a,b\n1,2\n1,2,3\n", r"wide\.csv:3: 3 values, the header names 2"),
    "short.csv": (b"a,b\n1\n", r"short\.csv:2: 1 values, the header names 2"),
    "quote.csv": (b'a,b\n1,"2\n3,4\n', r"quote\.csv:2: not a well-formed row"),
    "twice.csv": (b"a,a\n1,2\n", r"twice\.csv:1: the header names 'a' twice"),
    "noname.csv": (b"a,\n1,2\n", r"noname\.csv:1: the header has an empty name"),
    "header.csv": (b"a,b\n", r"header\.csv: no rows"),
    "nul.tsv": (b"a\tb\n1\t2\x00\n", r"nul\.tsv:2: a NUL character"),
    "text.parquet": (b"not parquet at all", r"text\.parquet:1: unreadable parquet"),
    "empty.parquet": (b"", r"empty\.parquet:1: unreadable parquet"),
    "rows.json": (b"{}", r"rows\.json: unknown kind of file; use one of \.jsonl"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused(tmp_path: Path, name: str) -> None:
    content, message = MALFORMED[name]
    (tmp_path / name).write_bytes(content)
    started = time.process_time()
    with pytest.raises(DataError, match=message) as caught:
        readers.read_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 2


def test_truncated_parquet(tmp_path: Path) -> None:
    whole = Path(write(tmp_path / "whole.parquet", ROWS * 500)).read_bytes()
    for keep in (len(whole) // 3, len(whole) - 5):
        (tmp_path / "cut.parquet").write_bytes(whole[:keep])
        with pytest.raises(DataError, match=r"cut\.parquet:1: unreadable parquet"):
            readers.read_rows(str(tmp_path / "cut.parquet"))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".csv", ".jsonl.zst", ".jsonl.gz", ".parquet"]))
def test_any_bytes_give_rows_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
):
    path = tmp_path_factory.mktemp("fuzz") / f"f{suffix}"
    path.write_bytes(data)
    try:
        rows = readers.read_rows(str(path))
        message = str(path)
    except BitDistillError as error:
        rows, message = [], str(error)
    assert str(path) in message
    assert all(isinstance(row.fields, dict) for row in rows)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        readers.read_rows(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="a folder; name one file"):
        readers.read_rows(str(tmp_path))
    with pytest.raises(DataError, match="NUL"):
        readers.read_rows("a\0b.jsonl")


def test_documents_of_a_folder_come_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\nline", "utf-8")
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "x.jsonl.zst", [{"text": "third"}, {"text": "  "}, {"text": "fourth"}])
    write(tmp_path / "a.parquet", [{"content": "first", "id": 1}])
    (tmp_path / "notes.md").write_text("not a document kind", "utf-8")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("hidden", "utf-8")
    assert list(readers.read_documents(str(tmp_path))) == ["first", "second\nline", "third", "fourth"]


def test_documents_without_text(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "x"}, {"body": "y", "id": 1}])
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: no field `text` or `content` \(fields here: body, id\)"
    ):
        list(readers.read_documents(source))
    source = write(tmp_path / "b.jsonl", [{"text": None}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: field `text` is NoneType, not text"):
        list(readers.read_documents(source))
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no documents here"):
        list(readers.read_documents(str(tmp_path / "void")))
    (tmp_path / "notes.md").write_text("x", "utf-8")
    for read in (lambda s: list(readers.read_documents(s)), readers.check_documents):
        with pytest.raises(DataError, match=r"notes\.md: unknown kind of file; use one of .*, \.txt$"):
            read(str(tmp_path / "notes.md"))


def test_fingerprint_follows_content_not_name(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS)
    assert readers.source_fingerprint(a) == readers.source_fingerprint(b)
    write(tmp_path / "b.jsonl", ROWS[::-1])
    assert readers.source_fingerprint(a) != readers.source_fingerprint(b)
    folder = readers.source_fingerprint(str(tmp_path))
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    assert readers.source_fingerprint(str(tmp_path)) != folder
    assert readers.source_fingerprint("hub:a/b:c") == readers.source_fingerprint("hub:a/b:c:train")
    assert readers.source_fingerprint("hub:a/b@v1") != readers.source_fingerprint("hub:a/b")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hub:stanfordnlp/sst2", ("stanfordnlp/sst2", None, "train", None)),
        ("hub:nyu-mll/glue:mnli", ("nyu-mll/glue", "mnli", "train", None)),
        ("hub:nyu-mll/glue:mnli:validation_matched", ("nyu-mll/glue", "mnli", "validation_matched", None)),
        ("hub:imdb:test[:100]", ("imdb", None, "test[:100]", None)),
        ("hub:a/b@1f3c:cfg:train[10:20]", ("a/b", "cfg", "train[10:20]", "1f3c")),
    ],
)
def test_hub_names(source: str, expected: tuple) -> None:
    assert hub.parse(source) == hub.HubSource(*expected)


@pytest.mark.parametrize(
    "source", ["hub:", "hub:a/b/c", "hub:a/b:c:d:e", "hub:a/b::x", "hub:../x", "hub:a/b@"]
)
def test_bad_hub_names(source: str) -> None:
    with pytest.raises(DataError, match=r"not a hub name; write hub:owner/name"):
        hub.parse(source)


def fake_datasets(load_dataset) -> types.ModuleType:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    return module


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def load_dataset(name, config, **options):
        seen.update(name=name, config=config, **options)
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    rows = readers.read_rows("hub:o/n@r1:cfg:test")
    assert [(r.fields, r.where) for r in rows] == [
        ({"text": "a"}, "hub:o/n@r1:cfg:test:1"),
        ({"text": "b"}, "hub:o/n@r1:cfg:test:2"),
    ]
    assert seen == {"name": "o/n", "config": "cfg", "split": "test", "revision": "r1", "streaming": True}


def test_hub_errors_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_, **__):
        raise ValueError("Unknown split\n'tset'")

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    with pytest.raises(DataError, match=r"^hub:o/n: Unknown split 'tset'; check name"):
        readers.read_rows("hub:o/n:cfg:tset")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'bitdistill\[hub\]'"):
        readers.read_rows("hub:o/n")


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, bitdistill.data.readers, bitdistill.data.tasks, bitdistill.data.corpus;"
        "import bitdistill.eval.results;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pyarrow', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_a_file_that_may_not_be_read_is_no_corrupt_one(tmp_path, monkeypatch, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / name
    path.write_text("x")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(pa, "OSFile", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(StorageError, match=r"rows\S+: no permission to read it; mend its permissions"):
        list(readers.iter_rows(str(path)))
