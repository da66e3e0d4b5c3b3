import pytest
from jax.sharding import PartitionSpec as P

from shardtrain.errors import UserError
from shardtrain.layout import Dimensions, Layout, default_dimensions, resolve, spec
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


ALL = make_mesh("data=2,depth=1,height=2,width=2,channel=1")
DATA, HEIGHT, WIDTH, CHANNEL, NONE = ("data",), ("height",), ("width",), ("channel",), ()


@pytest.mark.parametrize(
    ("names", "shape", "mesh", "expected"),
    [
        ("batch", (8,), MESH, (DATA,)),
        ("batch features", (8, 6), MESH, (DATA, CHANNEL)),
        ("batch time features", (8, 20, 6), MESH, (DATA, NONE, CHANNEL)),
        ("batch time features", (8, 20, 6), make_mesh("data=2,width=4"), (DATA, NONE, NONE)),
        ("batch width channels", (8, 20, 6), make_mesh("data=2,width=4"), (DATA, WIDTH, NONE)),
        ("batch height width channels", (8, 7, 5, 6), ALL, (DATA, HEIGHT, WIDTH, NONE)),
        ("batch depth height width channels", (8, 3, 7, 5, 6), ALL, (DATA, NONE, HEIGHT, WIDTH, NONE)),
        ("batch time height width channels", (8, 9, 7, 5, 6), MESH, (DATA, NONE, HEIGHT, NONE, CHANNEL)),
        ("batch channels height width", (8, 6, 7, 5), MESH, (DATA, CHANNEL, HEIGHT, NONE)),
        ("batch width channels", (8, 5, 7), MESH, (DATA, NONE, NONE)),  # 7 channels do not divide by 2
        ("batch band features", (8, 4, 6), MESH, (DATA, NONE, CHANNEL)),
        ("batch _ _", (8, 4, 6), MESH, (DATA, NONE, NONE)),
        ("batch height width channels", (8, 7, 5, 6), None, (NONE, NONE, NONE, NONE)),
    ],
)
def test_an_input_is_cut_by_the_names_of_its_dimensions(names, shape, mesh, expected):
    dimensions = Dimensions.parse(names)
    assert dimensions.cut(shape, Layout(), mesh, pixels=True) == expected
    alone = (expected[0], *[()] * (len(shape) - 1))
    assert dimensions.cut(shape, Layout(), mesh, pixels=False) == alone


def test_an_input_is_cut_as_its_layout_says():
    layout = Layout(batch=("data", "height"), height=(), channels=())
    images = Dimensions.parse("batch height width channels")
    expected = ("data", "height"), (), ("width",), ()
    assert images.cut((8, 8, 8, 8), layout, ALL, pixels=True) == expected
    sequence = Dimensions.parse("batch time features")
    assert sequence.cut((8, 8, 8), layout, ALL, pixels=True) == (("data", "height"), (), ())


def test_dimensions_read_as_they_print():
    assert Dimensions.parse(" batch  time features ") == Dimensions(("batch", "time", "channels"))
    assert str(Dimensions.parse("batch time features")) == "batch time channels"
    assert Dimensions.parse(str(default_dimensions(6))) == default_dimensions(6)


@pytest.mark.parametrize(
    ("rank", "names"),
    [
        (1, "batch"),
        (2, "batch _"),
        (3, "batch width channels"),
        (4, "batch height width channels"),
        (5, "batch depth height width channels"),
        (6, "batch _ _ _ _ _"),
    ],
)
def test_inputs_that_declare_nothing_are_images(rank, names):
    assert default_dimensions(rank) == Dimensions.parse(names)
    if 3 <= rank <= 5:
        shape = (8, *range(5, 3 + rank), 6)
        cut = default_dimensions(rank).cut(shape, Layout(), MESH, pixels=True)
        assert Layout().activation(shape, MESH) == spec(cut)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Dimensions.parse(""), "dimensions '': the first must be 'batch'; write for example"),
        (lambda: Dimensions.parse("height width"), "'height width': the first must be 'batch'"),
        (lambda: Dimensions.parse("time batch features"), "the first must be 'batch'"),
        (lambda: Dimensions.parse("batch time batch"), "'batch' is there twice"),
        (lambda: Dimensions.parse("batch height height"), "'height' is there twice"),
        (lambda: Dimensions.parse("batch time time"), "'time' is there twice"),
        (lambda: Dimensions.parse("batch channels features"), "'channels' is there twice"),
        (lambda: Dimensions.parse("batch, time"), "'batch,' is no name; write for example 'batch time"),
        (lambda: Dimensions.parse("batch 3 channels"), "'3' is no name; .*dimensions of other names are not"),
        (lambda: Dimensions.parse(("batch", "time")), "give names in a string"),
        (lambda: default_dimensions(0), "0 dimensions has no batch"),
        (
            lambda: Dimensions.parse("batch time").cut((8, 4, 3), Layout(), MESH, pixels=True),
            r"shape \(8, 4, 3\) has 3 dimensions, and 'batch time' names 2; name every dimension",
        ),
    ],
)
def test_dimensions_are_refused_in_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()
