"""BLEU one sentence at a time: ragged batches, dictionaries, NLTK and sacrebleu on token ids."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from nltk.translate import bleu_score as nltk_bleu
from sacrebleu.metrics import BLEU

from jaxeff.metrics.bleu import BleuAccumulator, bleu_from_statistics, pack_sentences

GOLDEN = Path(__file__).parents[1] / "golden" / "tensorbleu"
NLTK_METHODS = tuple(f"nltk{i}" for i in range(8))
SACREBLEU_METHODS = ("none", "floor", "add-k", "exp")
ORDERS = 5  # methods 5 and 7 need them

# One padded shape, so that thousands of sentences are a handful of compilations.
ROWS, LENGTH, REFERENCES, REFERENCE_LENGTH = 6, 12, 4, 14

LARGEST = 2**31 - 1
VOCABULARIES = ((0, 1), (3, 1, 4, 2), (LARGEST, LARGEST - 1, 0), tuple(range(40)))

repeatable = functools.partial(settings, deadline=None, derandomize=True)


class Batch(NamedTuple):
    """Ragged: `candidates[i]` is a list of ids, `references[i]` a list of such lists."""

    candidates: list
    references: list

    def arrays(self, **changes) -> dict:
        """The arguments of the functions under test, padded to one shape."""
        candidates = pack_sentences(self.candidates, length=LENGTH)
        rows = [row + [[]] * (REFERENCES - len(row)) for row in self.references]
        references = pack_sentences(rows, length=REFERENCE_LENGTH)
        return {
            "candidates": candidates.tokens,
            "references": references.tokens,
            "candidate_lengths": candidates.lengths,
            "reference_lengths": references.lengths,
        } | changes


@st.composite
def batches(draw, vocabularies=VOCABULARIES):
    """Lengths from 0, absent references, rows of padding, copies with few changes, repeats."""
    vocabulary = draw(st.sampled_from(vocabularies))
    rows = [draw(_rows(vocabulary)) for _ in range(ROWS)]
    return Batch(*map(list, zip(*rows, strict=True)))


@st.composite
def _rows(draw, vocabulary):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = draw(st.integers(0, LENGTH))
    # Around the candidate's length, so that ties in the closest one are frequent.
    offsets = st.sampled_from((0, 1, -1, 2, -2, 5, -5, -REFERENCE_LENGTH))
    lengths = [length + offset for offset in draw(st.lists(offsets, min_size=1, max_size=4))]
    kind = draw(st.sampled_from(("random", "copy", "one token")))
    pattern = random.choice(vocabulary, size=REFERENCE_LENGTH)
    if kind == "one token":
        pattern[:] = vocabulary[0]

    def sentence(length):
        ids = pattern.copy()
        if kind == "random":
            ids = random.choice(vocabulary, size=REFERENCE_LENGTH)
        elif kind == "copy":
            ids[random.integers(REFERENCE_LENGTH)] = random.choice(vocabulary)
        return ids[: max(0, min(length, REFERENCE_LENGTH))].tolist()

    return sentence(length), [sentence(n) for n in lengths]


def present(references):
    return [reference for reference in references if reference]


def oracle_statistics(batch: Batch, max_order: int) -> dict:
    """The fields of `BleuStats`, counted with dictionaries."""
    orders = range(1, max_order + 1)
    pairs = list(zip(batch.candidates, map(present, batch.references), strict=True))
    return {
        "numerators": [[_matches(c, refs, n) for n in orders] for c, refs in pairs],
        "denominators": [[max(len(c) - n + 1, 0) for n in orders] for c, _ in pairs],
        "candidate_length": [len(c) for c, _ in pairs],
        "reference_length": [
            min(map(len, refs), key=lambda n: (abs(n - len(c)), n), default=0) for c, refs in pairs
        ],
    }


def _matches(candidate, references, n):
    most = Counter()
    for reference in references:
        most |= _ngrams(reference, n)
    return sum((_ngrams(candidate, n) & most).values())


def _ngrams(tokens, n):
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def assert_statistics_equal(stats, expected: dict):
    for field, values in expected.items():
        found = getattr(stats, field)
        assert found.dtype == np.int32, field
        np.testing.assert_array_equal(found, values, err_msg=field)


def golden_cases():
    return sorted(path.stem for path in GOLDEN.glob("*.npz"))


def load_golden(case):
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        return dict(arrays)


@jax.jit
def nltk_scores(stats, weights):
    """Our scores for each of NLTK's methods: of the sentences, and of them as a corpus."""
    corpus = BleuAccumulator.empty(ORDERS).update(stats)
    return {
        method: (
            bleu_from_statistics(stats, weights=weights, smoothing=method),
            corpus.compute(weights=weights, smoothing=method, corpus_parity="nltk"),
        )
        for method in NLTK_METHODS
    }


@functools.partial(jax.jit, static_argnames="max_order")
def sacrebleu_scores(stats, max_order):
    """Our scores for each (smoothing, effective_order) of sacrebleu's, the same."""
    corpus = BleuAccumulator.empty(ORDERS).update(stats)
    options = {"weights": (1 / max_order,) * max_order, "convention": "sacrebleu"}
    return {
        (method, effective): (
            bleu_from_statistics(stats, smoothing=method, effective_order=effective, **options),
            corpus.compute(smoothing=method, effective_order=effective, **options),
        )
        for method in SACREBLEU_METHODS
        for effective in (False, True)
    }


def nltk_sentences(batch, weights, method, **parameters):
    """NLTK's score of each sentence for each of the weight vectors, (B, K)."""
    return np.array([
        nltk_corpus(Batch([c], [refs]), weights, method, **parameters)
        for c, refs in zip(batch.candidates, batch.references, strict=True)
    ])  # fmt: skip


def nltk_corpus(batch, weights, method, **parameters):
    """NLTK's score for each weight vector, (K,): NaN where it raises.

    It knows no sentence without a reference; such a one scores 0.
    """
    references = list(map(present, batch.references))
    if not all(references):
        return np.zeros(len(weights))
    smoothing = getattr(nltk_bleu.SmoothingFunction(**parameters), method.replace("nltk", "method"))
    vectors = [tuple(map(float, w)) for w in weights]
    try:
        scores = nltk_bleu.corpus_bleu(references, batch.candidates, vectors, smoothing)
    except (AssertionError, IndexError):
        scores = np.nan
    return np.broadcast_to(np.float64(scores), (len(weights),))


def sacrebleu_sentences(batch, method, effective_order, max_order=4, value=None):
    return np.array([
        sacrebleu_corpus(Batch([c], [refs]), method, effective_order, max_order, value)
        for c, refs in zip(batch.candidates, batch.references, strict=True)
    ])  # fmt: skip


def sacrebleu_corpus(batch, method, effective_order, max_order=4, value=None):
    """sacrebleu's score / 100; through its corpus score, which does not warn at one sentence."""
    references = list(map(present, batch.references))
    if not all(references):
        return 0.0
    metric = BLEU(
        tokenize="none",
        force=True,
        smooth_method=method,
        smooth_value=value,
        effective_order=effective_order,
        max_ngram_order=max_order,
    )
    most = max(map(len, references))
    streams = [[_text(row[k]) if k < len(row) else None for row in references] for k in range(most)]
    return metric.corpus_score(list(map(_text, batch.candidates)), streams).score / 100


def _text(ids):
    return " ".join(map(str, ids))
