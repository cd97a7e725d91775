"""Token shards: a corpus tokenized once, in parallel, and read back memory-mapped.

A folder holds `tokens-00000.bin`, ... (little-endian uint16, or uint32 for vocabularies beyond 65,536) and
the manifest. Documents follow each other as [bos] text eos, bos only where the tokenizer adds one itself. The
bytes do not depend on the number of workers. No torch import.
"""

from __future__ import annotations

import collections
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bitdistill import artifact
from bitdistill.data import readers
from bitdistill.data.tasks import eos_id, special_prefix
from bitdistill.errors import ArtifactError, DataError, ModelError

KIND = "tokens"
CHUNK_CHARACTERS = 2**20
"""Text sent to a worker at a time."""

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Progress = Callable[[int, int], None]
"""Called with (documents, tokens) written so far."""


def tokenize_corpus(
    sources: list[str],
    tokenizer: Any,
    out: Path,
    *,
    workers: int,
    tokens_per_shard: int = 2**26,
    limit_tokens: int | None = None,
    include: Mapping[str, Collection[str]] | None = None,
    exclude: Mapping[str, Collection[str]] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Tokenize documents into a shard folder.

    Args:
        sources: files, folders or hub names, as `readers.iter_documents` reads them, in this order.
        tokenizer: a Hugging Face tokenizer with a fast backend, or the folder or hub name of one.
        out: the artifact folder to write (atomically; an older one is replaced).
        workers: processes that tokenize; 1 works in this process.
        tokens_per_shard: size of a shard file.
        limit_tokens: stop after this many tokens, inside a document if need be.
        include: field -> values; only documents whose field has one of the values are kept.
        exclude: field -> values; documents whose field has one of the values are left out.
        progress: called after each chunk of text.

    Returns:
        `out`.

    Raises:
        DataError: a bad document (named by file and line), or nothing left to tokenize.
        ModelError: the tokenizer has no fast backend or no eos token.
        StorageError: the disk is full or not writable.
    """
    if not sources:
        raise DataError("corpus: no sources; name at least one file, folder or hub data set")
    if workers < 1 or tokens_per_shard < 1:
        raise DataError(
            f"corpus: workers {workers} and tokens_per_shard {tokens_per_shard} must be at least 1"
        )
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(str(tokenizer))
    coder = _Coder.of(tokenizer)
    manifest: dict[str, Any] = {
        "kind": KIND,
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "vocab_size": coder.vocab_size,
        "bos_ids": list(coder.prefix),
        "eos_id": coder.eos,
        "dtype": coder.dtype,
        "sources": [{"source": s, "fingerprint": readers.source_fingerprint(s)} for s in sources],
        "include": {k: sorted(v) for k, v in (include or {}).items()},
        "exclude": {k: sorted(v) for k, v in (exclude or {}).items()},
        "limit_tokens": limit_tokens,
    }
    texts = _documents(sources, include or {}, exclude or {})
    with artifact.writing(out, manifest) as folder:
        encoded = _encode_chunks(coder, _chunks(texts), workers)
        manifest.update(_write_shards(folder, encoded, coder.dtype, tokens_per_shard, limit_tokens, progress))
        if manifest["tokens"] == 0:
            raise DataError(f"corpus: no documents left in {', '.join(sources)}; check include and exclude")
    return out


def load_tokenizer(path: str) -> Any:
    """A tokenizer from a Hugging Face folder or hub name; code in it is never run.

    Raises:
        ModelError: nothing usable there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        message = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path}: no usable tokenizer ({message}); name a folder with tokenizer.json"
        ) from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 of what decides a text's ids: model, normalizer, pre-tokenizer and added tokens.

    The same for one tokenizer saved to and loaded from other folders. Padding, truncation and chat template
    do not count.

    Raises:
        ModelError: the tokenizer has no fast backend.
    """
    state = json.loads(_backend(tokenizer).to_str())
    added = sorted((t["id"], t["content"]) for t in state.get("added_tokens") or [])
    parts = {name: state.get(name) for name in ("model", "normalizer", "pre_tokenizer")}
    return artifact.hash_json({**parts, "added_tokens": added})


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            "tokenizer: no fast backend (tokenizer.json); convert it with transformers' fast tokenizers"
        )
    return backend


class _Coder:
    """Texts to ids by the `tokenizers` library alone, so a worker starts without transformers and torch."""

    def __init__(self, state: str, prefix: tuple[int, ...], eos: int) -> None:
        from tokenizers import Tokenizer

        self.state, self.prefix, self.eos = state, prefix, eos
        self._tokenizer = Tokenizer.from_str(state)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Marks such as <|endoftext|> inside a document are text, not the end of it.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"

    @classmethod
    def of(cls, tokenizer: Any) -> _Coder:
        return cls(_backend(tokenizer).to_str(), special_prefix(tokenizer), eos_id(tokenizer))

    def encode(self, texts: list[str]) -> tuple[int, NDArray[np.integer]]:
        """(documents, their ids joined)."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array([*self.prefix, *e.ids, self.eos], dtype=self.dtype) for e in encoded]
        return len(rows), np.concatenate(rows)


_worker_coder: _Coder | None = None


def _start_worker(state: str, prefix: tuple[int, ...], eos: int) -> None:
    # One process, one thread: the pool is the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _worker_coder
    _worker_coder = _Coder(state, prefix, eos)


def _encode_in_worker(texts: list[str]) -> tuple[int, NDArray[np.integer]]:
    assert _worker_coder is not None
    return _worker_coder.encode(texts)


def _encode_chunks(
    coder: _Coder, chunks: Iterator[list[str]], workers: int
) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """Encoded chunks in the order of `chunks`; at most 3 chunks a worker are in memory."""
    if workers == 1:
        yield from map(coder.encode, chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(coder.state, coder.prefix, coder.eos),
    )
    waiting: collections.deque[Future[tuple[int, NDArray[np.integer]]]] = collections.deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Also when the reader stops early (limit_tokens) or fails.
        pool.shutdown(wait=True, cancel_futures=True)


def _documents(
    sources: list[str], include: Mapping[str, Collection[str]], exclude: Mapping[str, Collection[str]]
) -> Iterator[str]:
    for row in itertools.chain.from_iterable(map(readers.iter_documents, sources)):
        for field in (*include, *exclude):
            if field not in row.fields:
                raise DataError(f"{row.where}: no field `{field}` to include or exclude by; drop the filter")
        kept = all(str(row.fields[f]) in values for f, values in include.items())
        if kept and not any(str(row.fields[f]) in values for f, values in exclude.items()):
            yield row.fields["text"]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about CHUNK_CHARACTERS."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_shards(
    folder: Path,
    encoded: Iterator[tuple[int, NDArray[np.integer]]],
    dtype: str,
    tokens_per_shard: int,
    limit_tokens: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the ids and return the manifest's counts."""
    documents, counts = 0, [0]
    handle: IO[bytes] | None = None
    left = limit_tokens
    try:
        for chunk_documents, ids in encoded:
            if left is not None:
                ids = ids[:left]
                left -= len(ids)
            documents += chunk_documents
            while len(ids):
                if handle is None or counts[-1] == tokens_per_shard:
                    if handle is not None:
                        handle.close()
                        counts.append(0)
                    handle = (folder / _shard_name(len(counts) - 1)).open("wb")
                piece, ids = np.split(ids, [tokens_per_shard - counts[-1]])
                handle.write(piece.astype(_DTYPES[dtype], copy=False).tobytes())
                counts[-1] += len(piece)
            if progress is not None:
                progress(documents, sum(counts))
            if left == 0:
                break
    finally:
        encoded.close()  # type: ignore[attr-defined]  # a generator: stops its pool
        if handle is not None:
            handle.close()
    return {"documents": documents, "tokens": sum(counts), "shard_tokens": counts}


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


class TokenShards:
    """A shard folder, memory-mapped.

    Attributes:
        n_tokens: tokens in all shards.
        documents: documents that were tokenized.
        vocab_size: ids are below this.
        tokenizer_sha256: `tokenizer_fingerprint` of the tokenizer that made it.
        fingerprint: hex SHA-256 that names the content (shards and tokenizer).

    Raises:
        ArtifactError: no shard folder, or files that are missing or of another size than the manifest's.
            (`artifact.verify(folder)` checks every byte.)
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        manifest = artifact.read_manifest(self.folder)
        if manifest.get("kind") != KIND:
            raise ArtifactError(
                f"{folder}: an artifact of kind {manifest.get('kind')!r}, not token shards; "
                "run `bitdistill tokenize`"
            )
        try:
            self.dtype = _DTYPES[manifest["dtype"]]
            counts = [int(n) for n in manifest["shard_tokens"]]
            self.n_tokens, self.documents = int(manifest["tokens"]), int(manifest["documents"])
            self.vocab_size, self.eos_id = int(manifest["vocab_size"]), int(manifest["eos_id"])
            self.tokenizer_sha256 = str(manifest["tokenizer_sha256"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{folder}: manifest lacks or garbles {error}; run `bitdistill tokenize`"
            ) from error
        self._shards = [self._map(number, count) for number, count in enumerate(counts)]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if self.n_tokens != self._starts[-1]:
            raise ArtifactError(
                f"{folder}: shards hold {self._starts[-1]} tokens, the manifest says {self.n_tokens}; "
                "run `bitdistill tokenize`"
            )
        shas = [entry["sha256"] for name, entry in sorted(manifest["files"].items()) if name.endswith(".bin")]
        self.fingerprint = artifact.hash_json([self.tokenizer_sha256, manifest["dtype"], shas])

    def __len__(self) -> int:
        return self.n_tokens

    def _map(self, number: int, count: int) -> NDArray[np.integer]:
        path = self.folder / _shard_name(number)
        size = path.stat().st_size if path.is_file() else -1
        if size != count * self.dtype.itemsize:
            state = (
                "missing" if size < 0 else f"{size} bytes, the manifest says {count * self.dtype.itemsize}"
            )
            raise ArtifactError(f"{path}: {state}; run `bitdistill tokenize` again")
        return np.memmap(path, dtype=self.dtype, mode="r")

    def read(self, start: int, count: int) -> NDArray[np.integer]:
        """Tokens [start, start + count), across shards.

        Raises:
            IndexError: the range leaves the corpus.
        """
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.n_tokens}")
        if count == 0:
            return np.empty(0, dtype=self.dtype)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces, position, end = [], start, start + count
        while position < end:
            base = int(self._starts[first])
            piece = self._shards[first][position - base : end - base]
            pieces.append(np.asarray(piece))
            position += len(piece)
            first += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
