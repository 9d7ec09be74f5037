"""Linear recurrences: the definition and the door."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_cases import looped, operands

import pallas_kernels
from pallas_kernels.linear_recurrence import linear_recurrence, sharded_linear_recurrence

GOLDEN = Path(__file__).parents[1] / "golden" / "pararnn"
STRUCTURES = ["diagonal", 1, 2, 4, "dense"]
METHODS = ["scan", "sequential"]

solve = jax.jit(linear_recurrence, static_argnames=("reverse", "method"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", ["diag", "block2", "block3", "dense"])
@pytest.mark.parametrize("length", ["t1", "t37"])
def test_the_published_reductions_are_reproduced(length, structure, method):
    golden = np.load(GOLDEN / f"reduction_{length}.npz")
    a, b, h = (golden[f"{structure}_{name}"] for name in ("jac", "rhs", "sol"))
    if structure.startswith("block"):
        # There, blocks are stacked along the channels: rows i N + n, columns j.
        m = int(structure[-1])
        batch, steps, rows = b.shape
        b, h = (x.reshape(batch, steps, m, rows // m) for x in (b, h))
        a = a.reshape(batch, steps, m, rows // m, m).swapaxes(3, 4)
    np.testing.assert_allclose(solve(a, b, method=method), h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 127, 128, 129, 257, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_steps_is_right(method, steps):
    a, b, _ = operands(steps, 2, steps, 5)
    np.testing.assert_allclose(solve(a, b, method=method), looped(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
def test_structures_directions_and_initial_states(method, structure, reverse):
    a, b, h0 = operands(0, 3, 17, 5, structure)
    h = solve(a, b, h0=h0, reverse=reverse, method=method)
    np.testing.assert_allclose(h, looped(a, b, h0, reverse), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("structure", ["diagonal", 3, "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_loop(method, structure, reverse):
    a, b, h0 = operands(1, 2, 9, 4, structure)
    weights = np.random.default_rng(2).normal(size=b.shape).astype(np.float32)
    product = {3: "bh,bh->bh", 4: "bij,bj->bi", 5: "bijh,bjh->bih"}[a.ndim]

    def loop(a, b, h0):
        def step(h, inputs):
            h = jnp.einsum(product, inputs[0], h, precision="highest") + inputs[1]
            return h, h

        inputs = jnp.moveaxis(a, 1, 0), jnp.moveaxis(b, 1, 0)
        _, h = jax.lax.scan(step, h0, inputs, reverse=reverse)
        return jnp.sum(jnp.moveaxis(h, 0, 1) * weights)

    def ours(a, b, h0):
        return jnp.sum(solve(a, b, h0=h0, reverse=reverse, method=method) * weights)

    expected = jax.jit(jax.grad(loop, (0, 1, 2)))(a, b, h0)
    gradients = jax.grad(ours, (0, 1, 2))(a, b, h0)
    for gradient, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_are_saved_for_by_operands_and_states_alone():
    a, b, _ = operands(3, 2, 64, 8)
    _, pullback = jax.vjp(linear_recurrence, a, b)
    saved = sorted(x.shape for x in jax.tree.leaves(pullback))
    assert saved == sorted([a.shape, b.shape, (2, 8)])  # a, h, h0


def test_gradients_of_gradients():
    a, b, h0 = operands(4, 1, 5, 2)

    def penalty(a, b, h0):
        gradient = jax.grad(lambda a: jnp.sum(linear_recurrence(a, b, h0=h0) ** 2))(a)
        return jnp.sum(gradient**2)

    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (a, b, h0)]
        along = [jnp.ones_like(x) for x in wide]
        slope = sum(jnp.vdot(g, d) for g, d in zip(jax.grad(penalty, (0, 1, 2))(*wide), along))
        ahead, behind = ([x + s * 1e-6 * d for x, d in zip(wide, along)] for s in (1, -1))
        numerical = (penalty(*ahead) - penalty(*behind)) / 2e-6
    np.testing.assert_allclose(slope, numerical, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_arithmetic_is_float32_whatever_comes_in(method):
    a, b, _ = operands(5, 2, 1000, 3)
    a = 1 - np.abs(a) / 100  # long memory: sums that bfloat16 would lose
    low = [jnp.asarray(x, jnp.bfloat16) for x in (a, b)]
    h = solve(*low, method=method)
    assert h.dtype == jnp.bfloat16
    expected = looped(*(x.astype(jnp.float32) for x in low))
    np.testing.assert_allclose(h.astype(jnp.float32), expected, rtol=5e-3, atol=5e-3)
    mixed = solve(low[0], b, method=method)
    assert mixed.dtype == jnp.float32
    np.testing.assert_allclose(mixed, looped(low[0].astype(jnp.float32), b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_arithmetic_is_float64_for_float64(method):
    with jax.enable_x64(True):
        a, b, h0 = (x.astype(np.float64) for x in operands(6, 2, 40, 3, 2))
        h = linear_recurrence(a, b, h0=h0, method=method)
        assert h.dtype == jnp.float64
        np.testing.assert_allclose(h, looped(a, b, h0), rtol=1e-12, atol=1e-12)


def test_the_scan_has_no_loop_over_time():
    a, b, _ = operands(7, 1, 500, 2)
    jaxpr = str(jax.make_jaxpr(lambda a, b: linear_recurrence(a, b, method="scan"))(a, b))
    assert "while" not in jaxpr and "scan[" not in jaxpr


def test_vmap_and_a_sharded_batch_are_the_same():
    a, b, h0 = operands(8, 8, 20, 6, 2)
    expected = looped(a, b, h0)
    apart = [x.reshape(2, 4, *x.shape[1:]) for x in (a, b, h0)]
    mapped = jax.vmap(lambda a, b, h0: linear_recurrence(a, b, h0=h0))(*apart)
    np.testing.assert_allclose(mapped.reshape(b.shape), expected, rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put((a, b, h0), jax.NamedSharding(mesh, jax.P("data")))
    h = solve(*split[:2], h0=split[2])
    assert h.sharding.spec[0] == "data"
    np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-5)


def test_inside_a_shard_map_all_varies_as_it_must():
    a, b, _ = operands(9, 8, 6, 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(a, b):
        def part(a, b):
            return jax.lax.psum(jnp.sum(linear_recurrence(a, b) ** 2), "data")

        # One transition for all devices: its gradient is the sum of theirs.
        return jax.shard_map(part, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())(
            a, b
        )

    def whole(a, b):
        return jnp.sum(linear_recurrence(jnp.tile(a, (8, 1, 1)), b) ** 2)

    ours = jax.jit(jax.grad(loss, (0, 1)))(a[:1], b)
    for gradient, expected in zip(ours, jax.grad(whole, (0, 1))(a[:1], b), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("structure", ["diagonal", 2, "dense"])
def test_steps_split_over_devices_give_states_and_gradients_of_one_device(structure, reverse):
    a, b, h0 = operands(10, 2, 24, 3, structure)
    weights = np.random.default_rng(11).normal(size=b.shape).astype(np.float32)
    mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P(None, "time"), jax.P(None, "time"), jax.P()),
        out_specs=jax.P(None, "time"),
    )
    def split(a, b, h0):
        return sharded_linear_recurrence(a, b, "time", h0=h0, reverse=reverse)

    def one_device(a, b, h0):
        return linear_recurrence(a, b, h0=h0, reverse=reverse)

    def states_and_gradients(solve):
        def loss(*given):
            h = solve(*given)
            return jnp.sum(h * weights), h

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(a, b, h0)

    ours, expected = states_and_gradients(split), states_and_gradients(one_device)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_what_travels_between_devices_does_not_grow_with_their_steps():
    mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))

    def gathered(steps):
        split = jax.shard_map(
            lambda a, b: sharded_linear_recurrence(a, b, "time"),
            mesh=mesh, in_specs=jax.P(None, "time"), out_specs=jax.P(None, "time"),
        )  # fmt: skip
        given = jnp.ones((2, steps, 3))
        text = jax.jit(split).lower(given, given).as_text()
        return sorted(line.split("->")[1] for line in text.splitlines() if "all_gather" in line)

    assert gathered(16) == gathered(800)
    assert len(gathered(16)) == 2


def test_nothing_to_do_is_nothing():
    for shape in ((0, 3, 4), (2, 3, 0)):
        assert linear_recurrence(jnp.ones(shape), jnp.ones(shape)).shape == shape


def test_the_package_exports_the_function():
    assert pallas_kernels.linear_recurrence is linear_recurrence


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"a": jnp.ones((2, 3, 4), int)}, "a has dtype int32"),
        ({"b": jnp.ones((2, 3, 4), int)}, "b has dtype int32"),
        ({"h0": jnp.ones((2, 4), int)}, "h0 has dtype int32"),
        ({"a": jnp.ones((3, 4))}, r"a has shape \(3, 4\), expected \(B, T, H\)"),
        ({"a": jnp.ones((2, 3, 2, 2, 4))}, r"b has shape \(2, 3, 4\), expected \(2, 3, 2, 4\)"),
        ({"a": jnp.ones((2, 3, 4, 5))}, "expected square"),
        ({"a": jnp.ones((2, 3, 5, 5, 4)), "b": jnp.ones((2, 3, 5, 4))}, "5 x 5 blocks"),
        ({"a": jnp.ones((2, 0, 4)), "b": jnp.ones((2, 0, 4))}, "T = 0 steps"),
        ({"h0": jnp.ones((2, 3, 4))}, r"h0 has shape \(2, 3, 4\), expected \(2, 4\)"),
        ({"method": "pallas"}, "method='pallas' is not one of"),
        ({"implementation": "cuda"}, "implementation='cuda' is not one of"),
    ],
)
def test_bad_input_is_named(changes, message):
    given = {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 3, 4))} | changes
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**given)


@pytest.mark.parametrize(
    "a, implementation, message",
    [
        (jnp.ones((2, 3, 4)), "mosaic_tpu", "runs on TPU, and this program is traced for cpu"),
        (jnp.ones((2, 3, 4)), "triton", "jax-triton|runs on GPU"),
        (jnp.ones((2, 3, 4), jnp.float16), "mosaic_tpu", "not float16"),
        (jnp.ones((2, 3, 4, 4)), "mosaic_tpu", "a is dense"),
        (jnp.ones((2, 3, 4, 4)), "triton", "a is dense"),
    ],
)
def test_a_named_implementation_that_cannot_serve_says_why(a, implementation, message):
    with pytest.raises(NotImplementedError, match=message):
        linear_recurrence(a, jnp.ones((2, 3, 4)), implementation=implementation)
