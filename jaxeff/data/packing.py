"""From documents to token streams, and from token streams to the rows of a batch.

A ``TokenStream`` is one split of a corpus as a single flat array: each document as
``bos + tokens + eos``, one after the other. ``Windows`` cuts it into rows of ``seq_len`` tokens
and builds any set of rows at once, with segments, positions and loss mask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from jaxeff.data import corpora
from jaxeff.data.corpora import Document

_CACHE_FORMAT = 1
_PROBE_BYTES = 1 << 16


class Tokenizer(Protocol):
    """What this module asks of a tokenizer; ``bos_id`` and ``eos_id`` may be ``None``."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int

    def encode(self, text: bytes) -> np.ndarray: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split, document after document.

    Attributes:
      tokens: (num_tokens,) unsigned integers, of the smallest dtype that holds the vocabulary.
      offsets: (num_documents + 1,) int64; document ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``.
      vocab_size: number of ids of the tokenizer.
      pad_id: id that fills what is left of a row.
      num_bytes: bytes of the documents before tokenisation.
    """

    tokens: np.ndarray = dataclasses.field(repr=False)
    offsets: np.ndarray = dataclasses.field(repr=False)
    vocab_size: int
    pad_id: int
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def bytes_per_target(self) -> float:
        """Bytes of text for each token that is predicted (every one but a document's first).

        Divides nats per token to give nats per byte: with the byte tokenizer it is just below 1,
        because the end of each document is predicted too and counts as a cost of its bytes.
        """
        return self.num_bytes / max(1, self.num_tokens - self.num_documents)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of tokens and document boundaries: equal streams give equal batches."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.tokens.dtype.str} {self.vocab_size} {self.pad_id}".encode())
        digest.update(memoryview(np.ascontiguousarray(self.offsets)))
        digest.update(memoryview(np.ascontiguousarray(self.tokens)))
        return digest.hexdigest()


def tokenize(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str] | None = None,
) -> TokenStream:
    """Encodes documents into one stream, each as ``bos + tokens + eos``.

    Args:
      documents: the documents, for example ``Corpus.train``; they are passed to
        ``tokenizer.encode`` as bytes.
      tokenizer: see ``Tokenizer``; a bos or eos id that is ``None`` is left out.
      cache_dir: where the stream is kept as memory-mapped files between runs, under a name made
        from the documents' contents and the tokenizer's vocabulary and behaviour. A damaged or
        incomplete entry is built anew. ``None`` keeps nothing.

    Raises:
      ValueError: the tokenizer fails on a document (the message names it), or has or gives an id
        outside its vocabulary.
      OSError: ``cache_dir`` cannot be written.
    """
    for name in ("bos_id", "eos_id", "pad_id"):
        token_id = getattr(tokenizer, name)
        optional = token_id is None and name != "pad_id"
        if not optional and not 0 <= token_id < tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer's {name} is {token_id}, outside [0, {tokenizer.vocab_size})"
            )
    if cache_dir is None:
        return _encode_all(documents, tokenizer)
    entry = Path(cache_dir).expanduser() / f"tokens-{_cache_key(documents, tokenizer)}"
    stream = _load_cached(entry)
    if stream is None:
        _save_cached(entry, _encode_all(documents, tokenizer))
        stream = _load_cached(entry)
    if stream is None:
        raise OSError(f"cache_dir {str(cache_dir)!r}: what was written cannot be read back")
    return stream


def _encode_all(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStream:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    bos, eos = (
        np.asarray([] if i is None else [i], dtype) for i in (tokenizer.bos_id, tokenizer.eos_id)
    )
    pieces, lengths = [], []
    for document in documents:
        ids = _encode(document, tokenizer)
        length = len(bos) + len(ids) + len(eos)
        if length == 0:
            continue
        pieces += [bos, ids.astype(dtype), eos]
        lengths.append(length)
    return TokenStream(
        tokens=np.concatenate(pieces) if pieces else np.zeros(0, dtype),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        num_bytes=sum(len(d.data) for d in documents),
    )


def _encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    try:
        ids = np.asarray(tokenizer.encode(document.data))
    except Exception as error:
        raise ValueError(f"tokenising {document.name} failed: {error}") from error
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
        raise ValueError(
            f"tokenising {document.name} gave id {wrong}, outside the vocabulary "
            f"[0, {tokenizer.vocab_size})"
        )
    return ids


def _cache_key(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    # A tokenizer has no name to trust: what it is, is what it does. Its whole vocabulary and the
    # beginning of this very corpus, encoded, tell two of them apart.
    ids = (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    digest = hashlib.blake2b(f"{_CACHE_FORMAT} {ids}".encode(), digest_size=16)
    digest.update(corpora.fingerprint(documents).encode())
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.decode_bytes([token_id])
        digest.update(len(piece).to_bytes(4, "big") + piece)
    probe = b""
    for document in documents:
        probe += document.data[: _PROBE_BYTES - len(probe)]
        if len(probe) == _PROBE_BYTES:
            break
    digest.update(np.asarray(tokenizer.encode(probe), np.int64).tobytes())
    return digest.hexdigest()


def _load_cached(entry: Path) -> TokenStream | None:
    """Returns the stream of a complete and undamaged entry, else ``None``."""
    try:
        header = json.loads(entry.with_suffix(".json").read_text())
        stream = TokenStream(
            # The view drops the memmap subclass, which would otherwise spread to every batch.
            tokens=np.load(entry.with_suffix(".tokens.npy"), mmap_mode="r").view(np.ndarray),
            offsets=np.load(entry.with_suffix(".offsets.npy")),
            vocab_size=header["vocab_size"],
            pad_id=header["pad_id"],
            num_bytes=header["num_bytes"],
        )
        return stream if stream.fingerprint == header["fingerprint"] else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _save_cached(entry: Path, stream: TokenStream) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        name: getattr(stream, name) for name in ("vocab_size", "pad_id", "num_bytes", "fingerprint")
    }
    _write_atomically(entry.with_suffix(".tokens.npy"), lambda f: np.save(f, stream.tokens))
    _write_atomically(entry.with_suffix(".offsets.npy"), lambda f: np.save(f, stream.offsets))
    # Last, because an entry without its header does not exist.
    _write_atomically(
        entry.with_suffix(".json"), lambda f: f.write(json.dumps(header, default=int).encode())
    )


def _write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    # Several processes, perhaps on several hosts, may write the same entry at once.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


class Windows:
    """The rows of a stream; ``len()`` of them, any set of which is built at once.

    A row holds up to ``seq_len`` consecutive pairs (token, next token). Within a document every
    pair is in exactly one row, so that one pass over the rows predicts every token but the first
    of each document exactly once.

    With ``packing`` the rows cut the whole stream: row ``r`` begins at token ``r * seq_len`` and
    only the last one is padded. A pair whose next token belongs to another document is there (it
    keeps the rows full) but masked out of the loss. Without ``packing`` each document begins a row
    of its own, is cut when it is longer than ``seq_len``, and its last row is padded.

    Raises:
      ValueError: there is nothing to predict.
    """

    def __init__(self, stream: TokenStream, seq_len: int, *, packing: bool = True):
        if stream.num_tokens - stream.num_documents < 1:
            raise ValueError(
                f"nothing to predict: {stream.num_documents} documents hold {stream.num_tokens} "
                "tokens together, expected a document of at least 2"
            )
        self.stream = stream
        self.seq_len = seq_len
        self.packing = packing
        if packing:
            ranges = np.asarray([0]), np.asarray([stream.num_tokens - 1])
        else:
            ranges = stream.offsets[:-1], stream.offsets[1:] - 1
        self._starts, self._stops = _cut(*ranges, seq_len)

    def __len__(self) -> int:
        return len(self._starts)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Builds the rows ``indices`` (rows,), each in [0, len(self)); -1 gives a row of padding.

        Returns:
          A dict of (rows, seq_len) arrays:
          ``tokens`` int32;
          ``targets`` int32, the token after each token;
          ``segment_ids`` int32: 1, 2, ... for the documents met in the row, 0 where padded;
          ``positions`` int32: from 0 on in each segment. A document that began in an earlier row
            starts again at 0, because the row cannot see that part of it;
          ``loss_mask`` float32: 0 where padded or where the target is of another document.
        """
        indices = np.asarray(indices, np.int64)
        starts = self._starts[indices]
        stops = np.where(indices < 0, starts, self._stops[indices])
        columns = np.arange(self.seq_len + 1)
        places = np.minimum(starts[:, None] + columns, self.stream.num_tokens - 1)
        window = self.stream.tokens[places].astype(np.int32)  # (rows, seq_len + 1)
        begins = self._document_starts(starts, stops)
        last_start = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
        positions = columns - last_start
        segment_ids = 1 + np.cumsum(begins, axis=1)
        valid = columns[:-1] < (stops - starts)[:, None]  # (rows, seq_len)
        return {
            "tokens": np.where(valid, window[:, :-1], np.int32(self.stream.pad_id)),
            "targets": np.where(valid, window[:, 1:], np.int32(self.stream.pad_id)),
            "positions": np.where(valid, positions[:, :-1], 0).astype(np.int32),
            "segment_ids": np.where(valid, segment_ids[:, :-1], 0).astype(np.int32),
            "loss_mask": (valid & ~begins[:, 1:]).astype(np.float32),
        }

    def _document_starts(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Returns (rows, seq_len + 1) bools: a document starts at this place of its row (> 0)."""
        offsets = self.stream.offsets
        first = np.searchsorted(offsets, starts, side="right")
        counts = np.searchsorted(offsets, stops, side="right") - first
        row = np.repeat(np.arange(len(starts)), counts)
        # 0, 1, ... within each row, shifted to the row's first document.
        document = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        begins = np.zeros((len(starts), self.seq_len + 1), bool)
        begins[row, offsets[document] - starts[row]] = True
        return begins


def _cut(starts: np.ndarray, stops: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each range [start, stop) into pieces of ``seq_len``; the last of each may be shorter."""
    counts = -(-(stops - starts) // seq_len)
    piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.repeat(starts, counts) + piece * seq_len
    return pieces, np.minimum(pieces + seq_len, np.repeat(stops, counts))
