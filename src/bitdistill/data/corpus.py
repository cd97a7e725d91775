"""Token shards: a corpus tokenized once, in parallel, and read back memory-mapped.

A folder holds `tokens-00000.bin`, ... (little-endian uint16, or uint32 for vocabularies beyond 65,536) and
the manifest. Documents follow each other as [bos] text eos, bos only where the tokenizer adds one itself. The
bytes do not depend on the number of workers. No torch import.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bitdistill import artifact
from bitdistill.data import readers, tokenize_worker
from bitdistill.data.tokenize_worker import DTYPES, Coder
from bitdistill.data.tokenizer import eos_id, special_prefix
from bitdistill.errors import ArtifactError, BitDistillError, DataError, ModelError

KIND = "tokens"
CHUNK_CHARACTERS = 2**20
"""Text sent to a worker at a time."""

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
        workers: processes that tokenize.
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
    coder = Coder(_backend(tokenizer).to_str(), special_prefix(tokenizer), eos_id(tokenizer))
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
        manifest.update(_write_shards(folder, encoded, coder.eos, tokens_per_shard, limit_tokens, progress))
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

    Not of the special tokens that are put around a text (`TokenShards.bos_ids`, `eos_id`). The same for one
    tokenizer saved to and loaded from other folders. Padding, truncation and chat template do not count.

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


class _Workers:
    """Tokenizing processes, one a thread of the pool; a context manager that ends them."""

    def __init__(self, coder: Coder, count: int) -> None:
        settings = json.dumps({"state": coder.state, "prefix": coder.prefix, "eos": coder.eos}).encode()
        self._dtype = DTYPES[coder.dtype]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.pool = ThreadPoolExecutor(count)
        try:
            for _ in range(count):
                self._start(settings)
        except BaseException:
            self.close()
            raise

    def _start(self, settings: bytes) -> None:
        # -P: the script's folder must not shadow other modules. One process, one thread.
        process = subprocess.Popen(
            [sys.executable, "-P", tokenize_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._processes.append(process)
        _send(process, settings)
        self._idle.put(process)

    def encode(self, texts: list[str]) -> tuple[int, NDArray[np.integer]]:
        """(documents, ids) of a chunk, from an idle process; called in the pool's threads."""
        process = self._idle.get()
        try:
            _send(process, json.dumps(texts).encode())
            assert process.stdout is not None
            answer = tokenize_worker.receive(process.stdout)
            if answer is None:
                raise _worker_ended(process)
            return len(texts), np.frombuffer(answer, dtype=self._dtype)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Drop what is queued and end the processes; what they hold is not waited for."""
        for process in self._processes:
            process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.communicate()


def _send(process: subprocess.Popen[bytes], message: bytes) -> None:
    assert process.stdin is not None
    try:
        tokenize_worker.send(process.stdin, message)
    except BrokenPipeError:
        raise _worker_ended(process) from None


def _worker_ended(process: subprocess.Popen[bytes]) -> BitDistillError:
    return BitDistillError(
        f"corpus: a tokenizing process ended early (exit code {process.wait()}); "
        "out of memory? use fewer workers"
    )


def _encode_chunks(
    coder: Coder, chunks: Iterator[list[str]], workers: int
) -> Generator[tuple[int, NDArray[np.integer]], None, None]:
    """(documents, ids) of each chunk, in the order of `chunks`; at most 3 chunks a worker are in memory."""
    processes = _Workers(coder, workers)
    waiting: collections.deque[Future[tuple[int, NDArray[np.integer]]]] = collections.deque()
    try:
        for chunk in chunks:
            waiting.append(processes.pool.submit(processes.encode, chunk))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Also when the reader stops early (limit_tokens) or fails.
        processes.close()


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
    encoded: Generator[tuple[int, NDArray[np.integer]], None, None],
    eos: int,
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
            if left is not None and len(ids) > left:
                ids = ids[:left]
                # Whole documents, and the one that the limit cuts.
                chunk_documents = int((ids == eos).sum()) + int(left > 0 and ids[-1] != eos)
            left = None if left is None else left - len(ids)
            documents += chunk_documents
            while len(ids):
                if handle is None or counts[-1] == tokens_per_shard:
                    if handle is not None:
                        handle.close()
                        counts.append(0)
                    handle = (folder / _shard_name(len(counts) - 1)).open("wb")
                piece, ids = np.split(ids, [tokens_per_shard - counts[-1]])
                handle.write(piece.tobytes())
                counts[-1] += len(piece)
            if progress is not None:
                progress(documents, sum(counts))
            if left == 0:  # the next chunk would be cut to nothing
                break
    finally:
        encoded.close()
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
        bos_ids, eos_id: what each document begins and ends with.
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
            self.dtype = DTYPES[manifest["dtype"]]
            counts = [int(n) for n in manifest["shard_tokens"]]
            self.n_tokens, self.documents = int(manifest["tokens"]), int(manifest["documents"])
            self.vocab_size, self.eos_id = int(manifest["vocab_size"]), int(manifest["eos_id"])
            self.bos_ids = tuple(int(n) for n in manifest["bos_ids"])
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
        if size != count * self.dtype.itemsize or count < 1:
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
