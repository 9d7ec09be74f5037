"""The TPU kernel of linear recurrences, interpreted and compiled for chips that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence_cases import looped, operands

from pallas_kernels import doors
from pallas_kernels.linear_recurrence import linear_recurrence, reference, tpu

SMALL = tpu.BlockSizes(time=64, groups=1)  # small programs compile fast

kernel = jax.jit(
    functools.partial(tpu.recurrence, interpret=True),
    static_argnames=("reverse", "adjoint", "block_sizes"),
)

# structure, steps, channels, dtypes of a and b: tiles that are full and not, one and several
CASES = {
    "one step": ("diagonal", 1, 5, "float32", "float32"),
    "several tiles, two lane blocks": ("diagonal", 129, 130, "float32", "float32"),
    "words of two steps, an odd number": ("diagonal", 151, 5, "bfloat16", "bfloat16"),
    "transitions wider than states": ("diagonal", 100, 3, "float32", "bfloat16"),
    "transitions narrower than states": ("diagonal", 96, 3, "bfloat16", "float32"),
    "blocks of two": (2, 70, 3, "float32", "float32"),
    "blocks of three": (3, 33, 3, "bfloat16", "bfloat16"),
}


def operands_of(case, seed=0):
    structure, steps, channels, a_dtype, b_dtype = CASES[case]
    a, b, h0 = operands(seed, 2, steps, channels, structure)
    return jnp.asarray(a, a_dtype), jnp.asarray(b, b_dtype), jnp.asarray(h0)


def assert_states(h, expected):
    tolerance = 1e-5 if h.dtype == jnp.float32 else 5e-3
    np.testing.assert_allclose(np.asarray(h, np.float32), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if "three" in case else ()) for case in CASES],
)
def test_states_are_those_of_the_loop(case, reverse):
    a, b, h0 = operands_of(case)
    h = kernel(a, b, h0, reverse=reverse, block_sizes=SMALL)
    assert h.dtype == b.dtype
    assert_states(h, looped(a.astype(np.float32), b.astype(np.float32), h0, reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", ["words of two steps, an odd number", "blocks of two"])
def test_the_adjoint_multiplies_behind_its_step(case, reverse):
    a, b, h0 = operands_of(case)
    h = kernel(a, b, h0, reverse=reverse, adjoint=True, block_sizes=SMALL)
    shifted = reference.adjoint_operands(a, reverse=reverse).astype(np.float32)
    first = -1 if reverse else 0
    assert_states(h, looped(shifted, b.astype(jnp.float32).at[:, first].add(h0), None, reverse))


@pytest.mark.parametrize("sizes", [tpu.BlockSizes(time=200, groups=2)])
def test_all_tiles_give_the_same(sizes):
    a, b, h0 = operands(3, 1, 300, 2)
    assert_states(kernel(a, b, h0, block_sizes=sizes), looped(a, b, h0))


def test_what_does_not_exist_cannot_be_felt():
    # Behind the last step lie not-a-numbers in the interpreter: none may reach a state.
    a, b, h0 = operands(4, 1, 65, 2)
    for reverse in (False, True):
        h = kernel(a, b, h0, reverse=reverse, block_sizes=SMALL)
        assert np.isfinite(h).all()


def test_strides_fall_into_different_banks():
    for steps in range(1, 5000, 7):
        length = tpu.BlockSizes().chunk_length(steps)
        assert length % 8 == 4
        assert steps <= length * 32 * -(-steps // 2048)


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="groups=0"):
        tpu.BlockSizes(groups=0)


# --- behind the door ------------------------------------------------------------------------------


@pytest.fixture
def on_tpu(monkeypatch):
    """Pretends to trace for a TPU, and interprets the kernel. The sizes must be a test's own: the
    door keeps its functions by them."""
    monkeypatch.setattr(doors, "target_platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "recurrence", functools.partial(tpu.recurrence, interpret=True))
    return functools.partial(linear_recurrence, implementation="mosaic_tpu")


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_a_kernel_too(on_tpu, reverse):
    a, b, h0 = operands(5, 2, 50, 3)
    weights = np.random.default_rng(6).normal(size=b.shape).astype(np.float32)
    sizes = tpu.BlockSizes(time=32, groups=1)

    def loss(solve, a, b, h0):
        return jnp.sum(solve(a, b, h0=h0, reverse=reverse) * weights)

    ours = jax.grad(
        functools.partial(loss, functools.partial(on_tpu, block_sizes=sizes)), (0, 1, 2)
    )
    xla = functools.partial(linear_recurrence, implementation="xla")
    expected = jax.grad(functools.partial(loss, xla), (0, 1, 2))(a, b, h0)
    assert str(jax.make_jaxpr(ours)(a, b, h0)).count("name=linear_recurrence") == 2
    for gradient, theirs in zip(jax.jit(ours)(a, b, h0), expected, strict=True):
        np.testing.assert_allclose(gradient, theirs, rtol=1e-5, atol=1e-5)


def test_a_vmapped_and_sharded_batch_is_the_same(on_tpu):
    a, b, h0 = operands(7, 8, 20, 6)
    solve = functools.partial(on_tpu, block_sizes=tpu.BlockSizes(time=33, groups=1))
    apart = [x.reshape(2, 4, *x.shape[1:]) for x in (a, b, h0)]
    mapped = jax.jit(jax.vmap(lambda a, b, h0: solve(a, b, h0=h0)))(*apart)
    np.testing.assert_allclose(mapped.reshape(b.shape), looped(a, b, h0), rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        h = jax.jit(lambda a, b, h0: solve(a, b, h0=h0))(a, b, h0)
    np.testing.assert_allclose(h, looped(a, b, h0), rtol=1e-5, atol=1e-5)


def test_a_method_without_an_implementation_asks_for_xlas(on_tpu):
    a, b, _ = operands(8, 1, 4, 2)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])):
        for method, taken in (("auto", True), ("scan", False), ("sequential", False)):
            solve = functools.partial(
                linear_recurrence, method=method, block_sizes=tpu.BlockSizes(34, 1)
            )
            assert ("name=linear_recurrence" in str(jax.make_jaxpr(solve)(a, b))) == taken


# --- compiled -------------------------------------------------------------------------------------

SHAPE = (8, 2048, 1024)


@pytest.fixture(scope="module")
def scheduled(tpu):
    """Reports of the compiled kernel, by chip, dtype, blocks and direction."""

    @functools.cache
    def compile_once(chip, dtype, blocks=None, backward=False, shape=SHAPE):
        batch, steps, channels = shape
        inner = () if blocks is None else (blocks,)
        a = jax.ShapeDtypeStruct((batch, steps, *inner * 2, channels), dtype)
        b = jax.ShapeDtypeStruct((batch, steps, *inner, channels), dtype)
        solve = functools.partial(linear_recurrence, implementation="mosaic_tpu")
        if not backward:
            return tpu(solve, (a, b), chip)
        return tpu(lambda a, b, g: jax.vjp(solve, a, b)[1](g), (a, b, b), chip)

    return compile_once


def cycles(schedule):
    """Bundles of a call; the bound of a loop with two passes is not found, others are."""
    return schedule.bundles_with([loop.trips or 2 for loop in schedule.loops])


def least_cycles(chip, nbytes):
    """What the transfers take at the peak rate of HBM."""
    from jaxeff.aot.targets import parse_target

    chip = parse_target(chip).chip
    return nbytes / chip.hbm_bandwidth * chip.peak_flops / chip.flops_per_cycle


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize(
    "chip, dtype, blocks, backward, most",
    [
        ("v5e", "float32", None, True, 0.25),
        ("v6e", "float32", None, True, 0.40),
        ("v5e", "bfloat16", None, True, 1.00),
        ("v6e", "bfloat16", None, True, 1.05),
        ("v6e", "float32", 2, True, 0.45),
        ("v5e", "float32", 3, False, 0.35),
        pytest.param("v5e", "bfloat16", 2, True, 1.05, marks=pytest.mark.slow),
        pytest.param("v6e", "bfloat16", 2, True, 1.20, marks=pytest.mark.slow),
        pytest.param("v5e", "bfloat16", 3, True, 1.20, marks=pytest.mark.slow),
        pytest.param("v6e", "bfloat16", 3, True, 1.45, marks=pytest.mark.slow),
    ],
)
def test_transfers_and_not_instructions_are_the_limit(
    scheduled, chip, dtype, blocks, backward, most
):
    report = scheduled(chip, dtype, blocks, backward)
    kernels = [k for k in report.kernels if k.name.startswith("linear_recurrence")]
    assert len(kernels) == (2 if backward else 1)
    nbytes = (
        jnp.dtype(dtype).itemsize
        * np.prod(SHAPE)
        * (3 if blocks is None else blocks**2 + 2 * blocks)
    )
    for kernel in kernels:
        assert kernel.nbytes == pytest.approx(nbytes, rel=0.01)
        assert kernel.schedule.spills == 0
        assert cycles(kernel.schedule) < most * least_cycles(chip, nbytes)


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(
    "dtype, blocks, shape",
    [
        ("float32", None, (1, 1, 1)),
        ("bfloat16", None, (3, 1001, 200)),
        ("bfloat16", 3, (1, 3, 5)),
        pytest.param("float32", 4, (3, 1000, 200), marks=pytest.mark.slow),
        pytest.param("bfloat16", 4, (3, 1000, 200), marks=pytest.mark.slow),
    ],
)
def test_odd_shapes_compile(scheduled, chip, dtype, blocks, shape):
    assert scheduled(chip, dtype, blocks, True, shape).kernels


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize("blocks", [None, 2])
def test_every_chip_of_a_mesh_runs_its_own_rows_and_channels(tpu, blocks):
    from jaxeff.aot import target_mesh

    mesh = target_mesh("v5e:2x2", (2, 2), ("data", "tensor"))
    inner = () if blocks is None else (blocks,)

    def spec(*inner):
        shape = (8, 256, *inner, 256)
        sharding = jax.NamedSharding(mesh, jax.P("data", *[None] * (len(shape) - 2), "tensor"))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def gradients(a, b, g):
        solve = functools.partial(linear_recurrence, implementation="mosaic_tpu")
        return jax.vjp(solve, a, b)[1](g)

    report = tpu(gradients, (spec(*inner * 2), spec(*inner), spec(*inner)), "v5e:2x2", mesh=mesh)
    arrays = 3 if blocks is None else blocks**2 + 2 * blocks
    assert sum(kernel.count for kernel in report.kernels) == 2
    for kernel in report.kernels:
        assert kernel.nbytes == pytest.approx(arrays * 4 * 8 * 256 * 256 / 4, rel=0.02)
    assert not report.costs.collectives
