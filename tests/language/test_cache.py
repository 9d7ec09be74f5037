"""The key/value cache as a data structure: where things are written, kept and moved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import RULES, make_mesh, params_of, tiny, tokens_of
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxeff.language import Decoder, KVCache, init_cache
from jaxeff.language.cache import compact, concat_spans, roll_back, slice_span, write

LAYERS, BATCH, HEADS, DIM = 2, 3, 2, 4


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """Writing takes another way on TPU; both must do the same."""
    monkeypatch.setattr("jaxeff.language.cache.target_platform", lambda: request.param)


def fresh_write():
    """`write` under a jit that remembers no other platform."""
    return jax.jit(lambda *args: write(*args))


def empty(capacity=8):
    shape = (LAYERS, BATCH, capacity, HEADS, DIM)
    return KVCache(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(BATCH, jnp.int32))


def numbered(length, start=1):
    """Keys that tell the row and the token they belong to: 100 row + start + token."""
    token = start + jnp.arange(length) + 100 * jnp.arange(BATCH)[:, None]
    return (
        jnp.broadcast_to(token[None, :, :, None, None], (LAYERS, BATCH, length, HEADS, DIM)) * 1.0
    )


def rows(cache):
    """The token numbers stored in every row of the first layer."""
    return np.asarray(cache.k[0, :, :, 0, 0])


def test_init_takes_shapes_and_dtype_from_the_config():
    config = tiny(head_dim=10, dtype="bfloat16")
    cache = init_cache(config, batch=2, capacity=5)
    assert cache.k.shape == cache.v.shape == (3, 2, 5, 2, 10)
    assert cache.k.dtype == jnp.bfloat16 and cache.lengths.dtype == jnp.int32
    assert init_cache(config, 2, 5, "float32").k.dtype == jnp.float32
    assert cache.capacity == 5


def test_write_appends_behind_each_rows_length(platform):
    cache = empty().replace(lengths=jnp.asarray([0, 2, 5]))
    cache = write(cache, numbered(2), 10 * numbered(2))
    expected = np.zeros((BATCH, 8))
    expected[0, 0:2], expected[1, 2:4], expected[2, 5:7] = [1, 2], [101, 102], [201, 202]
    np.testing.assert_array_equal(rows(cache), expected)
    np.testing.assert_array_equal(cache.v, 10 * cache.k)
    np.testing.assert_array_equal(cache.lengths, [2, 4, 7])


def test_overflow_raises_when_lengths_are_known_and_is_flagged_when_they_are_not(platform):
    cache = empty(4).replace(lengths=jnp.asarray([0, 2, 3]))
    with pytest.raises(ValueError, match="2 new tokens after length 3 exceed"):
        write(cache, numbered(2), numbered(2))
    with pytest.raises(ValueError, match="5 new tokens exceed"):
        fresh_write()(cache, numbered(5), numbered(5))
    written = fresh_write()(cache, numbered(2), numbered(2))
    np.testing.assert_array_equal(written.overflow, [False, False, True])
    np.testing.assert_array_equal(rows(written)[2], [0, 0, 0, 201])  # nothing wrapped around
    np.testing.assert_array_equal(roll_back(written, jnp.asarray([2, 4, 4])).overflow, False)


def test_rows_that_are_full_already_stay_as_they_are(platform):
    cache = write(empty(4), numbered(4), numbered(4)).replace(lengths=jnp.asarray([4, 9, 2]))
    for length in (1, 3):
        after = fresh_write()(cache, numbered(length, 50), numbered(length, 50))
        np.testing.assert_array_equal(rows(after)[:2], rows(cache)[:2])
        np.testing.assert_array_equal(
            rows(after)[2, 2:], [250, 251][:length] + [204] * (2 - length)
        )


def test_a_sharded_cache_is_written_in_place_by_its_owners(platform):
    cache = init_cache(tiny(num_kv_heads=4), 4, 8).replace(lengths=jnp.asarray([0, 3, 7, 8]))
    new = jax.random.normal(jax.random.key(0), (3, 4, 1, 4, 8))
    expected = fresh_write()(cache, new, -new)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spec = PartitionSpec(None, ("data", "fsdp"), None, "tensor")
    placed = cache.replace(
        **jax.device_put({"k": cache.k, "v": cache.v}, NamedSharding(mesh, spec))
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        compiled = fresh_write().lower(placed, new, -new).compile()
        found = compiled(placed, new, -new)
    np.testing.assert_array_equal(found.k, expected.k)
    np.testing.assert_array_equal(found.v, expected.v)
    assert "all-gather" not in compiled.as_text()


def test_roll_back_forgets_but_never_invents():
    cache = write(empty(), numbered(5), numbered(5))
    cache = roll_back(cache, jnp.asarray([2, 5, 7]))
    np.testing.assert_array_equal(cache.lengths, [2, 5, 5])
    again = write(cache, numbered(1, start=9), numbered(1, start=9))
    np.testing.assert_array_equal(rows(again)[:, :6], [
        [1, 2, 9, 4, 5, 0], [101, 102, 103, 104, 105, 109], [201, 202, 203, 204, 205, 209]
    ])  # fmt: skip


def test_compact_moves_accepted_slots_to_the_front_of_the_span():
    cache = write(empty(), numbered(7), numbered(7))
    start = jnp.asarray([2, 0, 3])
    accepted = jnp.asarray([[0, 2, 4], [1, 3, 0], [0, 0, 0]])
    out = jax.jit(compact)(cache, start, accepted, jnp.asarray([3, 2, 0]))
    np.testing.assert_array_equal(out.lengths, [5, 2, 3])
    np.testing.assert_array_equal(rows(out)[0, :5], [1, 2, 3, 5, 7])
    np.testing.assert_array_equal(rows(out)[1, :2], [102, 104])
    np.testing.assert_array_equal(rows(out)[2], rows(cache)[2])
    np.testing.assert_array_equal(out.v, out.k)


def test_compact_near_the_end_of_the_capacity():
    cache = write(empty(4), numbered(4), numbered(4))
    accepted = jnp.asarray([[1, 9, 9]] * BATCH)  # offsets of unused entries may be anything
    out = compact(cache, jnp.asarray([2, 2, 2]), accepted, jnp.asarray([1, 1, 1]))
    np.testing.assert_array_equal(rows(out)[0], [1, 2, 4, 4])
    np.testing.assert_array_equal(out.lengths, [3, 3, 3])


def test_spans_cut_and_joined_give_the_cache_back():
    cache = write(empty(), numbered(7), numbered(7)).replace(lengths=jnp.asarray([7, 3, 5]))
    spans = [slice_span(cache, 0, 3), slice_span(cache, 3, 8)]
    np.testing.assert_array_equal(spans[0].lengths, [3, 3, 3])
    np.testing.assert_array_equal(spans[1].lengths, [4, 0, 2])
    joined = concat_spans(spans, capacity=10)
    assert joined.capacity == 10
    np.testing.assert_array_equal(joined.lengths, cache.lengths)
    for row, length in enumerate([7, 3, 5]):
        np.testing.assert_array_equal(rows(joined)[row, :length], rows(cache)[row, :length])


def test_spans_of_ragged_lengths_are_packed_without_gaps():
    first = write(empty(4), numbered(4), numbered(4)).replace(lengths=jnp.asarray([1, 4, 0]))
    second = write(empty(2), numbered(2, start=50), numbered(2, start=50))
    joined = concat_spans([first, second])
    np.testing.assert_array_equal(joined.lengths, [3, 6, 2])
    np.testing.assert_array_equal(rows(joined)[0, :3], [1, 50, 51])
    np.testing.assert_array_equal(rows(joined)[1], [101, 102, 103, 104, 150, 151])
    np.testing.assert_array_equal(rows(joined)[2, :2], [250, 251])


def test_attending_to_compacted_slots_equals_having_written_only_those():
    """A tree of two branches is verified, one branch is kept, decoding goes on."""
    config = tiny()
    apply = functools.partial(jax.jit(Decoder(config).apply), {"params": params_of(config)})
    prompt = tokens_of(1, 5)
    cache = apply(prompt, cache=init_cache(config, 1, 16)).cache
    tree = jnp.asarray([[7, 8, 9, 10]])  # 7 -> {8, 9}, 9 -> 10
    mask = jnp.asarray([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], bool)
    positions = 5 + jnp.asarray([[0, 1, 1, 2]])
    verified = apply(tree, cache=cache, mask=mask, positions=positions)
    kept = compact(verified.cache, cache.lengths, jnp.asarray([[0, 2, 3]]), jnp.asarray([3]))
    found = apply(jnp.asarray([[11]]), cache=kept).logits[0, -1]

    straight = jnp.concatenate([prompt, jnp.asarray([[7, 9, 10, 11]])], axis=1)
    expected = apply(straight).logits[0]
    np.testing.assert_allclose(found, expected[-1], atol=1e-4)
    np.testing.assert_allclose(verified.logits[0, [0, 2, 3]], expected[5:8], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: init_cache(tiny(), 0, 4), "batch=0"),
        (lambda: init_cache(tiny(), 1, 0), "capacity=0"),
        (lambda: slice_span(empty(), 3, 3), "span 3..3"),
        (lambda: slice_span(empty(), 0, 9), "span 0..9"),
        (lambda: concat_spans([]), "spans"),
        (lambda: concat_spans([empty(), empty()], capacity=15), "capacity=15"),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
