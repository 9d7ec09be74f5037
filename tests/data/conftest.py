"""Fixtures of the data tests: a tokenizer small enough to read batches by eye."""

import numpy as np
import pytest

from jaxeff.data import Document, tokenize


class LetterTokenizer:
    """Ids 0..255 are the bytes; then begin, end and padding."""

    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258

    def encode(self, text):
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)


@pytest.fixture
def tokenizer():
    return LetterTokenizer()


@pytest.fixture
def make_stream(tokenizer):
    """Returns a function from byte strings to the stream of those documents."""

    def make(*texts):
        return tokenize([Document(f"doc{i}", t) for i, t in enumerate(texts)], tokenizer)

    return make


@pytest.fixture
def random_stream(make_stream):
    """A stream of 40 documents of 1 to 90 bytes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 90, size=40)
    return make_stream(*(rng.integers(0, 256, size=n).astype(np.uint8).tobytes() for n in sizes))
