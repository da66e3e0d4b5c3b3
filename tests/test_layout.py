import pytest
from jax.sharding import PartitionSpec as P

from shardtrain.errors import UserError
from shardtrain.layout import Layout, resolve
from shardtrain.mesh import make_mesh

MESH = make_mesh("data=2,height=2,channel=2")


def test_names_match_by_default():
    assert Layout().activation((8, 7, 5, 16), MESH) == P("data", "height", None, "channel")
    assert Layout().activation((8, 7, 5, 15), MESH) == P("data", "height", None, None)
    assert Layout().activation((8, 4, 7, 5, 16), MESH) == P("data", None, "height", None, "channel")
    assert Layout().activation((8, 16), MESH) == P("data", "channel")
    assert Layout().activation((8, 16), None) == P(None, None)


def test_parameters_are_cut_where_they_divide():
    spread = Layout(parameters="data")
    assert Layout().parameter((3, 3, 8, 16), -1, MESH) == P(None, None, None, "channel")
    assert spread.parameter((3, 3, 8, 16), -1, MESH) == P(None, None, "data", "channel")
    assert spread.parameter((3, 3, 1, 16), -1, MESH) == P(None, None, None, ("channel", "data"))
    assert spread.parameter((16,), 0, MESH) == P(("channel", "data"))
    assert spread.parameter((10,), 0, MESH) == P("channel")
    assert spread.parameter((3, 3, 3, 5), -1, MESH) == P(None, None, None, None)


def test_one_axis_cuts_one_dimension():
    with pytest.raises(UserError, match="'data' is asked to cut both batch and height"):
        Layout(height="data")
    with pytest.raises(UserError, match="'channel' is asked to cut both channels and parameters"):
        Layout(parameters="channel")
    with pytest.raises(UserError, match="'hight' is no mesh axis"):
        Layout(height="hight")
    for axis, why in (("pipe", "keeps each stage's parameters on .* its rank"), ("replica", "of their own")):
        with pytest.raises(UserError, match=rf"parameters='{axis}', but .*{why}.*; use for example 'data'"):
            Layout(parameters=axis)
        with pytest.raises(UserError, match=rf"width='{axis}', but the axes pipe and replica cut no array"):
            Layout(width=axis)
    assert Layout(batch=("data", "height"), height=()).activation((8, 4, 4, 3), MESH) == P(
        ("data", "height"), None, None, None
    )


def test_patterns():
    paths = ["stem", "blocks.0.conv1", "blocks.1.conv1", "head"]
    layouts = resolve(Layout(), {"blocks.*": {"height": ()}, "blocks.1.*": {"channels": ()}}, paths)
    assert layouts["stem"] == Layout()
    assert layouts["blocks.0.conv1"] == Layout(height=())
    assert layouts["blocks.1.conv1"] == Layout(channels=())
    with pytest.raises(UserError, match=r"'block\.\*' matches no layer; the layers are stem, blocks"):
        resolve(Layout(), {"block.*": {"height": ()}}, paths)
    with pytest.raises(UserError, match=r"sets \['rows'\]; a layout has batch, channels, depth"):
        resolve(Layout(), {"head": {"rows": ()}}, paths)
    whole = {"height": ()}
    assert resolve(Layout(), {"*": whole}, ["", "head"]) == {"": Layout(), "head": Layout(height=())}
    assert resolve(Layout(), {"": whole}, ["", "head"]) == {"": Layout(height=()), "head": Layout()}
    with pytest.raises(UserError, match=r"matches no layer; the layers are head$"):
        resolve(Layout(), {"tail": whole}, ["", "head"])
