"""The row on BLEU at tiny sizes: what it compares agrees, and what it counts is right."""

import dataclasses
import functools
import logging
import math
import sys
import time

import jax
import numpy as np
import pytest

from jaxeff.bench.measure import BenchError, measure_case
from jaxeff.bench.rows import bleu, static_schedules
from jaxeff.bench.rows import bleu_baselines as baselines
from jaxeff.bench.rows import bleu_schedules as schedules
from pallas_kernels.ngram_counts import tpu as kernel

DEVICE = jax.devices()[0]
CELL = bleu.Bleu(
    batch_sizes=(3,), lengths=(16,), num_references=(2,), memory=False, schedule_chips=()
)


def figures_of(result):
    return {figure.name: figure.spread.median for figure in result.figures}


def test_a_cell_compares_with_both_packages_and_the_dictionary():
    (case,) = CELL.cases(DEVICE)
    result = measure_case(case, rounds=1)
    assert set(result.seconds) == {"sentence_bleu", "NLTK", "sacrebleu", "dictionary"}
    assert all(spread.median > 0 for spread in result.seconds.values())
    assert all(math.isfinite(value) for value in figures_of(result).values())


def test_host_times_of_some_sentences_are_scaled_to_the_batch_and_say_so():
    settings = dataclasses.replace(CELL, host_sentences=2)
    (case,) = settings.cases(DEVICE)
    names = [variant.name for variant in case.baselines]
    assert names[:2] == ["NLTK (from 2)", "sacrebleu (from 2)"]
    host = baselines.HostBaseline("slow", lambda index: time.sleep(0.002) or 0.0, sentences=2)
    assert host.timed(20).seconds >= 10 * 2 * 0.002


def test_a_dictionary_that_is_too_large_is_left_out_with_the_bytes_it_needs():
    settings = dataclasses.replace(CELL, dictionary_bytes=10)
    (case,) = settings.cases(DEVICE)
    assert len(case.baselines) == 2
    sizes = baselines.distinct_ngrams(*bleu.make_batch(3, 16, 2))
    needed = 3 * 3 * max(sizes) * 4  # candidates, a reference, and the largest so far
    assert figures_of(measure_case(case, 1))["dictionary, left out, needs"] == needed / 1e9


def test_a_cell_that_is_too_large_is_left_out_and_named(caplog):
    settings = dataclasses.replace(CELL, most_tokens=3 * 16 * 3 - 1)
    with caplog.at_level(logging.WARNING):
        assert not list(settings.cases(DEVICE))
    assert "3 x 16, R=2 is left out: 144 positions" in caplog.text


def test_without_libtpu_schedules_are_left_out_with_a_line(caplog, monkeypatch):
    monkeypatch.setattr(static_schedules.environment, "has_tpu_compiler", lambda: False)
    settings = bleu.Bleu(batch_sizes=(), memory=False)
    with caplog.at_level(logging.WARNING):
        assert not list(settings.cases(DEVICE))
    assert "static TPU schedules are left out" in caplog.text


@pytest.mark.parametrize("package", ["nltk", "sacrebleu"])
def test_without_a_package_the_extra_is_named(monkeypatch, package):
    for name in (package, "nltk.translate.bleu_score", "sacrebleu.metrics"):
        if name.startswith(package):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BenchError, match=rf"{package} is not installed: .*jaxeff\[test\]"):
        list(CELL.cases(DEVICE))


def test_scores_that_differ_are_not_timed(monkeypatch):
    other = functools.partial(bleu.sentence_bleu, weights=(0.5, 0.5), pad_id=None)
    monkeypatch.setattr(bleu, "_score", other)
    with pytest.raises(BenchError, match="scores differ from those of nltk"):
        list(CELL.cases(DEVICE))


def test_sentences_are_half_full_to_full_and_references_share_most_tokens():
    candidates, references = bleu.make_batch(64, 32, 2)
    for tokens in (candidates, references):
        lengths = (tokens >= 0).sum(-1)
        assert lengths.min() >= 16 and lengths.max() <= 32
        assert tokens[tokens >= 0].min() >= 1 and tokens.max() < bleu.VOCABULARY
    both = (candidates[:, None] >= 0) & (references >= 0)
    assert 0.75 < (candidates[:, None] == references)[both].mean() < 0.9


def test_the_dictionary_has_as_many_entries_as_there_are_distinct_ngrams():
    candidates, references = bleu.make_batch(5, 16, 2, vocabulary=6)
    for order, size in enumerate(baselines.distinct_ngrams(candidates, references), 1):
        rows = [row[row >= 0] for row in np.concatenate([candidates[:, None], references], 1)
                .reshape(-1, 16)]  # fmt: skip
        found = {tuple(row[i : i + order]) for row in rows for i in range(len(row) - order + 1)}
        assert size == len(found) + 1  # and one for padding


def test_memory_grows_with_the_batch_and_with_no_vocabulary(monkeypatch):
    monkeypatch.setattr(bleu, "MEMORY_BATCHES", (16, 128))
    monkeypatch.setattr(bleu, "MEMORY_LENGTH", 32)
    figures = figures_of(measure_case(bleu._memory_case(DEVICE), rounds=1))
    assert figures["growth from 16 to 128: sentence_bleu"] <= 9
    assert figures["growth from 16 to 128: dictionary"] > 15
    large, small = (figures[f"sentence_bleu, vocabulary {v}"] for v in ("151,936", "100"))
    assert large == small


def test_the_bound_counts_every_pair_once():
    # 128 sentences: 7 + 6 + .. + 0 earlier positions and 2 x 8 keys for each of 8 positions.
    pairs = 128 * (28 + 8 * 16)
    assert schedules.Cell(128, 8, 2).bound == pairs / 1024 * 9 / 4


def test_trips_of_full_sentences_cover_every_pass():
    # Two blocks of 128 sentences, four tiles of 32; passes of 16 keys.
    grid, tiles, *ranks, best_rounds, best = kernel.loop_trips(256, 128, 1, 128)
    assert (grid, tiles) == (2, 4)
    assert ranks[0] * ranks[1] == pytest.approx((0 + 2 + 4 + 6) / 4)
    assert ranks[2] * ranks[3] == 2
    assert best_rounds * best == 8
    # Pipeline steps without work leave the work as it is.
    assert kernel.loop_trips(256, 128, 1, 128, grid_trips=4)[:2] == [4, 2]


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize("num_references", [1, 2, 3])
@pytest.mark.parametrize("batch", [32, 256])
def test_there_are_trips_for_every_loop_of_the_compiled_kernel(tpu, batch, num_references):
    cell = schedules.Cell(batch, 64, num_references)
    report = schedules._compile(tpu, "v5e", cell, implementation="mosaic_tpu")
    compiled = report.kernel("ngram_counts").schedule
    trips = kernel.loop_trips(batch, 64, num_references, 64, grid_trips=compiled.grid_steps)
    assert len(trips) == len(compiled.loops)
    # A kernel cannot be faster than its comparisons.
    assert compiled.bundles_with(trips) > cell.bound


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize("length", [128, 512])
def test_the_kernel_takes_fewer_cycles_than_the_sort(tpu, length):
    found = schedules.schedule(tpu, "v5e", schedules.Cell(256, length, 1))
    assert found.kernel < found.sort
