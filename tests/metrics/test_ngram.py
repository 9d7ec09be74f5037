"""The n-gram baseline against the same model written with dictionaries, and as a distribution."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from jaxeff.data import DataConfig, Document, Windows, eval_batches, tokenize
from jaxeff.metrics.ngram import MISSING, contexts_in_rows, fit_ngram


class DictionaryModel:
    """Modified Kneser-Ney, one n-gram at a time.

    `documents` are lists of ids. `prob(context, w)` takes a tuple of at most `order` ids.
    """

    def __init__(self, documents, order, vocab_size):
        self.vocab_size = vocab_size
        # counts[k][context][w] of contexts of k tokens
        self.counts = [defaultdict(Counter) for _ in range(order + 1)]
        for document in documents:
            for i in range(1, len(document)):
                for k in range(min(i, order) + 1):
                    self.counts[k][tuple(document[i - k : i])][document[i]] += 1
        # variety[k][context][w]: different tokens found in front of context + w
        self.variety = [defaultdict(Counter) for _ in range(order)]
        for k in range(order):
            for context, followers in self.counts[k + 1].items():
                for w in followers:
                    self.variety[k][context[1:]][w] += 1

    def discount(self, table, count):
        number = Counter(c for followers in table.values() for c in followers.values())
        n = [number[i] for i in range(5)]
        if 0 in n[1:]:
            return 0.5
        y = n[1] / (n[1] + 2 * n[2])
        i = min(count, 3)
        return min(max(i - (i + 1) * y * n[i + 1] / n[i], 0.1), i)

    def chain(self, tables, context, w):
        """P(w | context) with tables for contexts of len(context), len(context) - 1, ... 0."""
        lower = self.chain(tables[1:], context[1:], w) if len(tables) > 1 else 1 / self.vocab_size
        followers = tables[0].get(context)
        if not followers:
            return lower
        freed = sum(self.discount(tables[0], c) for c in followers.values())
        kept = followers[w] - self.discount(tables[0], followers[w]) if w in followers else 0
        return (kept + freed * lower) / sum(followers.values())

    def prob(self, context, w):
        k = len(context)
        return self.chain([self.counts[k], *self.variety[:k][::-1]], tuple(context), w)


def markov_documents(seed, count=12, vocab_size=6, length=60):
    """Documents in which what comes next depends on the two tokens before."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(vocab_size, 0.3), size=(vocab_size, vocab_size))
    documents = []
    for _ in range(count):
        document = [0, 1]
        for _ in range(int(rng.integers(1, length))):
            document.append(int(rng.choice(vocab_size, p=table[document[-2], document[-1]])))
        documents.append(document)
    return documents


def flat(documents):
    return np.concatenate(documents), np.cumsum([0, *map(len, documents)])


def padded(contexts, order):
    rows = [[MISSING] * (order - len(c)) + list(c) for c in contexts]
    return np.array(rows, int).reshape(len(contexts), order)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("vocab_size", [6, 40])
def test_probabilities_are_those_of_the_dictionary_model(order, vocab_size):
    documents = markov_documents(seed=order)
    tokens, offsets = flat(documents)
    model = fit_ngram(tokens, order, vocab_size=vocab_size, offsets=offsets)
    slow = DictionaryModel(documents, order, vocab_size)
    rng = np.random.default_rng(1)
    contexts = [tuple(rng.integers(0, 7, size=rng.integers(order + 1)) % 6) for _ in range(300)]
    contexts += [tuple(d[max(0, i - order) : i]) for d in documents[:3] for i in range(len(d))]
    targets = rng.integers(0, vocab_size, size=len(contexts))
    expected = [math.log(slow.prob(c, w)) for c, w in zip(contexts, targets, strict=True)]
    actual = model.log_prob(padded(contexts, order), targets)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_probabilities_sum_to_one_after_any_context(order):
    tokens, offsets = flat(markov_documents(seed=3))
    model = fit_ngram(tokens, order, vocab_size=9, offsets=offsets)
    rng = np.random.default_rng(0)
    contexts = [tuple(rng.integers(0, 9, size=rng.integers(order + 1))) for _ in range(200)]
    every = np.repeat(padded(contexts, order)[:, None], 9, axis=1)
    probs = np.exp(model.log_prob(every, np.tile(np.arange(9), (200, 1))))
    assert np.all(probs > 0)
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-12)


def test_discounts_are_estimated_where_the_counts_allow_it():
    """Counts of 1, 2, 3, 4 occurring 4, 2, 1, 1 times: y = 4 / (4 + 2 * 2) = 1/2."""
    times = [1, 1, 1, 1, 2, 2, 3, 4]
    tokens = np.concatenate([[0], np.repeat(np.arange(8), times)])  # the first is no target
    (level,) = fit_ngram(tokens, 0, vocab_size=8)._by_count
    taken = np.array(times) - level.discounted
    np.testing.assert_allclose(taken[[0, 4, 6, 7]], [1 - 2 / 4, 2 - 1.5 / 2, 3 - 2, 3 - 2])


def test_counting_by_table_equals_counting_by_sorting():
    """Small vocabularies are counted in one table, large ones by sorting: the same numbers."""
    tokens = np.random.default_rng(0).integers(0, 5, size=3000)
    by_table = fit_ngram(tokens, 2, vocab_size=14)  # 14 ** 3 < 3000
    by_sorting = fit_ngram(tokens, 2, vocab_size=15)
    for a, b in zip(by_table._by_count, by_sorting._by_count, strict=True):
        np.testing.assert_array_equal(a.discounted, b.discounted)
        np.testing.assert_array_equal(a.totals, b.totals)


def test_a_longer_context_helps_where_the_text_depends_on_it():
    documents = markov_documents(seed=5, count=80)
    tokens, offsets = flat(documents[:60])
    contexts, targets = [], []
    for document in documents[60:]:
        contexts += [document[max(0, i - 2) : i] for i in range(1, len(document))]
        targets += document[1:]
    costs = []
    for order in (0, 1, 2):
        model = fit_ngram(tokens, order, vocab_size=6, offsets=offsets)
        short = padded([c[len(c) - min(len(c), order) :] for c in contexts], order)
        costs.append(-model.log_prob(short, np.array(targets)).mean())
    assert costs[0] > costs[1] > costs[2]


def test_no_context_reaches_into_another_document():
    documents = [[0, 1, 2], [3, 4]]
    tokens, offsets = flat(documents)
    model = fit_ngram(tokens, 2, vocab_size=5, offsets=offsets)
    slow = DictionaryModel(documents, 2, 5)
    assert (1, 2) not in slow.counts[2] and (2,) not in slow.counts[1]
    for context in ((1, 2), (2, 3), (2,), ()):
        for w in range(5):
            expected = math.log(slow.prob(context, w))
            assert model.log_prob(padded([context], 2), [w])[0] == pytest.approx(expected)


def test_contexts_in_rows_are_the_inputs_of_the_same_document():
    tokens = np.array([[10, 11, 12, 13, 14]])
    positions = np.array([[0, 1, 2, 0, 1]])
    assert contexts_in_rows(tokens, positions, 3).tolist() == [
        [[-1, -1, 10], [-1, 10, 11], [10, 11, 12], [-1, -1, 13], [-1, 13, 14]]
    ]
    assert contexts_in_rows(tokens[:, :1], positions[:, :1], 3).tolist() == [[[-1, -1, 10]]]
    assert contexts_in_rows(tokens, positions, 0).shape == (1, 5, 0)


class Bytes:
    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258

    def encode(self, text):
        return np.frombuffer(text, np.uint8).astype(np.int32)


@pytest.fixture
def streams():
    texts = [b"the cat sat on the mat", b"the dog ate the cat", b"a mat, a dog; the end", b"x"]
    return tuple(
        tokenize([Document("d", t) for t in half], Bytes()) for half in (texts[:2], texts[2:])
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seq_len", [3, 8, 100])
def test_bits_per_byte_scores_the_windows_a_decoder_sees(streams, seq_len, packing):
    train, heldout = streams
    model = fit_ngram(train.tokens, 2, vocab_size=259, offsets=train.offsets)
    documents = np.split(train.tokens.astype(int), train.offsets[1:-1])
    slow = DictionaryModel([d.tolist() for d in documents], 2, 259)
    config = DataConfig(seq_len=seq_len, batch_size=4, packing=packing)
    batches = eval_batches(heldout, config)
    bits = []
    for batch in batches:
        for row in range(4):
            tokens, targets = batch["tokens"][row].tolist(), batch["targets"][row].tolist()
            segments = batch["segment_ids"][row].tolist()
            for t in np.flatnonzero(batch["loss_mask"][row]):
                recent = [tokens[j] for j in (t - 1, t) if j >= 0 and segments[j] == segments[t]]
                bits.append(-math.log2(slow.prob(tuple(recent), targets[t])))
    assert len(bits) == heldout.num_tokens - heldout.num_documents
    assert model.bits_per_byte(batches) == pytest.approx(np.mean(bits), rel=1e-12)
    in_bytes = model.bits_per_byte(batches, batches.bytes_per_target)
    assert in_bytes == pytest.approx(np.sum(bits) / heldout.num_bytes, rel=1e-12)


def test_cutting_into_longer_windows_costs_less(streams):
    train, _ = streams
    model = fit_ngram(train.tokens, 2, vocab_size=259, offsets=train.offsets)
    costs = []
    for seq_len in (1, 2, 50):
        windows = Windows(train, seq_len)
        costs.append(model.bits_per_byte([windows.rows(np.arange(len(windows)))]))
    assert costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"order": -1}, "order is -1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": 2**22, "order": 2}, r"vocab_size=4194304 with order=2"),
        ({"vocab_size": 3}, r"tokens holds values from 0 to 3; expected \[0, 3\)"),
        ({"offsets": [0, 3]}, "offsets must increase from 0 to 4"),
        ({"offsets": [0, 3, 2, 4]}, "offsets must increase from 0 to 4"),
        ({"offsets": [0, 1, 2, 3, 4]}, "no token to predict"),
        ({"tokens": []}, "no token to predict"),
    ],
)
def test_fitting_refuses_what_cannot_work(arguments, complaint):
    arguments = {"tokens": [0, 1, 2, 3], "vocab_size": 4, **arguments}
    with pytest.raises(ValueError, match=complaint):
        fit_ngram(np.array(arguments.pop("tokens"), int), **arguments)


@pytest.mark.parametrize(
    ("contexts", "targets", "complaint"),
    [
        ([[0]], [1], r"contexts has shape \(1, 1\); expected \(1, 2\)"),
        ([[0, 4]], [1], r"contexts holds values from 0 to 4; expected \[-1, 4\)"),
        ([[0, 1]], [-1], r"targets holds values from -1 to -1; expected \[0, 4\)"),
        ([[0, MISSING]], [1], r"-1 \(no token\) to the right of a token"),
    ],
)
def test_asking_refuses_what_cannot_work(contexts, targets, complaint):
    model = fit_ngram(np.array([0, 1, 2, 3]), vocab_size=4)
    with pytest.raises(ValueError, match=complaint):
        model.log_prob(np.array(contexts), np.array(targets))


def test_scoring_nothing_is_refused():
    model = fit_ngram(np.array([0, 1, 2, 3]), vocab_size=4)
    with pytest.raises(ValueError, match="no target to score"):
        model.bits_per_byte([])


def test_a_document_shorter_than_the_order_can_be_fitted():
    model = fit_ngram(np.array([0, 1]), 3, vocab_size=2)
    probs = np.exp(model.log_prob(np.array([[MISSING, MISSING, 0], [0, 1, 0]]), np.array([1, 1])))
    assert probs[0] > 0.5 and 0 < probs[1] < 1
