"""What a step of a 3-D U-Net needs on each device, from the compiler: it falls by the product of the cuts."""

import math

import jax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from shardtrain import Layout, make_mesh, models
from shardtrain.mesh import parse
from shardtrain.nn import partition

from .test_summary import compiled_step, float64

VOLUME = (1, 32, 32, 32, 1)
MESHES = "data=1", "depth=2", "depth=2,height=2", "depth=2,height=2,width=2", "depth=2,height=2,channel=2"


def weights(model, mesh):
    """Bytes of parameters on one device."""
    specs = partition.parameter_spec(model, mesh, Layout())
    return sum(
        8 * math.prod(NamedSharding(mesh, specs[path]).shard_shape(v.get_value().shape))
        for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
    )


@pytest.mark.slow
def test_memory_falls_by_the_product_of_the_cuts():
    need = {}
    for text in MESHES:
        model = float64(models.UNet, classes=8, channels=8, rank=3, features=(8, 16))
        mesh = make_mesh(text, devices=jax.devices()[: math.prod(parse(text).values())])
        program = compiled_step(model, mesh, (*VOLUME[:-1], 8), {}, ()).memory_analysis()
        need[text] = program.temp_size_in_bytes, program.argument_size_in_bytes, weights(model, mesh)
    temporary, arguments, kept = need["data=1"]
    for text, (temp, held, own) in need.items():
        cuts = parse(text)
        shards, channel = math.prod(cuts.values()), cuts.get("channel", 1)
        # Biases and norms of few channels are all that does not divide.
        assert own == pytest.approx(kept / channel, rel=0.01), text
        assert held - own == (arguments - kept) / shards, text  # the batch and its gradient
        # Two rows to the 8 of the lower level, on every cut. Where channels are cut too, a device gathers
        # those of a convolution's input and keeps them for the backward pass.
        more = (1 + 2 / 8) ** (len(cuts) if shards > 1 else 0) if channel == 1 else 2
        assert temporary / shards * 0.8 <= temp <= temporary / shards * more, (text, temp, temporary)
