"""The synthetic tasks against solvers that read token by token; positions, processes."""

import dataclasses
import json

import numpy as np
import pytest

from jaxeff.data.loader import DataStateError
from jaxeff.data.synthetic_sequences import (
    SyntheticSequenceConfig,
    SyntheticSequenceIterator,
    evaluation_batches,
    k_hop,
    keep_nth,
    mqar,
    parity,
)

CONFIG = SyntheticSequenceConfig(
    task="mqar", seq_len=12, batch_size=8, vocab_size=12, num_pairs=3, num_hops=2, n=4
)
KEYS = [(0, 0), (3, 1), (2**64 - 1, 7)]


def solve_parity(tokens):
    odd, answers = False, []
    for token in tokens:
        odd = odd != (token == 1)
        answers.append(1 if odd else 0)
    return answers


def solve_keep_nth(tokens, n):
    kept, answers = None, []
    for place, token in enumerate(tokens, start=1):
        kept = token if place == n else kept
        answers.append(kept)
    return answers


def solve_mqar(tokens, num_pairs):
    book, answers = {}, []
    for place, token in enumerate(tokens):
        if place < 2 * num_pairs:
            book |= {token: tokens[place + 1]} if place % 2 == 0 else {}
            answers.append(None)
        else:
            answers.append(book.get(token))
    return answers


def solve_k_hop(tokens, num_hops):
    def hop(place):
        """The place behind the last one before `place` with the same token."""
        for earlier in reversed(range(place)):
            if tokens[earlier] == tokens[place]:
                return earlier + 1
        return None

    answers = []
    for place in range(len(tokens)):
        for _ in range(num_hops):
            place = None if place is None else hop(place)
        answers.append(None if place is None else tokens[place])
    return answers


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "task, solver, settings",
    [
        (parity, solve_parity, {}),
        (keep_nth, solve_keep_nth, {"n": 1}),
        (keep_nth, solve_keep_nth, {"n": 5}),
        (mqar, solve_mqar, {"num_pairs": 2}),
        (mqar, solve_mqar, {"num_pairs": 6}),
        (k_hop, solve_k_hop, {"num_hops": 1}),
        (k_hop, solve_k_hop, {"num_hops": 2}),
        (k_hop, solve_k_hop, {"num_hops": 4}),
    ],
)
def test_targets_are_what_a_reader_of_the_sequence_answers(task, solver, settings, key):
    vocabulary = {} if task is parity else {"vocab_size": 13 if task is mqar else 5}
    batch = task(key, 20, 23, **vocabulary, **settings)
    assert all(x.shape == (20, 23) for x in batch.values())
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    assert batch["loss_mask"].dtype == np.float32
    for tokens, targets, mask in zip(*batch.values(), strict=True):
        answers = solver(tokens.tolist(), **settings)
        assert [a is not None for a in answers] == (mask == 1).tolist()
        assert [a or 0 for a in answers] == targets.tolist()


def test_recall_has_its_pairs_first_and_asks_for_each_key_once():
    batch = mqar((5, 5), 300, 15, vocab_size=20, num_pairs=4)
    keys, values = batch["tokens"][:, 0:8:2], batch["tokens"][:, 1:8:2]
    assert keys.max() < 10 and values.min() >= 10
    assert all(len(set(row)) == 4 for row in keys.tolist())
    for row in range(300):
        asked = batch["tokens"][row][batch["loss_mask"][row] > 0]
        assert sorted(asked) == sorted(keys[row])
        assert not set(batch["tokens"][row, 8:][batch["loss_mask"][row, 8:] == 0]) & set(keys[row])
    where = batch["loss_mask"].mean(axis=0)
    assert (where[:8] == 0).all() and np.allclose(where[8:], 4 / 7, atol=0.1)
    noise = batch["tokens"][:, 8:][batch["loss_mask"][:, 8:] == 0]
    assert len(np.unique(noise)) == 20


@pytest.mark.parametrize("task, size", [(parity, 2), (keep_nth, 7), (k_hop, 7)])
def test_tokens_are_uniform(task, size):
    settings = {} if task is parity else {"vocab_size": size}
    tokens = task((1, 2), 500, 20, **settings)["tokens"]
    np.testing.assert_allclose(np.bincount(tokens.ravel()) / tokens.size, 1 / size, atol=0.02)


def test_sequences_depend_on_the_key_alone():
    first, again, other = parity((1, 2), 4, 40), parity((1, 2), 4, 40), parity((1, 3), 4, 40)
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    assert (first["tokens"] != other["tokens"]).any()


def test_evaluation_is_the_same_in_every_run_and_fills_up_its_last_batch():
    batches = list(evaluation_batches(CONFIG, 20, 30))
    again = list(evaluation_batches(dataclasses.replace(CONFIG, seed=9), 20, 30))
    assert [int((b["loss_mask"].sum(1) > 0).sum()) for b in batches] == [8, 8, 4]
    for a, b in zip(batches, again, strict=True):
        assert a["tokens"].shape == (8, 30)
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    trained = {tuple(row) for b in range(50) for row in iterator().batch(b)["tokens"].tolist()}
    held = [row for b in evaluation_batches(CONFIG, 20, 12) for row in b["tokens"].tolist()]
    assert not trained & {tuple(row) for row in held if any(row)}


def iterator(config=CONFIG, seed=1, **shard):
    return SyntheticSequenceIterator(config, seed=seed, **shard)


def test_an_iterator_goes_on_exactly_where_another_stopped():
    first = iterator()
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = iterator()
    second.set_state(state)
    rest, expected = next(second), next(first)
    for name, value in expected.items():
        np.testing.assert_array_equal(value, rest[name])
    assert first.get_state() == second.get_state()


def test_a_position_in_other_data_is_refused():
    state = iterator().get_state()
    with pytest.raises(DataStateError, match=r"seed changed \(saved 1, now 2\)"):
        iterator(seed=2).set_state(state)
    with pytest.raises(DataStateError, match="num_pairs changed"):
        iterator(dataclasses.replace(CONFIG, num_pairs=2)).set_state(state)
    with pytest.raises(DataStateError, match="it has no step"):
        iterator().set_state({k: v for k, v in state.items() if k != "step"})


def test_processes_hold_the_parts_of_one_global_batch():
    whole = iterator().batch(5)
    parts = [iterator(process_index=p, process_count=4).batch(5) for p in range(4)]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "mqr"}, "task is 'mqr'; expected one of"),
        ({"seq_len": 0}, "seq_len is 0; expected at least 1"),
        ({"seq_len": 8}, "num_pairs is 3; expected 1 to 2: 8 tokens of 12"),
        ({"vocab_size": 4}, "num_pairs is 3; expected 1 to 2: 12 tokens of 4"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"task": "parity"}, "vocab_size is 12; expected 2"),
        ({"task": "keep_nth", "n": 13}, "n is 13; expected from 1 to .* 12"),
        ({"num_hops": 0}, "num_hops is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
