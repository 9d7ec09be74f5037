"""Reading HLO text: shapes, groups, trip counts; on snippets and on what XLA:CPU writes."""

import jax
import jax.numpy as jnp
import pytest

from jaxeff.aot.collectives import first_group
from jaxeff.aot.hlo import parse_instruction, parse_module, trip_count


def loop_module(limit="8", start="0", step="1", direction="LT", annotation=""):
    return f"""HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%next, %x)
}}

%condition (q: (s32[], f32[4])) -> pred[] {{
  %q = (s32[], f32[4]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant({limit})
  ROOT %less = pred[] compare(%j, %n), direction={direction}
}}

ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %init = (s32[], f32[4]{{0}}) tuple(%copied, %a)
  %loop = (s32[], f32[4]{{0}}) while(%init), condition=%condition, body=%body{annotation}
  ROOT %out = f32[4]{{0}} get-tuple-element(%loop), index=1
}}
"""


def trips_of(text):
    module = parse_module(text)
    return trip_count(module, module.entry, module.entry.instructions["loop"])


@pytest.mark.parametrize(
    ("settings", "trips"),
    [
        ({}, 8),
        ({"limit": "32", "step": "4"}, 8),
        ({"limit": "10", "start": "3"}, 7),
        ({"limit": "10", "step": "4"}, 3),
        ({"limit": "7", "direction": "LE"}, 8),
        ({"limit": "0", "start": "6", "step": "-2", "direction": "GT"}, 3),
        ({"annotation": ', backend_config={"known_trip_count":{"n":"5"}}'}, 5),
    ],
)
def test_trip_count_follows_from_start_limit_and_step(settings, trips):
    assert trips_of(loop_module(**settings)) == trips


def test_trip_count_of_a_loop_on_data_is_unknown():
    text = loop_module().replace("compare(%j, %n), direction=LT", "compare(%j, %n), direction=NE")
    assert trips_of(text) is None


def test_trip_count_is_found_through_a_fused_condition():
    text = loop_module(limit="12").replace(
        "ROOT %less = pred[] compare(%j, %n), direction=LT",
        "ROOT %less = pred[] fusion(%j, %n), kind=kLoop, calls=%test",
    )
    fused = """
%test (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}

%body"""
    assert trips_of(text.replace("\n%body", fused, 1)) == 12


def test_trip_count_is_found_when_the_limit_is_carried():
    text = (
        loop_module()
        .replace("(s32[], f32[4]", "(s32[], s32[], f32[4]")
        .replace("tuple(%next, %x)", "tuple(%next, %k, %x)")
        .replace("%x = f32[4]{0} get-tuple-element(%p), index=1",
                 "%k = s32[] get-tuple-element(%p), index=1\n"
                 "  %x = f32[4]{0} get-tuple-element(%p), index=2")
        .replace("%n = s32[] constant(8)", "%n = s32[] get-tuple-element(%q), index=1")
        .replace("%init = ", "%limit = s32[] constant(20)\n  %init = ")
        .replace("tuple(%copied, %a)", "tuple(%copied, %limit, %a)")
    )  # fmt: skip
    assert trips_of(text) == 20


def test_elements_of_tuples_may_be_named_without_an_instruction():
    text = (
        loop_module(limit="9")
        .replace("  %j = s32[] get-tuple-element(%q), index=0\n", "")
        .replace("compare(%j, %n)", "compare(%q#0, %n)")
        .replace("  %i = s32[] get-tuple-element(%p), index=0\n", "")
        .replace("add(%i, %step)", "add(%p#0, %step)")
    )
    assert trips_of(text) == 9
    nested = parse_module("""HloModule m

ENTRY %main (p: (s32[], (f32[8,2], bf16[3]))) -> bf16[3] {
  %p = (s32[], /*index=1*/(f32[8,2]{1,0:T(8,128)}, bf16[3]{0:T(256)S(1)})) parameter(0)
  ROOT %c = bf16[3]{0} copy(%p#1#1)
}
""")
    (operand,) = nested.operands(nested.entry, nested.entry.root)
    assert (operand.shape.dtype, operand.shape.dims, operand.shape.memory_space) == (
        "bf16",
        (3,),
        1,
    )


def test_an_instruction_is_split_into_its_parts():
    line = (
        "  ROOT %all-reduce.3 = (bf16[32,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}) "
        "all-reduce(%a.1, %b), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add, "
        'metadata={op_name="jit(f)/dot, (x)"}'
    )
    parsed = parse_instruction(line)
    assert parsed.is_root and parsed.name == "all-reduce.3" and parsed.opcode == "all-reduce"
    assert [(a.dtype, a.dims, a.memory_space) for a in parsed.arrays] == [
        ("bf16", (32, 128), 1),
        ("f32", (), 0),
    ]
    assert parsed.nbytes == 32 * 128 * 2 + 4
    assert parsed.operands == ("a.1", "b")
    assert parsed.attribute("channel_id") == "4"
    assert parsed.called("to_apply") == "add"


def test_narrow_types_have_their_bits():
    parsed = parse_instruction("  %x = s4[16,3]{1,0} copy(%y)")
    assert parsed.nbytes == 24


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b','a'}", tuple(range(8))),
        ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
    ],
)
def test_groups_are_read_in_every_notation(groups, first):
    line = f"  %r = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    assert sorted(first_group(parse_instruction(line))) == sorted(first)


def test_a_permutation_is_between_two_devices():
    line = "  %r = f32[8]{0} collective-permute(%x), source_target_pairs={{0,4},{4,0}}"
    assert first_group(parse_instruction(line)) == (0, 4)


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("HloModule empty\n")


def test_scans_in_compiled_text_have_their_lengths():
    def stack(x, w):
        def layer(x, w):
            inner, _ = jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=3)
            return inner, None

        return jax.lax.scan(layer, x, w)[0]

    x, w = jnp.ones((4, 16)), jnp.ones((5, 16, 16))
    module = parse_module(jax.jit(stack).lower(x, w).compile().as_text())
    trips = [
        trip_count(module, computation, instruction)
        for computation in module.computations.values()
        for instruction in computation
        if instruction.opcode == "while"
    ]
    assert sorted(trips) == [3, 5]
