"""The table of docs/kernels.md: how many programs of a kernel are resident, and how many waves a launch takes."""

import sys

from docs.examples import ROOT

sys.path.append(str(ROOT / "tools"))

import waves
from cards import CARDS

H100 = CARDS["sm_90a"]


def test_a_program_takes_what_cuda_says():
    launch = waves.Launch((36, 49, 2), warps=4)
    found = waves.occupancy(H100, launch, registers=154, shared=112 * 1024)
    # 154 registers of 32 threads are 4,928, in units of 256: 5,120; four warps take 20,480 of 65,536.
    assert (found.by_registers, found.by_shared, found.by_threads) == (3, 2, 16)
    assert (found.resident, found.limit) == (2, "shared memory")
    assert found.waves == 3528 / 264
    assert round(found.busy, 3) == round(3528 / (14 * 264), 3)


def test_a_launch_below_one_wave_leaves_places_empty():
    found = waves.occupancy(H100, waves.Launch((144,), warps=4), registers=32, shared=112 * 1024)
    assert found.busy == found.waves == 144 / 264


def test_the_table_is_what_the_tool_writes():
    rows = ["| " + " | ".join(row) + " |" for row in waves.table("sm_90a", waves.CONFIG)]
    assert len(rows) == 6
    text = (ROOT / "docs/kernels.md").read_text()
    assert [row for row in rows if row not in text] == []
