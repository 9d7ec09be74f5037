"""Clipped n-gram counts: all implementations that run here, against dictionaries."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ngram_oracle import clipped_matches, ragged_batch

import pallas_kernels
from pallas_kernels import doors
from pallas_kernels.ngram_counts import mark_padding, ngram_counts, reference, tpu
from pallas_kernels.ngram_counts.fields import MOST_ORDERS, Fields


def tpu_kernel(candidates, references, *, max_order):
    sizes = tpu.BlockSizes(candidate_rows=8, key_rows=8)  # small programs compile fast
    return tpu.pairwise(
        candidates, references, max_order=max_order, block_sizes=sizes, interpret=True
    )


COUNTERS = {
    name: jax.jit(counter, static_argnames="max_order")
    for name, counter in {
        "pairwise": reference.pairwise,
        "sort": reference.sort,
        "tpu": tpu_kernel,
    }.items()
}
count = jax.jit(ngram_counts, static_argnames=("max_order", "pad_id", "method", "implementation"))

SHAPES = {
    "one token": (1, 1, 1, 1),
    "several references": (5, 40, 3, 30),
    "references much shorter": (3, 70, 1, 5),
    "references much longer": (3, 5, 2, 70),
    "more than one block of lanes": (130, 20, 1, 20),
    "candidates in chunks of lanes": (2, 100, 1, 90),
}


@pytest.fixture(params=COUNTERS)
def counter(request):
    return COUNTERS[request.param]


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_equal_those_of_dictionaries(counter, shape):
    batch, length, num_references, reference_length = SHAPES[shape]
    candidates, references = ragged_batch(0, batch, length, num_references, reference_length)
    counts = counter(candidates, references, max_order=4)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, clipped_matches(candidates, references, 4))


@pytest.mark.parametrize("max_order", [1, 2, 3, 5, 8])
def test_every_order_is_counted(counter, max_order):
    candidates, references = ragged_batch(1, 4, 30, 2, vocabulary=2)
    counts = counter(candidates, references, max_order=max_order)
    np.testing.assert_array_equal(counts, clipped_matches(candidates, references, max_order))


def test_counts_of_one_repeated_token_are_clipped_and_do_not_overflow(counter):
    # 600 agreeing keys are more than a packed counter of 8 bits holds.
    candidates = np.zeros((2, 600), np.int32)
    references = np.full((2, 2, 600), -1, np.int32)
    references[0, 0, :400] = references[0, 1, :500] = 0
    references[1, 0] = 0
    expected = [[500, 499, 498, 497], [600, 599, 598, 597]]
    np.testing.assert_array_equal(counter(candidates, references, max_order=4), expected)


def test_largest_ids_are_told_apart(counter):
    candidates, references = ragged_batch(2, 4, 20, 2, vocabulary=3, first_id=2**31 - 3)
    assert candidates.max() == 2**31 - 1
    counts = counter(candidates, references, max_order=4)
    np.testing.assert_array_equal(counts, clipped_matches(candidates, references, 4))


def test_the_best_single_reference_counts_and_not_their_sum(counter):
    candidates = np.array([[7, 7, 7, 7]], np.int32)
    references = np.array([[[7, 7, 1, 2], [7, 3, 7, 7]]], np.int32)
    np.testing.assert_array_equal(counter(candidates, references, max_order=2), [[3, 1]])


def test_no_ngram_reaches_from_one_sentence_into_the_next(counter):
    # Side by side the candidate and its reference, or the two references, would hold (1, 2).
    candidates = np.array([[3, 1, 2, 9], [8, 1, -1, -1]], np.int32)
    references = np.array([[[5, 1], [2, 6]], [[2, 1], [2, 8]]], np.int32)
    np.testing.assert_array_equal(counter(candidates, references, max_order=2), [[2, 0], [2, 0]])


def test_ngrams_with_padding_inside_are_not_counted(counter):
    candidates = np.array([[1, -1, 2, 3]], np.int32)
    references = np.array([[[1, -1, 2, 3]]], np.int32)
    np.testing.assert_array_equal(counter(candidates, references, max_order=3), [[3, 1, 0]])


@pytest.mark.parametrize("max_order", range(1, MOST_ORDERS + 1))
def test_packed_counters_hold_what_they_say(max_order):
    fields = Fields(max_order)
    packed = jnp.int32(0)
    for _ in range(fields.capacity):
        packed += jnp.int32(fields.increments[max_order])
    assert [int(count) for count in fields.unpack(packed)] == [fields.capacity] * max_order


# --- the door -------------------------------------------------------------------------------------


def test_the_package_exports_the_function():
    assert pallas_kernels.ngram_counts is ngram_counts


@pytest.mark.parametrize("method", ["auto", "sort", "pairwise"])
def test_methods_agree_with_padding_by_id_and_by_length(method):
    candidates, references = ragged_batch(3, 6, 12, 2)
    expected = clipped_matches(candidates, references, 4)
    by_id = count(candidates + 1, references + 1, method=method)
    np.testing.assert_array_equal(by_id, expected)
    by_length = count(
        np.maximum(candidates, 0),
        np.maximum(references, 0),
        candidate_lengths=(candidates >= 0).sum(-1),
        reference_lengths=(references >= 0).sum(-1),
        method=method,
    )
    np.testing.assert_array_equal(by_length, expected)
    negative = count(candidates, references, pad_id=None, method=method)
    np.testing.assert_array_equal(negative, expected)


def test_one_reference_needs_no_axis():
    candidates, references = ragged_batch(4, 6, 12)
    both = [count(candidates, r, pad_id=None) for r in (references, references[:, 0])]
    np.testing.assert_array_equal(*both)


def test_leading_axes_are_kept():
    candidates, references = ragged_batch(5, 6, 12, 2)
    flat = count(candidates, references, pad_id=None)
    folded = count(candidates.reshape(2, 3, 12), references.reshape(2, 3, 2, 12), pad_id=None)
    np.testing.assert_array_equal(folded, flat.reshape(2, 3, 4))
    one = count(candidates[0], references[0], pad_id=None)
    np.testing.assert_array_equal(one, flat[0])


@pytest.mark.parametrize(
    "shapes", [((0, 5), (0, 1, 5)), ((3, 0), (3, 1, 5)), ((3, 5), (3, 0, 5)), ((3, 5), (3, 1, 0))]
)
def test_nothing_to_count_is_counted_as_nothing(shapes):
    candidates, references = (jnp.ones(shape, jnp.int32) for shape in shapes)
    counts = ngram_counts(candidates, references, max_order=3)
    np.testing.assert_array_equal(counts, np.zeros((shapes[0][0], 3)))


def test_more_orders_than_the_kernels_serve_are_sorted():
    candidates, references = ragged_batch(6, 3, 30, vocabulary=1)
    counts = count(candidates, references, max_order=11, pad_id=None)
    np.testing.assert_array_equal(counts, clipped_matches(candidates, references, 11))


@pytest.mark.parametrize("method", ["sort", "pairwise"])
def test_jit_vmap_and_shards_count_the_same(method):
    candidates, references = ragged_batch(7, 16, 12, 2)
    counts = functools.partial(ngram_counts, pad_id=None, method=method)
    expected = clipped_matches(candidates, references, 4)
    np.testing.assert_array_equal(jax.jit(counts)(candidates, references), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(counts))(candidates, references), expected)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.NamedSharding(mesh, jax.P("data"))
    sharded = jax.jit(counts)(*jax.device_put((candidates, references), batch))
    assert sharded.sharding.spec[0] == "data"
    np.testing.assert_array_equal(sharded, expected)


def test_a_program_without_transfers_whose_size_does_not_grow_with_the_batch():
    def primitives(batch):
        arrays = [jnp.ones((batch, 20), jnp.int32), jnp.ones((batch, 4, 20), jnp.int32)]
        return re.findall(r" = ([a-z_0-9]+)", str(jax.make_jaxpr(ngram_counts)(*arrays)))

    assert primitives(4) == primitives(4096)
    assert "while" in primitives(4) or "scan" in primitives(4)
    assert not [name for name in primitives(4) if "callback" in name]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "pallas"}, "method='pallas' is not one of"),
        ({"implementation": "cuda"}, "implementation='cuda' is not one of"),
        ({"max_order": 0}, "max_order=0"),
        ({"candidates": jnp.ones((2, 5))}, "candidates has dtype float32"),
        ({"candidates": jnp.ones((2, 5), jnp.uint32)}, "candidates has dtype uint32"),
        ({"candidates": np.full((2, 5), 2**31)}, "candidates holds ids .* int32"),
        ({"references": np.ones((3, 1, 5), int)}, "references .* do not fit candidates"),
        ({"references": np.int32(1)}, "references is a scalar"),
        ({"candidate_lengths": np.ones(3, int)}, r"lengths of candidates have shape \(3,\)"),
        ({"reference_lengths": np.ones((2, 1))}, "lengths of references have dtype"),
    ],
)
def test_bad_input_is_named(changes, message):
    given = {"candidates": np.ones((2, 5), int), "references": np.ones((2, 1, 5), int)}
    with pytest.raises(ValueError, match=message):
        ngram_counts(**(given | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"implementation": "mosaic_tpu"}, "runs on TPU, and this program is traced for cpu"),
        ({"implementation": "triton"}, "jax-triton|runs on GPU"),
        ({"implementation": "mosaic_tpu", "method": "sort"}, "has no kernel"),
        ({"implementation": "mosaic_tpu", "max_order": 9}, "max_order=9 is more than 8"),
        ({"method": "pairwise", "max_order": 9}, "max_order=9 is more than 8"),
    ],
)
def test_a_named_implementation_that_cannot_serve_says_why(changes, message):
    # "pairwise" alone names none, so that it would fall back; it is the method that cannot.
    changes = {"implementation": "xla"} | changes
    with pytest.raises(NotImplementedError, match=message):
        ngram_counts(np.ones((2, 5), int), np.ones((2, 1, 5), int), **changes)


@pytest.mark.parametrize("rows", [12, 0, -8])
def test_impossible_blocks_are_refused(rows):
    with pytest.raises(ValueError, match=f"candidate_rows={rows}"):
        tpu.BlockSizes(candidate_rows=rows, key_rows=8)


def test_padding_is_marked_by_id_or_by_length():
    tokens = np.array([[5, 0, 7], [1, 2, -100]])
    np.testing.assert_array_equal(mark_padding(tokens), [[5, -1, 7], [1, 2, -100]])
    by_length = mark_padding(tokens, lengths=np.array([2, 3]))
    np.testing.assert_array_equal(by_length, [[5, 0, -1], [1, 2, -100]])


# --- kernels over batches and meshes --------------------------------------------------------------


@pytest.fixture(scope="module")
def over_batch():
    return doors.over_batch(functools.partial(tpu_kernel, max_order=4))


def test_a_kernel_is_vmapped_by_making_the_axis_part_of_the_batch(over_batch):
    candidates, references = ragged_batch(8, 12, 10)
    expected = clipped_matches(candidates, references, 4).reshape(3, 4, 4)
    folded = jax.jit(jax.vmap(over_batch))(
        candidates.reshape(3, 4, 10), references.reshape(3, 4, 1, 10)
    )
    np.testing.assert_array_equal(folded, expected)
    same = jax.jit(jax.vmap(over_batch, in_axes=(0, None)))(
        candidates.reshape(3, 4, 10), references[:4]
    )
    np.testing.assert_array_equal(same[0], expected[0])


@pytest.mark.parametrize("batch", [16, 10, 3])
def test_a_kernel_runs_on_every_device_of_the_set_mesh(over_batch, batch):
    candidates, references = ragged_batch(9, batch, 10)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        counts = jax.jit(over_batch)(candidates, references)
    np.testing.assert_array_equal(counts, clipped_matches(candidates, references, 4))


def test_a_kernel_inside_a_shard_map_sees_its_own_part(over_batch):
    candidates, references = ragged_batch(10, 16, 10)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(candidates, references):
        return jax.lax.psum(over_batch(candidates, references).sum(0), "data")

    specs = (jax.P("data"), jax.P("data"))
    # The interpreter of kernels does not know of varying axes.
    summed = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)
    np.testing.assert_array_equal(
        summed(candidates, references), clipped_matches(candidates, references, 4).sum(0)
    )


def test_weights_around_a_kernel_have_gradients(over_batch):
    candidates, references = ragged_batch(11, 4, 10)

    def weighted(weight):
        return weight * over_batch(candidates, references).sum().astype(jnp.float32)

    expected = clipped_matches(candidates, references, 4).sum()
    assert jax.jit(jax.grad(weighted))(2.0) == expected
