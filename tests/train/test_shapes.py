"""A trainer of shapes alone: it compiles what the trainer of arrays runs."""

import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain import UserError


@pytest.mark.parametrize("mesh", ["data=2,height=2,channel=2", "pipe=2,data=2,height=2"])
def test_a_model_of_shapes_compiles_to_the_same_program(mesh):
    """Dropout's random key, batch norm's statistics, the optimizer's state: none needs an array."""

    def make():
        rngs = nnx.Rngs(0)
        layers = [st.nn.Conv(1, 8, (3, 3), rngs=rngs), st.nn.BatchNorm(8, rngs=rngs), nnx.relu]
        layers += [st.nn.Dropout(0.5, rngs=rngs), st.nn.GlobalAvgPool(), st.nn.Linear(8, 4, rngs=rngs)]
        return nnx.Sequential(*layers)

    images, labels = np.zeros((8, 8, 8, 1), np.float32), np.zeros(8, np.int32)
    options = {"mesh": st.make_mesh(mesh), "accumulate": 2}
    real = st.Trainer(make(), optax.adam(1e-3), **options)
    shapes = st.Trainer(nnx.eval_shape(make), optax.adam(1e-3), **options)
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (images, labels))
    lies = shapes.shapes_of(*bare)
    placed = real.place(images, labels)
    assert jax.tree.structure(placed) == jax.tree.structure(lies)
    for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(lies), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    texts = [real.prepare(images, labels).as_text(), shapes.prepare(*bare).as_text()]
    bare = [re.sub(r"metadata=\{[^}]*\}|stack_frame_id=\d+", "", text.split("\nENTRY")[-1]) for text in texts]
    assert bare[0] == bare[1]
    for use in (
        lambda t: t.fit([(images, labels)], steps=1),
        lambda t: t.predict(images),
        lambda t: t.save("x"),
    ):
        with pytest.raises(UserError, match="the model is one of shapes"):
            use(shapes)
    with pytest.raises(UserError, match=r"a batch of 7 does not divide .* use 8"):
        shapes.shapes_of(images[:7], labels[:7])
