"""What the compilers make of the kernels, without a GPU: every configuration is lowered, and some compiled."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import shardtrain as st
from shardtrain.kernels.winograd import winograd

ROOT = Path(__file__).parents[2]
KINDS = {"mosaic": "NVIDIA H100 80GB HBM3", "triton": "NVIDIA A100-SXM4-80GB"}


def lowered(kind, f, *shapes, dtype):
    """StableHLO for a card that is not here."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    with use_abstract_mesh(mesh):
        return jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


USUAL = [("float32", 4, 3)]
CONFIGURATIONS = [
    pytest.param(*c, marks=() if c in USUAL else pytest.mark.slow)
    for dtype in ("float32", "bfloat16", "float16")
    for c in [(dtype, *tile) for tile in ((2, 3), (4, 3), (6, 3), (4, 5), (2, 7), (5, 2))]
]


@pytest.mark.parametrize("implementation", ["mosaic", "triton"])
@pytest.mark.parametrize(("dtype", "outputs", "taps"), CONFIGURATIONS)
def test_every_configuration_lowers(implementation, dtype, outputs, taps):
    x, kernel = (1, 2 * outputs + taps, 9 + taps, 70), (taps, taps, 70, 30)
    names = {"mosaic": "mosaic_gpu", "triton": "triton"}

    def f(x, kernel, dy, fused=None):
        def conv(x, kernel):
            return winograd(x, kernel, outputs=(outputs,) * 2, fused=fused)

        y, pull = jax.vjp(conv, x, kernel)
        return y, pull(dy)

    dy = 1, 2 * outputs + 1, 10, 30
    text = lowered(KINDS[implementation], f, x, kernel, dy, dtype=dtype)
    assert text.count(names[implementation]) >= 5  # forward, and both gradients
    if outputs in (2, 4):
        fused = lowered(KINDS[implementation], lambda *o: f(*o, fused=True)[0], x, kernel, dy, dtype=dtype)
        assert names[implementation] in fused


def test_blackwell_lowers():
    def f(x, kernel):
        y, pull = jax.vjp(lambda x, k: st.ops.conv(x, k, algorithm="winograd"), x, kernel)
        return pull(y)

    for dtype, name in (("bfloat16", "mosaic_gpu"), ("float32", "triton")):
        assert name in lowered("NVIDIA B200", f, (1, 8, 8, 70), (3, 3, 70, 30), dtype=dtype)


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_every_precision_lowers(precision):
    def f(x, kernel):
        return winograd(x, kernel, outputs=(4, 4), precision=precision)

    for kind, name in ((KINDS["mosaic"], "mosaic_gpu"), (KINDS["triton"], "triton")):
        text = lowered(kind, f, (1, 8, 9, 70), (3, 3, 70, 30), dtype="float32")
        assert (name if precision == "high" else "triton") in text


def test_under_vmap_and_in_the_layer():
    def f(x, kernel):
        return jax.vmap(lambda x: st.ops.conv(x, kernel, algorithm="winograd"))(x)

    for kind, name in ((KINDS["mosaic"], "mosaic_gpu"), (KINDS["triton"], "triton")):
        for dtype in ("bfloat16", "float32"):  # several steps along the channels
            assert name in lowered(kind, f, (3, 1, 8, 8, 128), (3, 3, 128, 128), dtype=dtype)
    assert "mosaic_gpu" not in lowered(
        "NVIDIA Tesla V100", f, (3, 1, 8, 8, 4), (3, 3, 4, 4), dtype=jnp.float32
    )


def test_explained():
    device = AbstractDevice(device_kind=KINDS["mosaic"], num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        found = st.ops.explain_conv((32, 28, 28, 512), (3, 3, 512, 512), dtype="bfloat16")
    assert found.implementation == "mosaic"
    assert "winograd here in mosaic" in str(found)
    assert st.ops.explain_conv((32, 28, 28, 512), (3, 3, 512, 512)).implementation == "xla"


def evidence(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/gpu_evidence.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )


@pytest.mark.parametrize(
    "target", ["sm_90a", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "sm_100a"))]
)
def test_compiled_for_a_card(tmp_path, target):
    """Registers, spills, shared memory and tensor cores of the kernels, and a training step for 8 cards."""
    if not (Path(sys.prefix) / "gpu-compiler").is_dir():
        pytest.skip("jax's CUDA plugin is not installed; run `make gpu-compiler`")
    run = evidence(tmp_path, "--targets", target, "--quick", "--json", str(tmp_path / "rows.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert max(map(len, run.stdout.splitlines())) <= 100
    assert f"{target}: data=2,height=2,channel=2 on 1 host(s)" in run.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["target"] for row in rows} == {target}
    assert len(rows) >= 10
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] < 255, row
        assert row["smem_bytes"] <= (166912 if target == "sm_80" else 232448), row
        assert row["least_bytes"] <= row["bytes"], row
        if "product" not in row["kernel"]:
            assert row["bytes"] < 1.25 * row["least_bytes"], row
        else:
            assert row["tensor_core_instructions"] > 0, row
            assert row["flops"] > 0
            assert row["smem_bytes"] > 0


def test_evidence_speaks_to_its_user(tmp_path):
    run = evidence(tmp_path, "--quick", "--json", str(tmp_path / "none" / "rows.json"))
    assert run.returncode == 2
    assert "there is no folder" in run.stderr
    run = evidence(tmp_path, "--targets", "sm_75")
    assert run.returncode == 2
    assert "invalid choice: 'sm_75'" in run.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "8 bytes of spills"),
        ({"smem_bytes": 240000}, "240000 bytes of shared memory, 232448 are there"),
        ({"tensor_core_instructions": 0}, "no tensor core instruction"),
        ({"kernel": "transform of x", "tensor_core_instructions": 0}, None),
    ],
)
def test_budgets(monkeypatch, changes, said):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool, cards = importlib.import_module("gpu_evidence"), importlib.import_module("cards")
    row = tool.KernelEvidence("product", "", "sm_90a", 100, 0, 100000, 16, 1, 1, 1, 1.0)
    assert tool.broken(dataclasses.replace(row, **changes), cards.CARDS["sm_90a"]) == said
