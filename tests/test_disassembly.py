"""kernels/disassembly.py: loops and what they hold, in listings whose loops are known and in compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

from gpt2_fast.kernels import aot  # noqa: E402
from gpt2_fast.kernels.disassembly import Loop, main_loops  # noqa: E402


def _sass(text: str) -> str:
    """A listing as nvdisasm -c prints it; labels stand alone, instructions get addresses."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n".join(t if t.endswith(":") else f"        /*{16 * i:04x}*/      {t} ;" for i, t in enumerate(lines))


ONE_BY_ONE = """
    LDC R1, c[0x0][0x28]
    @P5 BRA `(.L_x_1)
    .L_x_0:
    LDGSTS.E.BYPASS.128 [R97], desc[UR10][R22.64], P5
    WARPGROUP.ARRIVE
    HGMMA.64x32x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    WARPGROUP.ARRIVE
    HGMMA.64x32x16.F32.BF16 R88, gdesc[UR16], R88, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @!P5 BRA `(.L_x_0)
    .L_x_1:
    EXIT
    .L_x_2:
    BRA `(.L_x_2)
"""


def test_a_loop_has_what_is_between_its_head_and_its_jump():
    (loop,) = main_loops(_sass(ONE_BY_ONE))
    assert loop == Loop(instructions=8, products=2, waits=2, arrives=2, copies=1)
    assert loop.serialised
    first, _, rest = ONE_BY_ONE.partition("    WARPGROUP.DEPBAR.LE gsb0, 0x0\n    WARPGROUP.ARRIVE\n")
    (loop,) = main_loops(_sass(first + rest))
    assert loop == Loop(instructions=6, products=2, waits=1, arrives=1, copies=1)
    assert not loop.serialised


def test_the_innermost_loops_with_products_count_and_jumps_from_elsewhere_make_none():
    """A loop over tiles around one over K, a wait that spins, and its slow path at the end of the code, from which the
    code goes on in the middle of the loop."""
    listing = _sass("""
        .L_tile:
        UTMALDG.2D [UR4], [UR6]
        .L_k:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5
        @!P0 BRA `(.L_slow)
        .L_ready:
        UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12], tmem[UR14], idesc[UR15], UP0
        UBLKCP.S.G [UR4], [UR6], UR7
        BRA.U UP1, `(.L_k)
        @P2 BRA `(.L_tile)
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        EXIT
        .L_slow:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5
        @!P0 BRA `(.L_slow)
        BRA `(.L_ready)
    """)
    assert main_loops(listing) == [Loop(instructions=8, products=1, waits=0, arrives=0, copies=1)]


def test_amd_assembly():
    listing = """
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx2 s[0:1], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
	s_add_i32 s2, s2, 1
	s_cbranch_scc1 .LBB0_2
.LBB0_3:
	v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
	s_endpgm
    .vgpr_count: 128
"""
    assert main_loops(listing) == [Loop(instructions=3, products=1, waits=0, arrives=0, copies=0)]


def test_code_without_products_has_no_main_loop():
    assert main_loops("") == []
    assert main_loops(_sass(".L_x_0:\nFFMA R1, R2, R3, R1\n@P0 BRA `(.L_x_0)\nEXIT")) == []


OLD = """
import dataclasses, pathlib, sys
from gpt2_fast.kernels import aot, attention, attention_backward
source = pathlib.Path(attention_backward.__file__).read_text()
start, end = source.index("    below = tl.cdiv("), source.index("    scale2 = ", source.index("    below = "))
bounds = "    below = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, T)\\n    crossed = below\\n"
old = (source[:start] + bounds + source[end:]).replace("from .", "from gpt2_fast.kernels.")
pathlib.Path(sys.argv[1], "old.py").write_text(old)
sys.path.insert(0, sys.argv[1])
import old
name = "attention.backward_dkdv bf16 D=64"
(spec,) = (s for s in attention.aot_specs() if s.name == name and s.archs == (90,))
for kernel in (spec.kernel, old.backward_dkdv_kernel):
    report = aot.inspect(aot.compile_spec(dataclasses.replace(spec, kernel=kernel), 90))
    print(*aot.problems(report), [tuple(loop) for loop in report["loops"]], sep="|")
"""


@pytest.mark.timeout(300)
def test_a_kernel_whose_products_run_one_at_a_time_is_a_problem(tmp_path):
    """dK, dV as it was: for all that the compiler knew, its loop over the diagonal might not run."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", OLD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    shipped, old = (line.split("|") for line in done.stdout.splitlines())
    assert len(shipped) == 1, shipped  # its loops alone
    assert old[:-1] == ["waits 12 times for the 12 tensor-core products of a main loop"] * 2


def test_waits_are_a_problem_only_where_each_product_has_one():
    report = {"spilled_bytes": 0, "shared_bytes": 0, "shared_limit": 1024}
    loop = Loop(instructions=300, products=12, waits=2, arrives=4, copies=6)
    one = Loop(instructions=40, products=1, waits=1, arrives=1, copies=2)  # nothing to overlap it with
    assert aot.problems({**report, "loops": [loop, one]}) == []
    assert aot.problems({**report, "loops": [loop, loop._replace(waits=12)]}) == [
        "waits 12 times for the 12 tensor-core products of a main loop"
    ]
