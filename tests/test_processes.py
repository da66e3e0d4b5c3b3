"""Two real processes over loopback train as one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recipe_process import environment

from shardtrain.launch.local import free_port

WORKER = Path(__file__).parent / "process_worker.py"


def run(processes: int, devices: int, spec: str, out: Path) -> list[dict]:
    port = free_port()
    args = [[str(n) for n in (port, processes, rank, devices)] for rank in range(processes)]
    jobs = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *a, spec, str(out / f"{spec}-{processes}-{a[2]}")],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for a in args
    ]
    errors = [job.communicate(timeout=240)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * processes, errors
    return [json.loads((out / f"{spec}-{processes}-{rank}").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("spec", ["data=2,height=2", pytest.param("data=4", marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one(spec, tmp_path):
    (one,) = run(1, 4, spec, tmp_path)
    two = run(2, 2, spec, tmp_path)
    for result in two:
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-10)
        assert result["test"] == pytest.approx(one["test"], rel=1e-10)
        mine = one["outputs"][slice(*result["rows"])]
        np.testing.assert_allclose(result["outputs"], mine, rtol=1e-8)
    assert [result["rows"] for result in two] == [[0, 16], [16, 32]]
