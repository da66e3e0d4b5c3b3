"""Export and import of a model's variables as one file."""

import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shardtrain as st
from shardtrain import UserError


class Net(nnx.Module):
    """Parameters, running statistics and a random stream, in two kinds of floats."""

    def __init__(self, seed, width=8):
        rngs = nnx.Rngs(seed)
        self.conv = st.nn.Conv(1, width, (3, 3), param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm = st.nn.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.drop = st.nn.Dropout(0.5, rngs=nnx.Rngs(seed + 1))
        self.head = st.nn.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(st.ops.global_avg_pool(self.norm(self.conv(x)))))


def values(model):
    def plain(x):
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return {path: plain(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("shapes", [False, True], ids=["arrays", "shapes"])
def test_all_variables_come_back(shapes, tmp_path):
    one = Net(0)
    path = st.export_state(tmp_path / "net", one)
    assert path == tmp_path / "net.npz"
    other = nnx.eval_shape(lambda: Net(5)) if shapes else Net(5)
    st.import_state(path, other)
    ours, theirs = values(one), values(other)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        np.testing.assert_array_equal(np.asarray(value), np.asarray(theirs[key]), err_msg=str(key))
    x = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(one(x), other(x))  # the same masks too


def test_numpy_alone_reads_it(tmp_path):
    one = Net(0)
    with np.load(st.export_state(tmp_path / "net.npz", one), allow_pickle=False) as file:
        np.testing.assert_array_equal(file["head.kernel"], one.head.kernel[...])
        assert {"norm.mean", "conv.kernel"} < set(file.files)
        assert any("key" in name for name in file.files)


def test_what_a_trainer_trained_is_handed_on(tmp_path):
    trainer = st.Trainer(Net(0), optax.sgd(0.1), mesh=st.make_mesh("data=2,channel=2"))
    x = np.random.default_rng(0).random((8, 8, 8, 1), np.float32)
    trainer.fit([(x, np.zeros(8, np.int32))], steps=1, progress=False)
    other = Net(3)
    st.import_state(st.export_state(tmp_path / "net", trainer.model), other)
    other.eval()
    np.testing.assert_allclose(other(jnp.asarray(x)), trainer.predict(x), rtol=1e-2, atol=1e-3)


def test_another_model_is_refused_and_left_as_it_was(tmp_path):
    path = st.export_state(tmp_path / "net", Net(0))
    wide = Net(1, width=16)
    before = values(wide)
    with pytest.raises(UserError, match=r"conv.bias is \(8,\) of .* there and \(16,\) of bfloat16 here"):
        st.import_state(path, wide)
    for key, value in values(wide).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(before[key]))
    with pytest.raises(UserError, match=r"kernel is not in the file|is only in the file"):
        st.import_state(path, st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0)))


class Evil:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_a_file_runs_no_code(tmp_path, capsys):
    pickled, planted = tmp_path / "pickled.npz", tmp_path / "planted.npz"
    pickled.write_bytes(pickle.dumps(Evil()))
    with zipfile.ZipFile(planted, "w") as archive, archive.open("head.kernel.npy", "w") as file:
        np.lib.format.write_array(file, np.array([Evil()], dtype=object))
    for path in (pickled, planted, tmp_path / "none.npz"):
        with pytest.raises(UserError, match=r"cannot be read .*give a file that export_state wrote"):
            st.import_state(path, Net(0))
    assert capsys.readouterr().out == ""


def test_a_file_that_is_damaged_or_something_else_is_refused_in_a_sentence(tmp_path):
    """Whatever bits are flipped, of the archive's own tables too: it is refused, or the numbers are right."""
    whole = st.export_state(tmp_path / "net", Net(0)).read_bytes()
    expected = values(Net(0))
    damaged, other = tmp_path / "damaged.npz", Net(5)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for at in random.integers(0, len(content), random.integers(1, 6)):
            content[at] ^= 1 << random.integers(8)
        damaged.write_bytes(content)
        try:
            st.import_state(damaged, other)
        except UserError:
            refused += 1
            continue
        for key, value in values(other).items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[key]))
    assert refused > 100
    single = tmp_path / "single.npy"
    np.save(single, np.ones(3))
    with pytest.raises(UserError, match="give a file that export_state wrote"):
        st.import_state(single, Net(0))


def test_a_file_without_an_end_is_not_read(tmp_path):
    """A pipe, a device, and an array of a terabyte in a small archive."""
    pipe, large = tmp_path / "pipe.npz", tmp_path / "large.npz"
    os.mkfifo(pipe)
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)}
    path = st.export_state(tmp_path / "net", Net(0))
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(large, "w") as other:
        for name in archive.namelist():
            with other.open(name, "w") as file:
                np.lib.format.write_array_header_1_0(file, header)
    for place in (pipe, "/dev/zero", large):
        with pytest.raises(UserError, match=r"it is no regular file|is \(274877906944,\) of float32 there"):
            st.import_state(place, Net(0))


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        st.export_state(tmp_path / "no" / "net", Net(0))
