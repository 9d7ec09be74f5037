"""Fused cells under `vmap`, on meshes and inside `shard_map`: everywhere the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import doors, fused_gru, fused_lstm, recurrent_tiles, recurrent_tiles_tpu

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
CELLS = pytest.mark.parametrize("cell", ["gru", pytest.param("lstm", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels run in the interpreter, as if traced for a TPU; not unrolled they compile faster."""
    monkeypatch.setattr(recurrent_tiles_tpu, "UNROLL", 1)
    monkeypatch.setattr(doors, "target_platform", lambda: "tpu")
    for direction in ("forward", "adjoint"):
        kernel = getattr(recurrent_tiles_tpu, direction)
        monkeypatch.setattr(
            recurrent_tiles_tpu, direction, functools.partial(kernel, interpret=True)
        )
    recurrent_tiles._kernel.cache_clear()
    yield
    recurrent_tiles._kernel.cache_clear()


def mesh_of(**sizes):
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def operands(cell, *batch, steps=9, width=256):
    """The projections, the weights and the initial state of a batch."""
    rng = np.random.default_rng(len(batch))
    shapes = [(*batch, steps, 3, width), (3, width), (*batch, width)]
    if cell == "lstm":
        shapes = [*shapes[:2], (2, width), *shapes[2:] * 2]
    return [jnp.asarray(rng.uniform(-0.5, 0.5, shape), jnp.float32) for shape in shapes]


def loss_of(cell, implementation, **options):
    """A loss of `operands` that tells all states apart."""
    options = {"method": "sequential", "implementation": implementation, **options}

    def loss(u, *rest):
        if cell == "gru":
            states = fused_gru(u, rest[0], h0=rest[1], **options)
        else:
            states = sum(fused_lstm(u, *rest[:2], state0=rest[2:], **options))
        weight = jnp.linspace(-1, 1, states.shape[-2] * states.shape[-1])
        return (states * jnp.sin(9 * weight).reshape(states.shape[-2:])).sum()

    return loss


def with_gradients(loss, num_operands):
    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(loss, tuple(range(num_operands))), compiler_options=quickly)


def assert_same(found, expected):
    def same(x, y):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, float(jnp.abs(y).max())))

    jax.tree.map(same, found, expected)


@IMPLEMENTATIONS
@CELLS
@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_vmap_is_a_loop_over_calls_with_shared_weights_or_their_own(cell, implementation, shared):
    u, *rest = operands(cell, 2, 3, width=8)
    count = 1 if cell == "gru" else 2
    weights, first = rest[:count], rest[count:]
    if not shared:
        weights = [jnp.stack([w, -w]) for w in weights]
    axes = (0, *[None if shared else 0] * count, *[0] * len(first))
    args = (u, *weights, *first)
    one = with_gradients(loss_of(cell, "xla"), len(args))
    calls = [
        one(*(x if axis is None else x[i] for x, axis in zip(args, axes, strict=True)))
        for i in range(2)
    ]
    # Each call has a gradient of its own also of weights that it shares.
    gradients = jax.value_and_grad(loss_of(cell, implementation), tuple(range(len(args))))
    assert_same(
        jax.jit(jax.vmap(gradients, axes))(*args), jax.tree.map(lambda *x: jnp.stack(x), *calls)
    )


@IMPLEMENTATIONS
@CELLS
@pytest.mark.parametrize("batch", [8, pytest.param(3, marks=pytest.mark.slow)])
def test_a_mesh_changes_nothing(cell, implementation, batch):
    args = operands(cell, batch)
    expected = with_gradients(loss_of(cell, "xla"), len(args))(*args)
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        found = with_gradients(loss_of(cell, implementation), len(args))(*args)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("shape", "options", "local"),
    [
        ((8, 9, 3, 256), {}, (2, 9, 3, 128)),
        ((8, 9, 3, 5), {}, (1, 9, 3, 5)),  # 5 channels cannot be split: 8 rows can
        ((4, 9, 3, 256), {"channel_axes": ()}, (1, 9, 3, 256)),
        ((2, 9, 3, 256), {"channel_axes": ("fsdp", "tensor")}, (1, 9, 3, 64)),
        ((3, 9, 3, 6), {}, (3, 9, 3, 3)),
    ],
)
def test_axes_split_channels_or_the_batch(monkeypatch, shape, options, local):
    seen = []

    def forward(config, u, weights, first):
        seen.append((u.shape, weights.shape, first.shape))
        return (u[:, :, 0],)

    monkeypatch.setattr(recurrent_tiles_tpu, "forward", forward)
    u = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        states = fused_gru(u, jnp.zeros((3, shape[-1])), implementation="mosaic_tpu", **options)
    np.testing.assert_array_equal(states, u[:, :, 0])
    b, h = local[0], local[-1]
    assert seen[-1] == (local, (b, 3, h), (b, 1, h))


@IMPLEMENTATIONS
@CELLS
def test_inside_a_shard_map_shared_weights_have_the_gradient_of_all(cell, implementation):
    args = operands(cell, 8)
    expected = with_gradients(loss_of(cell, "xla"), len(args))(*args)
    count = 1 if cell == "gru" else 2
    rows, whole = jax.P("data"), jax.P()
    specs = (rows, *[whole] * count, *[rows] * (len(args) - 1 - count))
    part = loss_of(cell, implementation)

    def loss(*args):
        total = jax.shard_map(
            lambda *args: jax.lax.psum(part(*args), "data"),
            in_specs=specs,
            out_specs=whole,
            axis_names={"data"},  # the kernel is split over the other one
        )
        return total(*args)

    with jax.set_mesh(mesh_of(data=4, tensor=2)):
        assert_same(with_gradients(loss, len(args))(*args), expected)


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize(
    ("chip", "sizes"),
    [("v5e:2x2", {"data": 2, "tensor": 2}), ("v5p:2x2x2", {"data": 2, "fsdp": 2, "tensor": 2})],
)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_only_gradients_of_weights_travel_between_chips(tpu, cell, chip, sizes, monkeypatch):
    from jaxeff.aot import target_mesh

    monkeypatch.undo()
    recurrent_tiles._kernel.cache_clear()
    mesh = target_mesh(chip, tuple(sizes.values()), tuple(sizes))
    rows = tuple(name for name in sizes if name != "tensor")
    specs = [jax.P(rows, None, None, "tensor"), jax.P(None, "tensor"), jax.P(rows, "tensor")]
    if cell == "lstm":
        specs = [*specs[:2], specs[1], specs[2], specs[2]]
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
        for x, spec in zip(operands(cell, 32, steps=256, width=512), specs, strict=True)
    ]
    loss = loss_of(cell, None, method="auto")
    report = tpu(jax.grad(loss, tuple(range(len(args)))), args, chip, mesh=mesh)
    assert sorted(k.name.partition(".")[0] for k in report.kernels) == [
        f"fused_{cell}",
        f"fused_{cell}_adjoint",
    ]
    # The gradients of the weights, each chip's channels of them, are summed over the batch axes.
    num_weights = 3 if cell == "gru" else 5
    assert [(c.kind, c.payload) for c in report.costs.collectives] == [
        ("all-reduce", 4 * num_weights * 512 // 2)
    ]


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_kernels_compile_where_a_shard_map_has_taken_all_axes(tpu, monkeypatch):
    from jaxeff.aot import target_mesh

    monkeypatch.undo()
    recurrent_tiles._kernel.cache_clear()
    mesh = target_mesh("v5e:2x2", (4,), ("data",))
    rows, whole = jax.P("data"), jax.P()
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
        for x, spec in zip(operands("gru", 32), (rows, whole, rows), strict=True)
    ]
    part = loss_of("gru", "mosaic_tpu")

    def loss(*args):
        return jax.shard_map(
            lambda *args: jax.lax.psum(part(*args), "data"),
            in_specs=(rows, whole, rows),
            out_specs=whole,
        )(*args)

    report = tpu(jax.grad(loss, (0, 1, 2)), args, "v5e:2x2", mesh=mesh)
    assert len(report.kernels) == 2
    assert [(c.kind, c.payload) for c in report.costs.collectives] == [("all-reduce", 4 * 3 * 256)]
