import logging
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from recipe_process import environment
from rich.console import Console

from shardtrain.errors import UserError
from shardtrain.mesh import describe, make_mesh


def test_text_and_keywords_name_the_same_mesh():
    mesh = make_mesh("data=2,height=2,channel=2")
    assert dict(mesh.shape) == {"data": 2, "height": 2, "channel": 2}
    assert make_mesh(channel=2, data=2, height=2) == mesh
    assert make_mesh("channel=2, data=-1", height=2) == mesh
    assert [d.id for d in mesh.devices.flat] == list(range(8))


def test_axes_come_in_the_order_of_their_traffic():
    assert make_mesh("channel=2,height=2,pipe=2").axis_names == ("pipe", "height", "channel")
    assert dict(make_mesh().shape) == {"data": 1}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=2,hight=2", "no axis 'hight'; the axes are replica, pipe, data"),
        ("data", "'data' is not axis=number"),
        ("data=two", "'data=two' is not axis=number"),
        ("data=2,data=2", "'data' twice"),
        ("data=0", "data=0 is no size"),
        ("data=-2", "data=-2 is no size"),
        ("data=16", "needs 16 devices, there are 8; data=8 would fit"),
        ("data=2,height=4,channel=2", "needs 16 devices, there are 8; data=2,height=2,channel=2 would fit"),
        (
            "data=-1,height=3",
            "8 devices do not divide by 3, so data=-1 has no size; data=2,height=3 would fit",
        ),
        ("data=-1,height=-1", "2 sizes of -1"),
    ],
)
def test_errors_name_the_numbers_and_a_mesh_that_fits(spec, message):
    with pytest.raises(UserError, match=message):
        make_mesh(spec)


def test_given_twice():
    with pytest.raises(UserError, match="both in 'data=2' and as a keyword"):
        make_mesh("data=2", data=2)


def test_every_mesh_that_an_error_proposes_fits():
    for spec in (
        "data=16",
        "data=3,height=3,channel=3",
        "channel=100",
        "height=5,width=5",
        "data=-1,width=9",
    ):
        with pytest.raises(UserError) as error:
            make_mesh(spec)
        proposed = str(error.value).split("; ")[1].removesuffix(" would fit")
        assert make_mesh(proposed).size <= 8


def test_fewer_devices_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        make_mesh("data=3")
    assert "mesh data=3 uses 3 of 8 devices" in caplog.text


def hosts(count, each):
    """Devices of several hosts in the order a scheduler may give them: mixed."""
    devices = [SimpleNamespace(id=i, process_index=i // each, platform="gpu") for i in range(count * each)]
    return devices[::-1]


def grid(monkeypatch, spec, devices):
    """The hosts of a mesh's coordinates; jax's Mesh takes real devices only, so it is left out."""
    made, real = {}, make_mesh("data=1")
    monkeypatch.setattr(
        "shardtrain.compat.auto_mesh", lambda grid, names: made.update(grid=grid, names=names) or real
    )
    make_mesh(spec, devices=devices)
    return made["names"], [
        [d.process_index for d in row] for row in made["grid"].reshape(made["grid"].shape[0], -1)
    ]


def test_chatty_axes_stay_inside_a_host(monkeypatch, caplog):
    names, by_data = grid(monkeypatch, "height=2,channel=2,data=2", hosts(2, 4))
    assert names == ["data", "height", "channel"]
    assert by_data == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert "crosses" not in caplog.text


def test_chatty_axes_that_must_cross_are_said(monkeypatch, caplog):
    grid(monkeypatch, "height=8", hosts(2, 4))
    assert "mesh axis height=8 crosses hosts" in caplog.text


def test_no_process_is_left_without_devices(monkeypatch):
    with pytest.raises(UserError, match=r"leaves the processes \[1\] without any; data=2,height=4 would fit"):
        grid(monkeypatch, "data=1,height=4", hosts(2, 4))


def test_describe_shows_every_device_once():
    console = Console(width=100, record=True)
    console.print(describe(make_mesh("data=2,channel=4")))
    text = console.export_text()
    assert all(f"{jax.devices()[0].platform}:{i}" in text for i in range(8))
    assert max(map(len, text.splitlines())) <= 100


def test_a_laptop_is_told_how_devices_are_simulated():
    """Where the variable is set already, or devices are simulated, it is not named."""
    code = """
import shardtrain as st
try:
    st.make_mesh("data=2,height=2,channel=2")
except st.UserError as error:
    print(error)
"""
    hint = "to simulate 8 devices on CPUs, set JAX_NUM_CPU_DEVICES=8 before jax starts"
    for devices, said in ((None, True), ("4", False)):
        env = environment() | ({} if devices is None else {"JAX_NUM_CPU_DEVICES": devices})
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert f"needs 8 devices, there are {devices or 1}; " in done.stdout
        assert (hint in done.stdout) == said
