"""Tokenizers: raw bytes, and local `tokenizer.json` files.

Every tokenizer offers `encode(text) -> int32 array`, `decode(ids) -> str`,
`decode_bytes(ids) -> bytes`, `vocab_size`, `bos_id`, `eos_id` and `pad_id`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

HUB_INSTALL = 'pip install "jaxeff[hub]"'
REPLACEMENT = "\ufffd"

# Names that published tokenizers give their special tokens, for files that come without a
# tokenizer_config.json; the first one that exists is taken.
_USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]"),
    "pad": ("<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
}


@runtime_checkable
class Tokenizer(Protocol):
    """What training data and generation ask of a tokenizer.

    `bos_id` and `eos_id` are None where the vocabulary has no such token, and `encode` then adds
    none; `pad_id` is always an id. Ids that stand for no text decode to nothing.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int

    def encode(
        self, text: str | bytes, *, add_bos: bool = False, add_eos: bool = False
    ) -> np.ndarray: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...


class ByteTokenizer:
    """Ids 0..255 are the bytes; 256 begins, 257 ends and 258 pads a sequence.

    Args:
      pad_to_multiple: round the vocabulary size up to a multiple of this, for hardware that likes
        round sizes; the extra ids mean nothing and decode to nothing.

    Raises:
      ValueError: `pad_to_multiple` is below 1.
    """

    bos_id = 256
    eos_id = 257
    pad_id = 258

    def __init__(self, pad_to_multiple: int = 1):
        if pad_to_multiple < 1:
            raise ValueError(f"pad_to_multiple={pad_to_multiple} must be at least 1")
        self.vocab_size = -(-259 // pad_to_multiple) * pad_to_multiple

    def encode(
        self, text: str | bytes, *, add_bos: bool = False, add_eos: bool = False
    ) -> np.ndarray:
        """Returns the bytes of `text` (strings as UTF-8) as an int32 vector."""
        raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
        ids = np.frombuffer(raw, np.uint8).astype(np.int32)
        return _surround(ids, self.bos_id if add_bos else None, self.eos_id if add_eos else None)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the bytes among `ids`; ids from 256 on are left out.

        Raises:
          ValueError: a negative id.
        """
        ids = _id_vector(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


class FileTokenizer:
    """A local `tokenizer.json`, read by the optional `tokenizers` package.

    Ids of the special tokens come from `tokenizer_config.json` or `special_tokens_map.json` beside
    the file; without them, from the usual names. A vocabulary without a padding token pads with
    `eos_id`, or 0. `adds_bos` tells whether the file's own template begins texts with `bos_id`.

    Args:
      path: the file, or the folder that holds it.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: the `tokenizers` package is missing.
      ValueError: the file is not a tokenizer.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer file at {path}")
        self._tokenizer = _read_tokenizer(path)
        self.path = path
        self.vocab_size = 1 + max(
            self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1
        )
        self.bos_id = self._special_id("bos")
        self.eos_id = self._special_id("eos")
        beginning = self._tokenizer.encode("", add_special_tokens=True).ids[:1]
        self.adds_bos = self.bos_id is not None and beginning == [self.bos_id]
        pad_id = self._special_id("pad")
        fallback = self.eos_id if self.eos_id is not None else 0
        self.pad_id = pad_id if pad_id is not None else fallback

    def _special_id(self, kind: str) -> int | None:
        declared = _declared_token(self.path.parent, f"{kind}_token")
        for name in (declared,) if declared is not None else _USUAL_NAMES[kind]:
            token_id = self._tokenizer.token_to_id(name)
            if token_id is not None:
                return token_id
        return None

    def encode(
        self, text: str | bytes, *, add_bos: bool = False, add_eos: bool = False
    ) -> np.ndarray:
        """Returns the ids of `text` (bytes are read as UTF-8) as an int32 vector."""
        if isinstance(text, bytes | bytearray):
            text = bytes(text).decode("utf-8", "replace")
        ids = np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        return _surround(ids, self.bos_id if add_bos else None, self.eos_id if add_eos else None)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; special tokens are left out."""
        return self._tokenizer.decode(_id_vector(ids).tolist(), skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the text of `ids` as UTF-8."""
        return self.decode(ids).encode("utf-8", "replace")


def load_tokenizer(spec: str | Path | Tokenizer) -> Tokenizer:
    """Returns the tokenizer that `spec` names.

    Args:
      spec: "bytes", the path of a `tokenizer.json` (or of its folder), or a tokenizer, returned as
        it is.

    Raises:
      FileNotFoundError: neither "bytes" nor an existing file.
      ImportError: the `tokenizers` package is missing.
    """
    if isinstance(spec, Tokenizer):
        return spec
    if spec == "bytes":
        return ByteTokenizer()
    if not Path(spec).exists():
        raise FileNotFoundError(
            f"tokenizer={str(spec)!r} is neither 'bytes' nor the path of a tokenizer.json"
        )
    return FileTokenizer(spec)


class StreamDecoder:
    """Turns ids into text one at a time, holding back characters that are not complete yet.

    The pieces returned by `push` and the last one by `finish` make up the decoded text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # a window that begins where a character begins
        self._emitted = 0  # characters of the window's text already returned
        self._context = 0  # ids of the window that are there for context only

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes, maybe empty."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids)
        held = _unsettled(text)
        piece = text[self._emitted : len(text) - held]
        self._emitted += len(piece)
        if piece and not held:
            # Some tokenizers drop the space before the first token: keep the last ids as context.
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._emitted = len(self._tokenizer.decode(self._ids))
        return piece

    def finish(self) -> str:
        """Returns what was held back, and begins anew."""
        piece = self._tokenizer.decode(self._ids)[self._emitted :]
        self._ids, self._emitted, self._context = [], 0, 0
        return piece


def _unsettled(text: str) -> int:
    """Counts the trailing replacement characters that more bytes may still turn into another.

    A UTF-8 character has at most four bytes, so at most three can be waiting for the rest.
    """
    trailing = len(text) - len(text.rstrip(REPLACEMENT))
    return min(trailing, 3)


def _id_vector(ids: Iterable[int]) -> np.ndarray:
    ids = ids if hasattr(ids, "__array__") else list(ids)
    ids = np.asarray(ids, np.int64).reshape(-1)
    if ids.size and ids.min() < 0:
        raise ValueError(f"ids hold {ids.min()}, expected none below 0")
    return ids


def _surround(ids: np.ndarray, first: int | None, last: int | None) -> np.ndarray:
    parts = [ids]
    if first is not None:
        parts.insert(0, np.asarray([first], np.int32))
    if last is not None:
        parts.append(np.asarray([last], np.int32))
    return np.concatenate(parts) if len(parts) > 1 else ids


def _read_tokenizer(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"reading {path} needs the tokenizers package: {HUB_INSTALL}") from error
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception on malformed files
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error


def _declared_token(folder: Path, key: str) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if not file.is_file():
            continue
        token = json.loads(file.read_text("utf-8")).get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return token
    return None
