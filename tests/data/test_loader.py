"""The order of the batches, its independence of everything but (seed, step), and the way back."""

import json
import threading
import time

import numpy as np
import pytest

from jaxeff.data import DataConfig, DataStateError, Windows, eval_batches, make_train_iterator
from jaxeff.data.loader import Shard, ShuffledRows, TrainIterator

CONFIG = DataConfig(seq_len=16, batch_size=8)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def train(stream, config=CONFIG, count=6, state=None, **kwargs):
    with make_train_iterator(stream, config, **{"seed": 1, **kwargs}) as iterator:
        if state is not None:
            iterator.set_state(state)
        return take(iterator, count)


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def tokens(batches):
    return np.stack([b["tokens"] for b in batches])


def join(parts):
    """Batches of several processes -> global batches."""
    return [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*parts)]


def data_threads():
    return [t for t in threading.enumerate() if t.name.startswith("jaxeff-data")]


class TestOrder:
    def test_batches_are_those_of_the_seed(self, random_stream):
        assert_equal(train(random_stream, seed=1), train(random_stream, seed=1))
        assert np.any(tokens(train(random_stream, seed=1)) != tokens(train(random_stream, seed=2)))

    def test_the_seed_of_the_config_wins_over_that_of_the_run(self, random_stream):
        config = DataConfig(seq_len=16, batch_size=8, seed=5)
        assert_equal(train(random_stream, config, seed=1), train(random_stream, seed=5))

    def test_the_order_is_fixed_for_ever(self):
        """Checkpoints name a place in this sequence, so it must not change between versions."""
        assert ShuffledRows(7, seed=3).entries(0, 14).tolist() == [
            *(6, 1, 5, 2, 4, 3, 0),
            *(3, 5, 6, 4, 0, 2, 1),
        ]

    def test_every_row_is_used_once_per_epoch_and_epochs_differ(self):
        order = ShuffledRows(50, seed=0)
        epochs = order.entries(0, 200).reshape(4, 50)
        assert all(sorted(e) == list(range(50)) for e in epochs.tolist())
        assert len({tuple(e) for e in epochs.tolist()}) == 4

    def test_a_batch_may_join_two_epochs_so_that_none_is_short(self, random_stream):
        windows = Windows(random_stream, 16)
        assert len(windows) % 8
        batches = train(random_stream, count=-(-2 * len(windows) // 8))
        used = np.concatenate(tokens(batches))[: 2 * len(windows)]
        every_row = windows.rows(np.arange(len(windows)))["tokens"]
        for epoch in (used[: len(windows)], used[len(windows) :]):
            assert sorted(epoch.tolist()) == sorted(every_row.tolist())

    def test_a_batch_may_be_larger_than_the_corpus(self, make_stream):
        stream = make_stream(b"abcdefgh")
        config = DataConfig(seq_len=4, batch_size=16)
        (batch,) = train(stream, config, count=1)
        assert batch["tokens"].shape == (16, 4)
        assert len({tuple(r) for r in batch["tokens"].tolist()}) == len(Windows(stream, 4))

    def test_every_training_token_is_predicted_once_per_epoch(self, random_stream):
        rows = len(Windows(random_stream, 16))
        config = DataConfig(seq_len=16, batch_size=rows)
        for batch in train(random_stream, config, count=2):
            predicted = batch["targets"][batch["loss_mask"] > 0]
            not_first = np.delete(random_stream.tokens, random_stream.offsets[:-1])
            assert sorted(predicted.tolist()) == sorted(not_first.tolist())

    @pytest.mark.parametrize("settings", [{"prefetch": 0}, {"prefetch": 9, "num_workers": 3}])
    def test_workers_and_prefetching_change_nothing(self, random_stream, settings):
        config = DataConfig(seq_len=16, batch_size=8, **settings)
        assert_equal(train(random_stream, config), train(random_stream))

    def test_documents_in_rows_of_their_own_are_shuffled_alike(self, random_stream):
        config = DataConfig(seq_len=16, batch_size=8, packing=False)
        windows = Windows(random_stream, 16, packing=False)
        expected = windows.rows(ShuffledRows(len(windows), seed=1).entries(0, 8))
        assert_equal(train(random_stream, config, count=1), [expected])


class TestProcesses:
    @pytest.mark.parametrize("count", [2, 4, 8])
    def test_the_global_batch_does_not_depend_on_their_number(self, random_stream, count):
        parts = [train(random_stream, process_index=i, process_count=count) for i in range(count)]
        assert parts[0][0]["tokens"].shape == (8 // count, 16)
        assert_equal(join(parts), train(random_stream))

    def test_a_run_may_continue_on_another_number_of_processes(self, random_stream):
        with make_train_iterator(
            random_stream, CONFIG, seed=1, process_index=1, process_count=2
        ) as iterator:
            take(iterator, 3)
            state = iterator.get_state()
        parts = [
            train(random_stream, count=3, state=state, process_index=i, process_count=4)
            for i in range(4)
        ]
        assert_equal(join(parts), train(random_stream)[3:])

    @pytest.mark.parametrize("make", [make_train_iterator, eval_batches])
    def test_a_batch_that_cannot_be_divided_is_refused(self, random_stream, make):
        seed = {"seed": 0} if make is make_train_iterator else {}
        with pytest.raises(ValueError, match=r"batch_size=8 .* process_count=3 "):
            make(random_stream, CONFIG, process_count=3, **seed)

    @pytest.mark.parametrize("index", [-1, 2])
    def test_a_process_that_does_not_exist_is_refused(self, index):
        with pytest.raises(ValueError, match=f"process_index is {index}; .*process_count=2"):
            Shard(8, index, 2)


class TestResume:
    @pytest.mark.parametrize("step", [0, 1, 5, 40])
    def test_a_saved_position_continues_exactly(self, random_stream, step):
        with make_train_iterator(random_stream, CONFIG, seed=1) as iterator:
            take(iterator, step)
            state = json.loads(json.dumps(iterator.get_state()))
            expected = take(iterator, 4)
        assert state["step"] == step
        assert_equal(train(random_stream, count=4, state=state), expected)

    def test_an_iterator_can_go_back_and_forth(self, random_stream):
        batches = train(random_stream, count=10)
        with make_train_iterator(random_stream, CONFIG, seed=1) as iterator:
            for step in (7, 2, 9, 0):
                iterator.seek(step)
                assert_equal([next(iterator)], [batches[step]])

    def test_a_position_far_away_is_reached_at_once(self, random_stream):
        with make_train_iterator(random_stream, CONFIG, seed=1) as iterator:
            started = time.perf_counter()
            iterator.set_state({**iterator.get_state(), "step": 10**12})
            next(iterator)
            assert time.perf_counter() - started < 1
            assert iterator.get_state()["step"] == 10**12 + 1

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"seed": 2}, r"the seed changed \(saved seed=1, now 2\)"),
            ({"batch_size": 16}, r"batch_size changed \(saved batch_size=8, now 16\)"),
            ({"seq_len": 8}, r"seq_len changed \(saved seq_len=16, now 8\)"),
            ({"packing": False}, r"packing changed \(saved packing=True, now False\)"),
        ],
    )
    def test_other_settings_are_refused_by_name(self, random_stream, settings, complaint):
        with make_train_iterator(random_stream, CONFIG, seed=1) as iterator:
            state = iterator.get_state()
        config = DataConfig(**{"seq_len": 16, "batch_size": 8, **settings})
        with pytest.raises(DataStateError, match=complaint):
            train(random_stream, config, state=state)

    def test_a_changed_corpus_is_refused_but_can_be_entered_on_purpose(self, make_stream):
        old, new = make_stream(b"old " * 50), make_stream(b"new " * 50)
        with make_train_iterator(old, CONFIG, seed=1) as iterator:
            take(iterator, 3)
            state = iterator.get_state()
        with make_train_iterator(new, CONFIG, seed=1) as iterator:
            with pytest.raises(DataStateError, match=r"step 3 .* corpus or the tokenizer changed"):
                iterator.set_state(state)
            iterator.seek(state["step"])
            assert_equal([next(iterator)], train(new, count=4)[3:])

    def test_an_incomplete_state_is_refused(self, random_stream):
        with pytest.raises(DataStateError, match="has no fingerprint, batch_size, seq_len"):
            train(random_stream, state={"step": 3, "seed": 1, "packing": True})


class TestBackground:
    def slow_iterator(self, stream, build_seconds, prefetch=4):
        windows = Windows(stream, 16)
        rows = windows.rows

        def slow_rows(indices):
            time.sleep(build_seconds)
            return rows(indices)

        windows.rows = slow_rows
        return TrainIterator(windows, Shard(8), seed=1, prefetch=prefetch)

    def test_the_step_does_not_wait_for_batches_that_build_faster_than_it_runs(self, random_stream):
        with self.slow_iterator(random_stream, 0.02) as iterator:
            next(iterator)
            waited = iterator.wait_seconds
            for _ in range(10):
                time.sleep(0.04)  # the step
                next(iterator)
            assert iterator.wait_seconds - waited < 0.1

    def test_waiting_is_measured(self, random_stream):
        with self.slow_iterator(random_stream, 0.02, prefetch=0) as iterator:
            assert iterator.wait_seconds == 0
            take(iterator, 5)
            assert 0.1 <= iterator.wait_seconds < 0.5

    def test_a_failure_comes_out_of_next_with_its_step_and_cause(self, random_stream):
        windows = Windows(random_stream, 16)
        rows, broken = windows.rows, threading.Event()

        def failing_rows(indices):
            if broken.is_set():
                raise OSError("disk gone")
            return rows(indices)

        windows.rows = failing_rows
        with TrainIterator(windows, Shard(8), seed=1, prefetch=1) as iterator:
            next(iterator)
            broken.set()
            with pytest.raises(RuntimeError, match=r"batch of step [12] failed: disk gone") as e:
                take(iterator, 2)
            assert isinstance(e.value.__cause__, OSError)
            broken.clear()
            step = iterator.step
            iterator.seek(step)
            assert_equal([next(iterator)], train(random_stream, count=step + 1)[step:])

    def test_close_joins_the_threads(self, random_stream):
        before = len(data_threads())
        config = DataConfig(seq_len=16, batch_size=8, num_workers=3)
        iterator = make_train_iterator(random_stream, config, seed=1)
        take(iterator, 3)
        assert len(data_threads()) > before
        iterator.close()
        iterator.close()
        assert len(data_threads()) == before
        with pytest.raises(ValueError, match="closed"):
            next(iterator)
        with pytest.raises(ValueError, match="closed"):
            iterator.seek(0)


class TestBadInput:
    def test_a_sequence_longer_than_the_corpus_is_refused(self, make_stream):
        stream = make_stream(b"abc", b"defgh")
        train(stream, DataConfig(seq_len=11, batch_size=2), count=1)
        with pytest.raises(ValueError, match=r"seq_len=12 is longer .* 13 tokens and there are 12"):
            make_train_iterator(stream, DataConfig(seq_len=12, batch_size=2), seed=0)

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_a_seed_out_of_range_is_refused(self, random_stream, seed):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            make_train_iterator(random_stream, CONFIG, seed=seed)


class TestEvaluation:
    def test_every_heldout_token_is_predicted_once_and_shapes_are_static(self, random_stream):
        batches = list(eval_batches(random_stream, CONFIG))
        assert {b["tokens"].shape for b in batches} == {(8, 16)}
        mask = np.stack([b["loss_mask"] for b in batches])
        targets = np.stack([b["targets"] for b in batches])
        not_first = np.delete(random_stream.tokens, random_stream.offsets[:-1])
        assert targets[mask > 0].tolist() == not_first.tolist()
        assert len(Windows(random_stream, 16)) % 8, "the last batch should be a partial one here"
        assert not mask[-1][len(Windows(random_stream, 16)) % 8 :].any()

    def test_it_can_be_repeated(self, random_stream):
        batches = eval_batches(random_stream, CONFIG)
        assert len(batches) == len(list(batches))
        assert_equal(list(batches), list(batches))

    @pytest.mark.parametrize("count", [2, 4])
    def test_processes_hold_the_parts_of_the_same_batches(self, random_stream, count):
        parts = [
            list(eval_batches(random_stream, CONFIG, process_index=i, process_count=count))
            for i in range(count)
        ]
        assert_equal(join(parts), list(eval_batches(random_stream, CONFIG)))

    def test_a_limited_number_of_batches_is_spread_over_the_text(self, random_stream):
        config = DataConfig(seq_len=16, batch_size=8, eval_batches=2, eval_batch_size=4)
        batches = list(eval_batches(random_stream, config))
        windows = Windows(random_stream, 16)
        expected = windows.rows(np.arange(8) * len(windows) // 8)
        np.testing.assert_array_equal(np.concatenate(tokens(batches)), expected["tokens"])

    def test_more_batches_than_there_are_means_all(self, random_stream):
        config = DataConfig(seq_len=16, batch_size=8, eval_batches=10**6)
        assert_equal(
            list(eval_batches(random_stream, config)), list(eval_batches(random_stream, CONFIG))
        )

    def test_a_text_shorter_than_a_row_is_padded(self, make_stream):
        (batch,) = eval_batches(make_stream(b"abc"), CONFIG)
        assert batch["tokens"].shape == (8, 16)
        assert batch["loss_mask"].sum() == 4

    def test_bytes_per_target_is_that_of_the_stream(self, make_stream):
        assert eval_batches(make_stream(b"abc", b"de"), CONFIG).bytes_per_target == 5 / 7

    def test_evaluating_without_heldout_documents_is_refused(self, make_stream):
        config = DataConfig(heldout_fraction=0.0)
        with pytest.raises(ValueError, match=r"no held-out documents .* heldout_fraction is 0.0"):
            eval_batches(make_stream(), config)
