"""The kernels of n-gram counts, compiled for chips that are not there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from interpreted import run_in_tritons_interpreter
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.ngram_counts import ngram_counts


def spec(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


@pytest.fixture(scope="module")
def scheduled(tpu):
    """Reports of compiled programs, by implementation, chip and shape."""

    @functools.cache
    def compile_once(implementation, chip, batch, length, num_references):
        method = "sort" if implementation == "xla" else "auto"
        count = functools.partial(ngram_counts, implementation=implementation, method=method)
        args = (spec(batch, length), spec(batch, num_references, length))
        return tpu(count, args, chip)

    return compile_once


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("shape", [(256, 512, 1), (32, 100, 3), (3, 7, 1)])
def test_the_tpu_kernel_compiles(scheduled, chip, shape):
    report = scheduled("mosaic_tpu", chip, *shape)
    schedule = report.kernel("ngram_counts").schedule
    assert report.memory.fits
    # The loops over keys, where the time goes, are those at the greatest depth.
    deepest = max(loop.depth for loop in schedule.loops)
    passes = [loop for loop in schedule.loops if loop.depth == deepest]
    bundles = min(loop.last - loop.first + 1 for loop in passes)
    # 32 x 16 rows in registers of 8, nine vector instructions each, four in a bundle.
    least = 32 // 8 * 16 * 9 / 4
    assert least <= bundles < 1.15 * least


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_without_a_name_the_kernel_is_taken_where_it_is_faster(scheduled):
    assert scheduled(None, "v5e", 256, 512, 1).kernel("ngram_counts")
    assert not scheduled(None, "v5e", 64, 4096, 1).kernels


@pytest.mark.tpu_compile
@pytest.mark.xdist_group("tpu_compile")
def test_every_chip_of_a_mesh_counts_its_own_sentences(tpu):
    from jaxeff.aot import target_mesh

    mesh = target_mesh("v5e:2x2", (2, 2), ("data", "tensor"))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    count = functools.partial(ngram_counts, implementation="mosaic_tpu")
    args = (spec(1024, 64, sharding=batch), spec(1024, 1, 64, sharding=batch))
    report = tpu(count, args, "v5e:2x2", mesh=mesh)
    kernel = report.kernel("ngram_counts")
    # A quarter of the sentences, in columns of 128 with 64 + 8 rows, read twice as candidates.
    assert kernel.nbytes == 4 * (1024 // 4) * 3 * (64 + 8)
    # Only the counts travel, and no tokens.
    assert all(c.payload <= 1024 * 4 * 4 for c in report.costs.collectives)


@pytest.mark.cuda_compile
@pytest.mark.parametrize("shape", [(256, 128, 1), (4, 1000, 3), (1, 1, 1)])
def test_the_gpu_kernel_compiles_without_spills(cuda, shape):
    pytest.importorskip("jax_triton")
    batch, length, num_references = shape
    args = (spec(batch, length), spec(batch, num_references, length))
    report = cuda(functools.partial(ngram_counts, implementation="triton"), args, "h100")
    (kernel,) = report.kernels
    assert kernel.resources.entry == "count_kernel"
    assert kernel.resources.spill_bytes == 0
    assert kernel.resources.blocks == batch * -(-length // 64)


@pytest.mark.cuda_compile
def test_a_triton_kernel_can_be_vmapped(cuda):
    pytest.importorskip("jax_triton")
    count = jax.vmap(functools.partial(ngram_counts, implementation="triton"))
    report = cuda(count, (spec(3, 8, 64), spec(3, 8, 1, 64)), "h100")
    assert [kernel.resources.blocks for kernel in report.kernels] == [3 * 8]


@pytest.mark.optional_dependency
def test_the_gpu_kernel_counts_like_dictionaries_in_tritons_interpreter():
    run_in_tritons_interpreter("ngram_counts_triton_interpreter.py", "counts agree")
