"""Programs and kernels compiled for NVIDIA GPUs with the real compiler."""

import jax
import jax.numpy as jnp
import pytest

from jaxeff.aot.gpu_kernels import blocks_per_sm, parse_listing, unescape
from jaxeff.aot.targets import CHIPS

H100 = CHIPS["h100"]


def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.cuda_compile
@pytest.mark.parametrize("target", ["h100", "h200"])
def test_a_train_step_compiles_with_exact_flops(cuda, target):
    def step(w, x):
        def loss(w):
            return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

        return w - 0.1 * jax.grad(loss)(w).astype(w.dtype)

    report = cuda(step, (spec(6, 256, 256), spec(128, 256)), target, donate_argnums=0)
    assert report.costs.matmul_flops == 3 * 6 * 2 * 128 * 256 * 256
    assert report.memory.arguments == (6 * 256 * 256 + 128 * 256) * 2
    assert report.memory.fits and report.num_devices == 1
    assert report.roofline.estimate is None and report.xla_flops is None


@pytest.mark.cuda_compile
def test_several_gpus_of_a_machine_exchange_over_their_switch(cuda):
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxeff.aot import target_mesh

    mesh = target_mesh("h100:4", (4,), ("x",))
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32,
                             sharding=NamedSharding(mesh, PartitionSpec(None, "x")))  # fmt: skip
    w = jax.ShapeDtypeStruct((1024, 512), jnp.float32,
                             sharding=NamedSharding(mesh, PartitionSpec("x")))  # fmt: skip
    report = cuda(jnp.dot, (x, w), "h100:4")
    moved = [c for c in report.costs.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    assert sum(c.payload for c in moved) == 512 * 512 * 4
    assert report.roofline.collectives > 0


@pytest.mark.cuda_compile
def test_fused_attention_counts_its_products(cuda):
    def attention(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    q = spec(2, 1024, 4, 64)
    report = cuda(attention, (q, q, q), "h100")
    assert report.costs.matmul_flops == 4 * 2 * 4 * 1024**2 * 64
    assert report.memory.temporaries < 2**20 + report.memory.outputs


@pytest.mark.cuda_compile
def test_a_triton_kernel_reports_registers_spills_and_occupancy(cuda):
    triton_call = pytest.importorskip("jax_triton").triton_call
    kernel = pytest.importorskip("aot_triton_kernel").scale_rows

    def f(x):
        return triton_call(
            x,
            kernel=kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(x.shape[0],),
            num_warps=4,
            compute_capability=90,
            columns=x.shape[1],
        )

    report = cuda(f, (spec(4096, 1024, dtype=jnp.float32),), "h100")
    (entry,) = report.kernels
    used = entry.resources
    assert (used.entry, used.blocks, used.threads) == ("scale_rows", 4096, 128)
    assert 0 < used.registers <= 255
    assert used.spill_bytes == 0
    assert 1 <= used.blocks_per_sm <= 16
    assert used.waves == pytest.approx(4096 / (132 * used.blocks_per_sm))
    assert entry.nbytes == 2 * 4096 * 1024 * 4


LISTING = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Used 12 registers
ptxas info    : Compiling entry function 'attention' for 'sm_90a'
ptxas info    : Function properties for attention
    48 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem
"""


def test_an_assemblers_listing_gives_registers_spills_and_shared_memory():
    assert parse_listing(LISTING, "attention") == (255, 48, 1024)
    assert parse_listing(LISTING, "other") == (12, 0, 0)
    assert parse_listing(LISTING, "absent") is None


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # threads: 2048 on a multiprocessor
        (255, 128, 0, 2 * 65536 // (256 * 32 * 4) // 2),  # registers: 256 x 32 per warp
        (64, 128, 98304, 2),  # shared memory: 228 KiB, 1 KiB of it reserved for each block
        (16, 32, 0, 32),  # no more than 32 blocks
    ],
)
def test_the_scarcest_resource_limits_the_blocks_on_a_multiprocessor(
    registers, threads, shared, blocks
):
    assert blocks_per_sm(registers, threads, shared, H100) == blocks


def test_escaped_bytes_are_restored():
    assert unescape(r"x\234\n\"\\ok") == b'x\x9c\n"\\ok'
