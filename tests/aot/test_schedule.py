"""Static schedules from bundles written by hand."""

import pytest

from jaxeff.aot.schedule import kernel_name, parse_schedule
from jaxeff.aot.targets import CHIPS

V5E = CHIPS["v5e"]

# A grid of 8 steps (10 runs of the loop: two more fill and drain the pipeline); each runs an inner
# loop of 24 trips with one matrix product on each of four arrays.
BUNDLES = """= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov.u32 0  ;;  %s2_s0 = smov.u32 0 }
   0x1 LB: > { %s3_s1 = sphi %s1_s0, %s4_s1 } /* Start region 9 :: Start region 10 */
   0x2   : > { %5 = dma.hbm_to_vmem [thread:$0] /*
base_bounds: (64, 1)
iteration_bounds: (2, 4)
element_size_in_bytes: 2048 */ }
   0x3   : > { %7 = sbr.rel (%p6_p0) target = $region12 }
   0x4 LB: >> { %s8_s2 = sphi %s2_s0, %s9_s2 } /* Start region 11 */
   0x5   : >> { %10 = vmatmul.bf16.gmra.mxu0 %v1_v0  ;;  %11 = vmatmul.bf16.gmra.mxu1 %v2_v0 }
   0x6   : >> { %12 = vmatmul.bf16.gmra.mxu2 %v1_v0  ;;  %13 = vmatmul.bf16.gmra.mxu3 %v2_v0 }
   0x7   : >> { %s9_s2 = sadd.s32 1, %s8_s2  ;;  %p14_p1 = scmp.ge.s32.totalorder %s9_s2, 24 /* loop exit test */ }
   0x8   : > { %15 = sbr.rel (!%p14_p1) target = $region11 }
   0x9   :  {} /* End region 11 */
   0xa   : > { %16 = vst [vmem:[#allocation3_spill] sm:$0xff] /*vst_source=*/%v3_v3 }
   0xb PF: > { %s4_s1 = sadd.s32 1, %s3_s1 } /* Start/End empty region 12 */
   0xc   : > { %p17_p2 = scmp.ge.s32.totalorder %s4_s1, 10 /* loop exit test */ }
   0xd   :  { %18 = sbr.rel (!%p17_p2) target = $region9 }
   0xe   :  {} /* End region 9 */
   0xf   :  { %19 = vsyncpa [#allocation4], 1 } /* exit bundle */
"""  # noqa: E501

HEADER = """== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""


def slots(rows):
    return HEADER + "\n".join(" ".join(map(str, row)) for row in rows) + "\n"


def test_bundles_are_multiplied_by_the_trips_of_their_loops():
    schedule = parse_schedule("kernel", BUNDLES, "", V5E)
    grid, inner = schedule.loops
    assert (grid.depth, grid.first, grid.last, grid.trips) == (1, 0x1, 0xE, 8)
    assert (inner.depth, inner.first, inner.last, inner.trips) == (2, 0x4, 0x9, 24)
    assert schedule.bundles == 16
    assert schedule.grid_steps == 8
    assert schedule.bundles_per_step == 8 + 6 * 24
    assert schedule.total_bundles == 2 + 8 * (8 + 6 * 24)
    assert not schedule.unknown_trips


def test_matrix_products_take_their_time_at_peak():
    schedule = parse_schedule("kernel", BUNDLES, "", V5E)
    # 16 rows of bfloat16 through an array of 128 x 128: 16 cycles; four arrays side by side.
    assert schedule.mxu_cycles == pytest.approx(8 * 24 * 16)
    assert schedule.cycles == max(schedule.total_bundles, schedule.mxu_cycles)
    assert schedule.mxu_utilisation == pytest.approx(schedule.mxu_cycles / schedule.cycles)


def test_a_bound_that_is_not_static_counts_once_and_is_said():
    text = BUNDLES.replace("%s9_s2, 24", "%s9_s2, %s99_s3")
    schedule = parse_schedule("kernel", text, "", V5E)
    assert schedule.unknown_trips
    assert schedule.loops[1].trips is None
    assert schedule.bundles_per_step == 14


def test_a_loop_need_not_start_at_zero():
    text = BUNDLES.replace("%s2_s0 = smov.u32 0", "%s2_s0 = smov.u32 20")
    assert parse_schedule("kernel", text, "", V5E).loops[1].trips == 4


def test_a_loop_ends_where_the_next_one_begins():
    second = """
   0x9 LB: >> { %s20_s3 = sphi %s2_s0, %s21_s3 } /* Start region 13 */
   0xa   : >> { %s21_s3 = sadd.s32 1, %s20_s3  ;;  %p22_p3 = scmp.ge.s32.totalorder %s21_s3, 5 }
   0xb   : > { %23 = sbr.rel (!%p22_p3) target = $region13 }"""
    before, _, after = BUNDLES.partition("\n   0x9   :  {} /* End region 11 */")
    for address in range(0xF, 0x9, -1):
        after = after.replace(f"   {address:#x} ", f"   {address + 2:#x} ")
    schedule = parse_schedule("kernel", before + second + after, "", V5E)
    grid, first, then = schedule.loops
    assert (first.first, first.last, first.trips) == (0x4, 0x8, 24)
    assert (then.first, then.trips) == (0x9, 5)
    inside = 5 * 24 + 5 * (then.last - then.first + 1)
    outside = grid.last - grid.first + 1 - 5 - (then.last - then.first + 1)
    assert schedule.total_bundles == 2 + 8 * (inside + outside)


def test_slots_give_spills_and_the_share_of_reserved_matrix_units():
    rows = [[0] * 11 for _ in range(16)]
    rows[5][0], rows[6][0] = 2, 4
    rows[0xA][9], rows[3][7] = 1, 2  # one spill, two fills
    rows[0xF][9] = 1  # outside every loop
    schedule = parse_schedule("kernel", BUNDLES, slots(rows), V5E)
    assert schedule.spills == 3
    assert schedule.mxu_busy == pytest.approx(6 / (4 * 14))


def test_a_kernel_without_loops_runs_once():
    text = "     0   :  { %1 = vnop }\n   0x1   :  { %2 = vnop }\n"
    schedule = parse_schedule("kernel", text, "", V5E)
    assert (schedule.grid_steps, schedule.total_bundles, schedule.loops) == (1, 2, ())


def test_text_without_bundles_is_refused():
    with pytest.raises(ValueError, match="holds no bundles"):
        parse_schedule("kernel", "nothing", "", V5E)


def test_dump_files_of_the_programs_frame_are_no_kernels(tmp_path):
    assert kernel_name(tmp_path / "17-flash_attention.1-03-final_bundles.txt") == (
        "flash_attention.1"
    )
    assert kernel_name(tmp_path / "17-TLP-03-final_bundles.txt") is None
    assert kernel_name(tmp_path / "17-<late-finalization>-71-final_bundles.txt") is None
