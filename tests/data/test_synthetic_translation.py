"""The synthetic language: translations, the held-out split, positions, processes."""

import dataclasses
import json

import numpy as np
import pytest

from jaxeff.data.loader import DataStateError
from jaxeff.data.synthetic_translation import (
    FIRST_WORD_ID,
    PAD_ID,
    SEPARATOR_ID,
    Language,
    TranslationConfig,
    TranslationIterator,
    heldout_batches,
)

CONFIG = TranslationConfig(
    num_words=6, min_length=2, max_length=5, batch_size=8, heldout_sentences=20
)


def sources(batch):
    return {
        tuple(row[:n].tolist())
        for row, n in zip(batch["prompts"], batch["lengths"], strict=True)
        if n
    }


def batch_of(steps=1, **changes):
    iterator = TranslationIterator(dataclasses.replace(CONFIG, **changes), seed=3)
    return [next(iterator) for _ in range(steps)][-1]


def test_a_batch_is_sources_in_a_field_of_one_width_then_the_separator():
    batch = batch_of(4)
    prompts, lengths = batch["prompts"], batch["lengths"]
    assert prompts.shape == (8, 6) and prompts.dtype == np.int32
    assert (prompts[:, -1] == SEPARATOR_ID).all()
    real = np.arange(5) < lengths[:, None]
    assert (prompts[:, :-1][real] >= FIRST_WORD_ID).all()
    assert (prompts[:, :-1][~real] == PAD_ID).all()
    assert ((batch["references"] >= FIRST_WORD_ID) == real).all()
    assert lengths.min() >= 2 and lengths.max() <= 5


def test_copies_are_copies_and_translations_are_a_permutation_of_the_words():
    copied = batch_of(mapping="copy")
    np.testing.assert_array_equal(copied["references"], copied["prompts"][:, :-1])
    pairs = set()
    for step in range(1, 9):
        batch = batch_of(step, mapping="translate")
        pairs |= set(zip(batch["prompts"][:, :-1].flat, batch["references"].flat, strict=True))
    words = [pair for pair in pairs if pair != (PAD_ID, PAD_ID)]
    assert len(words) == len({a for a, _ in words}) == len({b for _, b in words}) == 6


@pytest.mark.parametrize(
    "order, expected",
    [("same", [3, 4, 5, 6, 7]), ("reverse", [7, 6, 5, 4, 3]), ("swap_pairs", [4, 3, 6, 5, 7])],
)
def test_words_change_places(order, expected):
    language = Language(dataclasses.replace(CONFIG, mapping="copy", order=order))
    words = np.array([[3, 4, 5, 6, 7], [3, 4, 0, 0, 0]], np.int32)
    translated = language.translate(words, np.array([5, 2]))
    np.testing.assert_array_equal(translated[0], expected)
    np.testing.assert_array_equal(
        translated[1], [3, 4, 0, 0, 0] if order == "same" else [4, 3, 0, 0, 0]
    )


def test_no_sentence_is_both_trained_on_and_held_out():
    trained = set().union(*(sources(batch_of(step)) for step in range(1, 40)))
    heldout = [sources(batch) for batch in heldout_batches(CONFIG)]
    assert len(set().union(*heldout)) == sum(map(len, heldout)) == 20
    assert not trained & set().union(*heldout)
    again = [sources(batch) for batch in heldout_batches(dataclasses.replace(CONFIG, seed=9))]
    assert again == heldout


def test_the_last_heldout_batch_is_filled_up_with_empty_rows():
    batches = list(heldout_batches(CONFIG))
    assert [np.count_nonzero(batch["lengths"]) for batch in batches] == [8, 8, 4]
    assert all(batch["prompts"].shape == (8, 6) for batch in batches)


def test_frequencies_follow_zipfs_law():
    config = dataclasses.replace(CONFIG, batch_size=4096, max_length=5, mapping="copy")
    batch = next(TranslationIterator(config, seed=0))
    words = batch["references"][batch["references"] != PAD_ID]
    shares = np.bincount(words - FIRST_WORD_ID) / len(words)
    expected = 1 / np.arange(1, 7)
    # Held-out sentences are not drawn, so the shares are not exactly the law's.
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.02)


def test_an_iterator_goes_on_exactly_where_another_stopped():
    first = TranslationIterator(CONFIG, seed=1)
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = TranslationIterator(CONFIG, seed=1)
    second.set_state(state)
    for name, value in next(first).items():
        np.testing.assert_array_equal(value, second.batch(3)[name])
    assert second.get_state() == state


def test_a_position_in_other_data_is_refused():
    state = TranslationIterator(CONFIG, seed=1).get_state()
    with pytest.raises(DataStateError, match=r"seed changed \(saved 1, now 2\)"):
        TranslationIterator(CONFIG, seed=2).set_state(state)
    with pytest.raises(DataStateError, match="max_length changed"):
        TranslationIterator(dataclasses.replace(CONFIG, max_length=4), seed=1).set_state(state)


def test_processes_hold_the_parts_of_one_global_batch():
    whole = TranslationIterator(CONFIG, seed=1).batch(5)
    parts = [
        TranslationIterator(CONFIG, seed=1, process_index=p, process_count=4).batch(5)
        for p in range(4)
    ]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_words": 0}, "num_words is 0"),
        ({"max_length": 1}, "max_length is 1; expected >= 2"),
        ({"mapping": "guess"}, "mapping is 'guess'"),
        ({"order": "up"}, "order is 'up'"),
        ({"zipf_exponent": -1.0}, "zipf_exponent is -1.0"),
        ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_language_with_too_few_heldout_sentences_says_so():
    small = dataclasses.replace(CONFIG, num_words=2, max_length=2, heldout_sentences=20)
    with pytest.raises(ValueError, match="only 0 of 80 held-out sentences met"):
        list(heldout_batches(small))
