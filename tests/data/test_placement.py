"""Batches are placed on the devices ahead of their use, and the position is that of their use."""

import threading
import time

import jax
import numpy as np
import pytest

from jaxeff.data import DataConfig, make_train_iterator, prefetch_to_device

CONFIG = DataConfig(seq_len=16, batch_size=8)


@pytest.fixture
def batches(random_stream):
    with make_train_iterator(random_stream, CONFIG, seed=1) as iterator:
        yield iterator


def tokens_of(iterator, count):
    return [np.asarray(next(iterator)["tokens"]) for _ in range(count)]


def expected_tokens(stream, count):
    with make_train_iterator(stream, CONFIG, seed=1) as iterator:
        return tokens_of(iterator, count)


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_batches_are_the_same_and_on_the_devices(random_stream, batches, size):
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with prefetch_to_device(batches, lambda b: jax.device_put(b, sharding), size) as placed:
        batch = next(placed)
        assert batch["tokens"].sharding == sharding
        expected = expected_tokens(random_stream, 5)
        np.testing.assert_array_equal(batch["tokens"], expected[0])
        np.testing.assert_array_equal(tokens_of(placed, 4), expected[1:])


@pytest.mark.parametrize("size", [0, 2])
def test_the_state_is_that_of_the_batch_last_returned(random_stream, batches, size):
    expected = expected_tokens(random_stream, 8)
    with prefetch_to_device(batches, jax.device_put, size) as placed:
        assert placed.get_state()["step"] == 0
        tokens_of(placed, 3)
        state = placed.get_state()
        assert state["step"] == 3
        tokens_of(placed, 4)
        placed.set_state(state)
        assert placed.get_state() == state
        np.testing.assert_array_equal(tokens_of(placed, 5), expected[3:])


def test_placing_happens_while_the_step_runs(batches):
    def place(batch):
        time.sleep(0.02)
        return batch

    with prefetch_to_device(batches, place) as placed:
        next(placed)
        waited = placed.wait_seconds
        assert waited > 0
        for _ in range(10):
            time.sleep(0.04)  # the step
            next(placed)
        assert placed.wait_seconds - waited < 0.1


@pytest.mark.parametrize("size", [0, 2])
def test_a_failure_comes_out_of_next_and_loses_no_batch(random_stream, batches, size):
    calls = []

    def place(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise MemoryError("device full")
        return batch

    with prefetch_to_device(batches, place, size) as placed:
        first = tokens_of(placed, 1)
        with pytest.raises(MemoryError, match="device full"):
            next(placed)
        assert placed.get_state()["step"] == 1
        np.testing.assert_array_equal(
            first + tokens_of(placed, 3), expected_tokens(random_stream, 4)
        )


@pytest.mark.parametrize("size", [0, 2, 9])
def test_an_iterator_that_ends_stays_ended(size):
    placed = prefetch_to_device(iter(range(4)), lambda x: 10 * x, size)
    assert list(placed) == [0, 10, 20, 30]
    assert list(placed) == []
    assert placed.get_state() is None
    placed.close()


def test_close_joins_every_thread(batches):
    before = {t.name for t in threading.enumerate()}
    placed = prefetch_to_device(batches, lambda b: b)
    next(placed)
    placed.close()
    placed.close()
    names = {t.name for t in threading.enumerate()}
    assert not any(n.startswith(("jaxeff-place", "jaxeff-data")) for n in names - before)
    for use in (lambda: next(placed), lambda: placed.set_state({}), lambda: next(batches)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="size is -1"):
        prefetch_to_device(iter(()), jax.device_put, -1)
