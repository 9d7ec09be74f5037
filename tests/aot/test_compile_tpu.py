"""Programs and kernels compiled for TPUs with the real compiler."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.sharding import NamedSharding, PartitionSpec

from jaxeff.aot import DoesNotFitError, TargetError
from jaxeff.aot.report import collectives_by_kind, to_json

pytestmark = [pytest.mark.tpu_compile, pytest.mark.xdist_group("tpu_compile")]

LAYERS, WIDTH, INNER, ROWS = 4, 256, 1024, 64


def spec(*shape, dtype=jnp.bfloat16, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def layer(x, w):
    h = jax.nn.gelu(x @ w["up"].astype(x.dtype))
    return x + h @ w["down"].astype(x.dtype), None


def train_step(params, x):
    def loss(params):
        return jnp.mean(jax.lax.scan(layer, x, params)[0].astype(jnp.float32) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def sharded_step(mesh):
    def place(shape, *axes, dtype=jnp.float32):
        return spec(*shape, dtype=dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = {
        "up": place((LAYERS, WIDTH, INNER), None, "fsdp", "tensor"),
        "down": place((LAYERS, INNER, WIDTH), None, "tensor", "fsdp"),
    }
    return params, place((ROWS, 128, WIDTH), "fsdp", dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def step_report(tpu):
    from jaxeff.aot import target_mesh

    mesh = target_mesh("v5e:2x2", (2, 2), ("fsdp", "tensor"))
    return tpu(train_step, sharded_step(mesh), "v5e:2x2", donate_argnums=0, name="step")


def test_flops_of_a_sharded_scanned_step_are_exact(step_report):
    tokens = ROWS * 128
    per_device = 3 * LAYERS * 2 * (2 * tokens * WIDTH * INNER) / 4
    assert step_report.costs.matmul_flops == per_device
    # XLA itself counts the scanned layer once.
    assert step_report.xla_flops < 0.5 * per_device
    assert not step_report.costs.unknown_loops


def test_memory_counts_donated_arguments_once(step_report):
    memory = step_report.memory
    params = 2 * LAYERS * WIDTH * INNER * 4 / 4
    batch = ROWS * 128 * WIDTH * 2 / 2
    assert memory.arguments == pytest.approx(params + batch, rel=0.01)
    assert memory.aliased == pytest.approx(params, rel=0.01)
    assert memory.total < memory.arguments + memory.temporaries + memory.code + params
    assert memory.fits and memory.headroom == memory.capacity - memory.total
    assert memory.largest


def test_collectives_of_a_sharded_step_move_its_weights_and_activations(step_report):
    weights = 2 * LAYERS * WIDTH * INNER * 2 / 2  # bfloat16, the tensor axis's half
    activation = ROWS * 128 * WIDTH * 2 / 2
    fsdp, tensor = (0, 2), (0, 1)

    def payload(group, *kinds):
        found = [c for c in step_report.costs.collectives if c.group == group and c.kind in kinds]
        return sum(c.count * c.payload for c in found if c.payload > 4)

    # Weights are gathered for the forward and for the backward pass, their gradients reduced once;
    # activations are summed over the tensor axis once each way in every layer.
    assert payload(fsdp, "all-gather") == 2 * weights
    assert payload(fsdp, "all-reduce", "reduce-scatter") == weights
    assert payload(tensor, "all-reduce") == 2 * LAYERS * activation
    rows = collectives_by_kind(step_report)
    assert sum(row["seconds"] for row in rows) == pytest.approx(step_report.roofline.collectives)
    assert all(row["seconds"] > 0 for row in rows)


def test_the_report_becomes_json(step_report):
    report = to_json(step_report)
    assert report["target"] == "v5e:2x2" and report["devices"] == 4
    assert report["memory"]["fits"] is True
    assert report["roofline"]["seconds"] == max(
        report["roofline"][name] for name in ("compute", "hbm", "collectives")
    )


@pytest.mark.parametrize("target", ["v6e:2x2", "v5p:2x2x2", "v4:2x2x1", "tpu7x:2x2x1"])
def test_the_same_step_compiles_for_every_generation(tpu, target):
    from jaxeff.aot import parse_target, target_mesh

    devices = parse_target(target).num_devices
    mesh = target_mesh(target, (devices // 2, 2), ("fsdp", "tensor"))
    report = tpu(train_step, sharded_step(mesh), target)
    tokens = ROWS * 128
    assert report.costs.matmul_flops == 3 * LAYERS * 2 * (2 * tokens * WIDTH * INNER) / devices
    assert report.roofline.estimate > report.roofline.compute


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "v4", "tpu7x"])
def test_peak_and_clock_agree_with_the_compilers_estimate_of_a_large_product(tpu, chip):
    report = tpu(jnp.dot, (spec(4096, 4096), spec(4096, 4096)), chip)
    least = report.costs.matmul_flops / report.target.chip.flops_per_cycle
    assert least <= report.estimated_cycles < 1.3 * least


def test_flops_of_batched_products_are_exact(tpu):
    def scores(q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    report = tpu(scores, (spec(3, 256, 4, 64), spec(3, 128, 4, 64)), "v5e")
    assert report.costs.matmul_flops == 2 * 3 * 4 * 256 * 128 * 64


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "v4", "tpu7x"])
def test_what_does_not_fit_is_said_with_by_how_much(tpu, chip):
    with pytest.raises(DoesNotFitError, match=f"memory on each {chip}.*too much") as error:
        tpu(lambda x: x * 2, (spec(120_000, 120_000, dtype=jnp.float32),), chip, name="double")
    report = error.value.report
    memory = report.memory
    assert memory.arguments == memory.outputs == 120_000**2 * 4
    assert memory.total == pytest.approx(2 * memory.arguments, rel=0.01)
    assert not memory.fits and memory.headroom < 0
    # What the compiler says there is, is what the table of chips says.
    assert memory.capacity == pytest.approx(report.target.chip.hbm_bytes, rel=1e-3)


def test_a_mesh_larger_than_the_slice_is_refused(tpu):
    from jaxeff.aot import target_mesh

    with pytest.raises(TargetError, match=r"needs 8 devices; v5e:2x2 has 4"):
        target_mesh("v5e:2x2", (8,), ("x",))


def matmul_kernel(x_ref, y_ref, o_ref):
    o_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)


def matmul(x, y):
    rows, columns = x.shape[0], y.shape[1]
    return pl.pallas_call(
        matmul_kernel,
        grid=(rows // 256, columns // 512),
        in_specs=[
            pl.BlockSpec((256, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((y.shape[0], 512), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((256, 512), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        name="tiled_matmul",
    )(x, y)


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_kernels_schedule_counts_its_grid_and_its_products(tpu, chip):
    report = tpu(matmul, (spec(1024, 512), spec(512, 1024)), chip)
    kernel = report.kernel("tiled_matmul")
    schedule, target = kernel.schedule, report.target.chip
    assert kernel.count == 1
    assert schedule.grid_steps == 4 * 2
    assert schedule.mxu_cycles == 2 * 1024 * 512 * 1024 / target.flops_per_cycle
    assert schedule.cycles == max(schedule.total_bundles, schedule.mxu_cycles)
    assert schedule.bundles_per_step > 0 and not schedule.unknown_trips
    assert kernel.flops is None and report.unstated_kernels == (kernel,)


def test_loops_may_be_counted_with_trips_that_the_caller_knows(tpu):
    report = tpu(matmul, (spec(1024, 512), spec(512, 1024)), "v5e")
    schedule = report.kernel("tiled_matmul").schedule
    trips = [loop.trips for loop in schedule.loops]
    assert schedule.bundles_with(trips) == schedule.total_bundles
    more = schedule.bundles_with([trips[0] + 1, *trips[1:]])
    assert more - schedule.total_bundles == pytest.approx(schedule.bundles_per_step)
    with pytest.raises(ValueError, match=f"trips has 0 entries.* has {len(trips)} loops"):
        schedule.bundles_with([])


def test_sorts_are_in_the_estimate_by_their_schedules(tpu):
    report = tpu(lambda x: jnp.sort(x, axis=1), (spec(256, 1024, dtype=jnp.int32),), "v5e")
    assert len(report.costs.sorts) == 1
    # Ten merges of up to ten exchanges each, at least two instructions on all 256 registers.
    assert report.estimated_cycles - report.costs.cycles > 55 * 256 * 2 / 4
    assert not report.kernels


def test_a_kernel_in_a_scan_is_counted_as_often_as_it_runs(tpu):
    def f(x, ys):
        return jax.lax.scan(lambda x, y: (matmul(x, y).astype(x.dtype), None), x, ys)[0]

    report = tpu(f, (spec(512, 512), spec(6, 512, 512)), "v5e")
    assert report.kernel("tiled_matmul").count == 6


def test_flash_attention_beats_plain_attention_by_its_static_schedule(tpu):
    blocks = flash_attention.BlockSizes(block_q=512, block_k_major=512, block_k=512, block_b=1)
    kernel = functools.partial(flash_attention.flash_attention, block_sizes=blocks)
    q = spec(1, 4, 2048, 128)
    fused = tpu(kernel, (q, q, q), "v5e")
    schedule = fused.kernel("flash_attention").schedule
    flops = 4 * 4 * 2048**2 * 128
    assert schedule.grid_steps == 4 * 4 * 4
    assert schedule.mxu_cycles == flops / fused.target.chip.flops_per_cycle
    assert schedule.bundles_per_step > schedule.mxu_cycles / schedule.grid_steps
    assert 0.3 < schedule.mxu_utilisation < 1
    # The kernel states its flops, so they are in the roofline.
    assert fused.costs.kernel_flops == pytest.approx(flops, rel=0.02)
    assert fused.mfu_bound is None

    rows = spec(1, 2048, 4, 128)
    plain = tpu(jax.nn.dot_product_attention, (rows, rows, rows), "v5e")
    assert plain.costs.matmul_flops == flops
    assert fused.estimated_cycles < 0.5 * plain.estimated_cycles


def test_a_kernel_that_asks_for_too_much_vector_memory_is_refused_by_the_compiler(tpu):
    def huge(x):
        return pl.pallas_call(
            lambda x_ref, o_ref: o_ref.__setitem__(..., x_ref[...] * 2),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        )(x)

    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        tpu(huge, (spec(16384, 8192, dtype=jnp.float32),), "v5e")
