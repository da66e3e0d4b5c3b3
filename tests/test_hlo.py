"""Where the operations of a program were written."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from shardtrain import hlo, make_mesh


def spectral(x):
    return jnp.fft.fft(x, axis=0)


def compiled():
    x = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=jax.NamedSharding(make_mesh("height=8"), P("height"))
    )
    return jax.jit(lambda x: spectral(x) * 2).lower(x).compile().as_text()


def gathers(text):
    return [one for body in hlo.parse(text)[1].values() for one in body if one.collective == "all-gather"]


def test_an_operation_is_named_by_the_innermost_line_that_counts():
    text = compiled()
    places = hlo.places(text, lambda path: "/jax/" in path)
    (gather,) = gathers(text)
    line = spectral.__code__.co_firstlineno + 1
    assert places[gather.frame] == f"test_hlo.py:{line} (spectral)"
    assert (
        hlo.places(text, lambda path: path.endswith("test_hlo.py")).get(gather.frame, "").count("test_hlo")
        == 0
    )
    assert hlo.places(text, lambda path: True) == {}


def test_a_program_without_frames_or_with_other_ones_has_no_places():
    text = compiled()
    assert hlo.places("HloModule jit_f\n\nENTRY %main (x: f32[]) -> f32[] {\n}\n", lambda path: False) == {}
    for table in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        hlo.places(text.replace(table, "Others"), lambda path: False)
    assert hlo.places(text.replace("file_name_id", "file"), lambda path: False) == {}
    assert set(hlo.places(text.replace("parent_frame_id", "parent"), lambda path: False)) != set()
