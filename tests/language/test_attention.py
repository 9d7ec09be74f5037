"""What `jaxeff.language.attention` must compute, whatever the implementation."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_cases import RULES, make_mesh
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from jaxeff.language import attention as attention_module
from jaxeff.language.attention import attention, splash_attention
from jaxeff.language.cache import CachedKeys


def random_qkv(batch=2, length=7, heads=6, kv_heads=2, head_dim=8, dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, length, heads, head_dim)] + [(batch, length, kv_heads, head_dim)] * 2
    return tuple(
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )


def random_cache(lengths, capacity=9, kv_heads=2, head_dim=8):
    keys = jax.random.split(jax.random.key(9), 2)
    shape = (len(lengths), capacity, kv_heads, head_dim)
    return CachedKeys(*(jax.random.normal(key, shape) for key in keys), jnp.asarray(lengths))


def attention_by_loops(q, k, v, visible, scale=None):
    """One query at a time in float64; visible(row, query) lists (keys, values) a query sees."""
    q = np.asarray(q, np.float64)
    out = np.zeros_like(q)
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    for row in range(batch):
        for query in range(length):
            seen_k, seen_v = visible(row, query)
            for head in range(heads):
                if not seen_k:
                    continue
                keys = np.asarray(seen_k, np.float64)[:, head // group]
                values = np.asarray(seen_v, np.float64)[:, head // group]
                logits = keys @ q[row, query, head] * (scale or head_dim**-0.5)
                weights = np.exp(logits - logits.max())
                out[row, query, head] = weights @ values / weights.sum()
    return out


def seen_new(k, v, row, allowed):
    return [k[row, j] for j in allowed], [v[row, j] for j in allowed]


def test_plain_call_is_causal_grouped_attention():
    q, k, v = random_qkv()
    expected = attention_by_loops(q, k, v, lambda b, i: seen_new(k, v, b, range(i + 1)))
    np.testing.assert_allclose(attention(q, k, v), expected, atol=2e-6)


def test_scale_replaces_the_default():
    q, k, v = random_qkv()
    expected = attention_by_loops(q, k, v, lambda b, i: seen_new(k, v, b, range(i + 1)), scale=0.7)
    np.testing.assert_allclose(attention(q, k, v, scale=0.7), expected, atol=2e-6)


def test_positions_decide_causality():
    q, k, v = random_qkv()
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [3, 0, 2, 2, 9, 1, 4]])

    def visible(row, query):
        own = positions[row, query]
        return seen_new(k, v, row, [j for j in range(7) if positions[row, j] <= own])

    out = attention(q, k, v, positions=positions)
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, visible), atol=2e-6)


def test_segments_hide_other_documents():
    q, k, v = random_qkv()
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]])

    def visible(row, query):
        same = [j for j in range(query + 1) if segments[row, j] == segments[row, query]]
        return seen_new(k, v, row, same)

    expected = attention_by_loops(q, k, v, visible)
    out = attention(q, k, v, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_window_counts_the_query_itself(window):
    q, k, v = random_qkv()

    def visible(row, query):
        return seen_new(k, v, row, range(max(query - window + 1, 0), query + 1))

    out = attention(q, k, v, sliding_window=window)
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, visible), atol=2e-6)


def test_cache_is_seen_up_to_each_rows_length():
    q, k, v = random_qkv(length=3)
    cache = random_cache([5, 0])

    def visible(row, query):
        new_k, new_v = seen_new(k, v, row, range(query + 1))
        used = int(cache.lengths[row])
        return [*cache.k[row, :used], *new_k], [*cache.v[row, :used], *new_v]

    out = attention(q, k, v, cache=cache)
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, visible), atol=2e-6)


def test_cache_window_and_tree_mask_act_together():
    q, k, v = random_qkv(length=4)
    cache = random_cache([5, 8])
    positions = cache.lengths[:, None] + jnp.asarray([0, 1, 1, 2])
    mask = jnp.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
    mask = jnp.broadcast_to(mask, (2, 4, 4))
    window = 4

    def visible(row, query):
        own = int(positions[row, query])
        new = [j for j in range(4) if mask[row, query, j] and own - positions[row, j] < window]
        new_k, new_v = seen_new(k, v, row, new)
        old = range(max(own - window + 1, 0), int(cache.lengths[row]))
        return [*(cache.k[row, j] for j in old), *new_k], [*(cache.v[row, j] for j in old), *new_v]

    out = attention(q, k, v, positions=positions, mask=mask, cache=cache, sliding_window=window)
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, visible), atol=2e-6)


def test_cached_slots_beyond_the_querys_position_are_hidden():
    q, k, v = random_qkv(length=1)
    cache = random_cache([6, 6])
    positions = jnp.asarray([[2], [5]])

    def visible(row, query):
        old = range(int(positions[row, query]) + 1)
        return [*cache.k[row, : len(old)], k[row, 0]], [*cache.v[row, : len(old)], v[row, 0]]

    out = attention(q, k, v, positions=positions, cache=cache)
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, visible), atol=2e-6)


def test_a_query_that_sees_nothing_gives_zero_and_finite_gradients():
    q, k, v = random_qkv()
    mask = jnp.tril(jnp.ones((2, 7, 7), bool)).at[:, 3].set(False)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, mask=mask) ** 2)

    assert not np.any(attention(q, k, v, mask=mask)[:, 3])
    for gradient in jax.grad(loss, argnums=(0, 1, 2))(q, k, v):
        assert np.all(np.isfinite(gradient))
    assert not np.any(jax.grad(loss)(q, k, v)[:, 3])


def test_repeated_keys_are_never_materialised():
    q, k, v = random_qkv(batch=1, length=3, heads=6, kv_heads=2)
    cache = random_cache([40], capacity=64)
    repeated = 64 * 6 * 8
    jaxpr = jax.make_jaxpr(lambda *a: attention(*a, cache=cache))(q, k, v)
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    assert max(sizes) < repeated


def test_bfloat16_keeps_a_float32_softmax():
    q, k, v = random_qkv(length=64, dtype="bfloat16")
    exact = attention(*(a.astype(jnp.float32) for a in (q, k, v)))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(out - exact)) / jnp.max(jnp.abs(exact))) < 1e-2
    large = attention(30 * q, k, v)  # logits of several hundred: bfloat16 would round by units
    exact = attention(30 * q.astype(jnp.float32), *(a.astype(jnp.float32) for a in (k, v)))
    assert float(jnp.mean(jnp.abs(large - exact))) < 1e-2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"implementation": "triton"}, "implementation='triton'"),
        ({"positions": jnp.zeros((2, 5), jnp.int32)}, "positions"),
        ({"segment_ids": jnp.zeros((2, 5), jnp.int32)}, "segment_ids"),
        ({"mask": jnp.ones((2, 7, 5), bool)}, "mask"),
        ({"cache": random_cache([1, 1], kv_heads=3)}, "cache"),
        ({"cache": random_cache([1, 1]), "segment_ids": jnp.ones((2, 7), jnp.int32)}, "segment"),
    ],
)
def test_wrong_arguments_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        attention(*random_qkv(), **wrong)


def test_heads_that_do_not_group_are_refused():
    q, k, v = random_qkv(heads=5, kv_heads=2)
    with pytest.raises(ValueError, match="5 query heads"):
        attention(q, k, v)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "cudnn"])
def test_a_named_kernel_that_cannot_run_here_says_why(implementation):
    with pytest.raises(NotImplementedError, match="traced for cpu"):
        attention(*random_qkv(), implementation=implementation)


# --- splash ---------------------------------------------------------------------------------------

PACKED = jnp.repeat(jnp.asarray([[1, 1, 2, 2], [1, 2, 2, 3]]), 64, axis=1)


def output_and_gradients(fn, q, k, v):
    weight = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    loss = lambda *args: jnp.sum(weight * fn(*args))  # noqa: E731
    return fn(q, k, v), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize(("segments", "window"), [(None, None), (PACKED, None), (PACKED, 40)])
def test_splash_equals_xla_with_its_gradients(segments, window):
    q, k, v = random_qkv(length=256, heads=4, kv_heads=2, head_dim=16)
    call = {"segment_ids": segments, "sliding_window": window, "scale": 0.25}
    splash = lambda *args: splash_attention(*args, **call, interpret=True)  # noqa: E731
    found, found_gradients = output_and_gradients(splash, q, k, v)
    expected, gradients = output_and_gradients(lambda *args: attention(*args, **call), q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "context": 2, "tensor": 2}, {"tensor": 4}], ids=["batch", "few kv heads"]
)
def test_splash_on_a_mesh_equals_one_device(sizes):
    q, k, v = random_qkv(length=256, heads=4, kv_heads=2, head_dim=16)
    call = {"segment_ids": PACKED, "sliding_window": None, "scale": 0.25}
    expected, gradients = output_and_gradients(lambda *args: attention(*args, **call), q, k, v)
    with jax.set_mesh(make_mesh(**sizes)), nn.logical_axis_rules(RULES):
        splash = jax.jit(lambda *args: splash_attention(*args, **call, interpret=True))
        found, found_gradients = output_and_gradients(splash, q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# --- ahead of time --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tpu_devices():
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def compile_for(mesh, shapes, dtype="bfloat16", segments=True, **call):
    """The compiled text of attention with its gradient on a mesh of absent chips."""
    placed = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    q, k = (jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for shape in shapes)
    ids = jax.ShapeDtypeStruct(q.shape[:2], "int32", sharding=placed)

    def loss(q, k, v, ids):
        out = attention(q, k, v, segment_ids=ids if segments else None, **call)
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, ids).compile().as_text()


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("sizes", "head_dim", "call"),
    [
        ({}, 64, {}),
        ({}, 128, {"segments": False, "sliding_window": 128, "implementation": "mosaic_tpu"}),
        ({"data": 2, "tensor": 2}, 128, {}),
        ({"fsdp": 2, "context": 2}, 128, {"dtype": "float32"}),
        ({"tensor": 4}, 128, {}),
    ],
)
def test_the_kernel_is_chosen_and_compiles_for_tpu(tpu_devices, sizes, head_dim, call):
    shapes = [(4, 512, 8, head_dim), (4, 512, 2, head_dim)]
    text = compile_for(make_mesh(tpu_devices, **sizes), shapes, **call)
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dkv


@pytest.mark.tpu_compile
def test_calls_the_kernel_does_not_serve_fall_back_on_tpu(tpu_devices):
    mesh = make_mesh(tpu_devices)
    shapes = [(2, 96, 4, 64), (2, 96, 2, 64)]
    assert "tpu_custom_call" not in compile_for(mesh, shapes)
    with pytest.raises(NotImplementedError, match="96, is not a multiple of 128"):
        compile_for(mesh, shapes, implementation="mosaic_tpu")


# --- cudnn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segments", "window"), [(None, None), (PACKED, None), (PACKED, 40)])
def test_what_cudnn_is_asked_for_is_this_attention(segments, window, monkeypatch):
    """The same call through JAX's own XLA path, since cuDNN needs a GPU."""
    asked = jax.nn.dot_product_attention

    def on_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return asked(*args, implementation="xla", **kwargs)

    q, k, v = random_qkv(length=256, heads=4, kv_heads=2, head_dim=16)
    call = {"segment_ids": segments, "sliding_window": window, "scale": 0.25}
    expected = attention(q, k, v, **call)
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    monkeypatch.setattr(attention_module, "target_platform", lambda: "gpu")
    # bfloat16 inputs choose cuDNN by themselves; float32 ones here keep the comparison exact.
    found = attention_module._cudnn_attention(q, k, v, **call)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    assert attention_module._kernel_of_platform(*half[:2], None, **call) == "cudnn"


@pytest.mark.cuda_compile
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_attention_compiles_for_h100_without_the_square_of_logits(cuda, packed):
    spec = jax.ShapeDtypeStruct((2, 2048, 16, 64), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 2048), jnp.int32)

    def loss(q, k, v, segments):
        out = attention(q, k, v, segment_ids=segments if packed else None)
        return jnp.sum(out.astype(jnp.float32))

    report = cuda(jax.grad(loss, argnums=(0, 1, 2)), (spec, keys, keys, segments), "h100")
    assert "__cudnn$fmha" in report.hlo
    # One head's float32 logits of both rows are 32 MiB; all 16 heads' would be 512.
    assert report.memory.temporaries < 160 * 2**20
