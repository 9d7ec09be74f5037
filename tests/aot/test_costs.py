"""Flops, bytes and collectives, loops multiplied out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxeff.aot.collectives import Collective
from jaxeff.aot.costs import module_costs
from jaxeff.aot.hlo import parse_module
from jaxeff.aot.targets import parse_target


def costs_of(text):
    return module_costs(parse_module(text))


def compiled_costs(f, *args):
    return costs_of(jax.jit(f).lower(*args).compile().as_text())


def test_flops_of_a_scanned_stack_are_those_of_all_its_layers():
    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    w, x = jnp.ones((6, 32, 32)), jnp.ones((8, 32))
    costs = compiled_costs(jax.value_and_grad(loss), w, x)
    forward = 6 * 2 * 8 * 32 * 32
    # The first layer's input needs no gradient, but the scan computes it like the others'.
    assert costs.matmul_flops == 3 * forward
    assert costs.transcendentals >= 6 * 8 * 32
    assert not costs.unknown_loops


def test_a_loop_on_data_counts_once_and_is_named():
    def f(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: x @ x, x)

    costs = compiled_costs(f, jnp.ones((16, 16)))
    assert costs.matmul_flops == 2 * 16**3
    assert len(costs.unknown_loops) == 1


def test_the_dearer_branch_of_a_conditional_counts():
    def f(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x + 1, x)

    assert compiled_costs(f, True, jnp.ones((16, 16))).matmul_flops == 2 * 2 * 16**3


def test_positions_of_a_convolution_outside_the_input_are_not_counted():
    # A product as TPUs write it: rows over b, f x 1 contracted, columns over o and 0, where the
    # window of 2 meets the single padded position once per output.
    text = """HloModule m

ENTRY %main (a: bf16[4,64,48,1], b: bf16[4,64,2,16]) -> bf16[48,2,16,1] {
  %a = bf16[4,64,48,1]{1,2,0,3} parameter(0)
  %b = bf16[4,64,2,16]{3,1,0,2} parameter(1)
  ROOT %c = bf16[48,2,16,1]{2,0,3,1} convolution(%a, %b), window={size=2x4 pad=1_1x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1
}
"""  # noqa: E501
    assert costs_of(text).matmul_flops == 2 * 48 * (2 * 16) * (4 * 64)


def test_a_convolution_counts_its_window():
    text = """HloModule m

ENTRY %main (x: f32[2,8,8,3], k: f32[3,3,3,16]) -> f32[2,6,6,16] {
  %x = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %k = f32[3,3,3,16]{3,2,1,0} parameter(1)
  ROOT %c = f32[2,6,6,16]{3,2,1,0} convolution(%x, %k), window={size=3x3}, dim_labels=b01f_01io->b01f
}
"""  # noqa: E501
    assert costs_of(text).matmul_flops == 2 * 2 * 6 * 6 * 16 * 3 * 3 * 3


SLICED = """HloModule m

%fused (stack: f32[32,1024], buffer: f32[32,1024], i: s32[]) -> f32[32,1024] {
  %stack = f32[32,1024]{1,0} parameter(0)
  %buffer = f32[32,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,1024}
  %twice = f32[1,1024]{1,0} add(%row, %row)
  ROOT %put = f32[32,1024]{1,0} dynamic-update-slice(%buffer, %twice, %i, %zero)
}

ENTRY %main (s: f32[32,1024], b: f32[32,1024], i: s32[]) -> f32[32,1024] {
  %s = f32[32,1024]{1,0} parameter(0)
  %b = f32[32,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[32,1024]{1,0} fusion(%s, %b, %i), kind=kLoop, calls=%fused
}
"""


def test_a_slice_of_a_stack_and_an_update_in_place_cost_their_own_size():
    assert costs_of(SLICED).hbm_bytes == pytest.approx(2 * 4096, abs=8)


def test_data_in_vector_memory_costs_no_traffic():
    text = SLICED.replace("%b = f32[32,1024]{1,0}", "%b = f32[32,1024]{1,0:T(8,128)S(1)}")
    text = text.replace("ROOT %f = f32[32,1024]{1,0}", "ROOT %f = f32[32,1024]{1,0:T(8,128)S(1)}")
    assert costs_of(text).hbm_bytes == pytest.approx(4096, abs=8)


# How a TPU hides a gather behind other work: one transfer, three fusions that mention it.
HIDDEN_GATHER = """HloModule m

%start (p: bf16[1,512]) -> (bf16[1,512], bf16[1,2048], u32[]) {
  %p = bf16[1,512]{1,0} parameter(0)
  %g = bf16[1,2048]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %s = (bf16[1,512]{1,0}, bf16[1,2048]{1,0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[1,512], q: bf16[1,2048], x: f32[8,8]) -> (f32[8,8], bf16[1,2048]) {
  %p = bf16[1,512]{1,0} parameter(0)
  %q = bf16[1,2048]{1,0} parameter(1)
  %x = f32[8,8]{1,0} parameter(2)
  %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = bf16[1,2048]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %t = (f32[8,8]{1,0}, bf16[1,2048]{1,0}) tuple(%d, %g)
}

%end (p: bf16[1,512], q: bf16[1,2048]) -> bf16[1,2048] {
  %p = bf16[1,512]{1,0} parameter(0)
  %q = bf16[1,2048]{1,0} parameter(1)
  %g = bf16[1,2048]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %s = bf16[1,2048]{1,0} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[1,512], x: f32[8,8]) -> bf16[1,2048] {
  %a = bf16[1,512]{1,0} parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  %f = (bf16[1,512]{1,0}, bf16[1,2048]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %q = bf16[1,2048]{1,0} get-tuple-element(%f), index=1
  %h = (f32[8,8]{1,0}, bf16[1,2048]{1,0}) fusion(%a, %q, %x), kind=kOutput, calls=%beside
  %r = bf16[1,2048]{1,0} get-tuple-element(%h), index=1
  ROOT %e = bf16[1,2048]{1,0} fusion(%a, %r), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_a_gather_hidden_behind_other_work_counts_once():
    costs = costs_of(HIDDEN_GATHER)
    assert [(c.kind, len(c.group), c.payload, c.count) for c in costs.collectives] == [
        ("all-gather", 4, 4096, 1)
    ]
    assert costs.matmul_flops == 2 * 8**3
    # The gather's source and result, and the product's operands and result.
    assert costs.hbm_bytes == 1024 + 4096 + 3 * 256 - 256


def test_an_all_reduce_that_is_sliced_is_a_reduce_scatter():
    text = """HloModule m

%all-reduce-scatter (p: f32[64,8], i: s32[]) -> f32[16,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %r = f32[64,8]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[16,8]{1,0} dynamic-slice(%r, %i, %z), dynamic_slice_sizes={16,8}
}

ENTRY %main (a: f32[64,8], i: s32[]) -> f32[16,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[16,8]{1,0} fusion(%a, %i), kind=kCustom, calls=%all-reduce-scatter
}
"""
    (collective,) = costs_of(text).collectives
    assert (collective.kind, collective.payload) == ("reduce-scatter", 64 * 8 * 4)
    assert collective.sent == 64 * 8 * 4 * 3 / 4


def test_the_all_reduce_of_a_product_split_along_its_inner_dimension_has_the_products_size():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:4])  # fmt: skip

    def place(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    def f(x, w):
        def body(x, w):
            return jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, PartitionSpec())), 0

        return jax.lax.scan(body, x, w)[0]

    costs = compiled_costs(f, place((8, 64)), place((5, 64, 64), None, "x"))
    (collective,) = [c for c in costs.collectives if c.payload > 4]
    assert (collective.kind, len(collective.group)) == ("all-reduce", 4)
    assert (collective.payload, collective.count) == (8 * 64 * 4, 5)
    assert collective.sent == 2 * 8 * 64 * 4 * 3 / 4
    assert costs.matmul_flops == 5 * 2 * 8 * 64 * 64 / 4


def coordinates(*topology):
    return [tuple(int(i) for i in p) for p in np.ndindex(*topology)]


def test_a_ring_around_the_torus_uses_both_directions():
    target = parse_target("v5p:4x4x4")
    group = tuple(range(0, 64, 16))  # along the first dimension
    gather = Collective("all-gather", group, payload=4e9)
    rate = target.chip.link_bandwidth
    assert gather.seconds(target, coordinates(4, 4, 4)) == pytest.approx(3e9 / (2 * rate))
    half = Collective("all-gather", (0, 16), payload=4e9)
    assert half.seconds(target, coordinates(4, 4, 4)) == pytest.approx(2e9 / rate)


def test_two_dimensions_of_the_torus_share_a_collective():
    target = parse_target("v5p:4x4x4")
    plane = tuple(range(16))
    reduce = Collective("all-reduce", plane, payload=16e9, count=3)
    seconds = 3 * 2 * 15e9 / (4 * target.chip.link_bandwidth)
    assert reduce.seconds(target, coordinates(4, 4, 4)) == pytest.approx(seconds)


def test_collectives_between_gpus_use_the_switch():
    target = parse_target("h100:8")
    exchange = Collective("all-to-all", tuple(range(8)), payload=8e9)
    assert exchange.seconds(target, None) == pytest.approx(7e9 / 450e9)
