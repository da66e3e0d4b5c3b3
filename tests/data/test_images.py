"""Reading data sets, good and broken, and batches as a function of (seed, step)."""

import gzip
import itertools
import pickle
import struct

import numpy as np
import pytest

from shardtrain.data import images as files
from shardtrain.data.images import Arrays, eval_batches, load, read_idx, train_batches
from shardtrain.errors import UserError

IDX_CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
NPY_NAMES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")


def idx_bytes(array):
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, IDX_CODES[array.dtype.name], array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(path, array):
    raw = idx_bytes(array)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def make_set(seed=0):
    """Train images and labels, test images and labels: 12 and 5 of 6x7, labels 0 to 3."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (n, 6, 7), dtype=np.uint8) for n in (12, 5)]
    labels = [np.arange(n, dtype=np.uint8) % 4 for n in (12, 5)]
    return images[0], labels[0], images[1], labels[1]


def write_npy(folder, arrays):
    for name, array in zip(NPY_NAMES, arrays, strict=True):
        np.save(folder / name, array)


def numbered(n, shape=(2, 2, 1)):
    """Images whose every pixel is the number of the image, which is its label as well."""
    images = np.broadcast_to(np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1), (n, *shape)).copy()
    return Arrays(images, np.arange(n, dtype=np.int32))


def labels_of(batches, steps):
    return np.stack([labels for _, labels in itertools.islice(batches, steps)])


# --- idx files


@pytest.mark.parametrize("name", ["a-ubyte", "a-ubyte.gz"])
@pytest.mark.parametrize("dtype", IDX_CODES)
def test_read_idx_gives_back_what_was_written(tmp_path, name, dtype):
    array = (np.arange(24).reshape(2, 3, 4) * 5 - 20).astype(dtype)
    read = read_idx(write_idx(tmp_path / name, array))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.dtype(dtype)
    assert read.dtype.isnative


def test_read_idx_goes_by_content_not_by_the_name_gz(tmp_path):
    (tmp_path / "a.gz").write_bytes(idx_bytes(np.arange(3, dtype=np.uint8)))
    assert read_idx(tmp_path / "a.gz").tolist() == [0, 1, 2]


GOOD = idx_bytes(np.arange(60, dtype=np.uint8).reshape(3, 4, 5))  # 16 + 60 bytes


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (GOOD[:-1], r"expected 76 bytes, found 75"),
        (GOOD + b"x", r"expected 76 bytes, found 77"),
        (GOOD[:10], r"expected 16 bytes, found 10"),
        (b"", r"no idx file: .*found nothing"),
        (GOOD[:3], r"no idx file: .*found 00 00 08"),
        (b"\x01" + GOOD[1:], r"no idx file: .*found 01 00 08 03"),
        (GOOD[:2] + b"\x0a" + GOOD[3:], r"no idx file: .*found 00 00 0a 03"),
        (GOOD[:3] + b"\x00" + GOOD[4:], r"no idx file: .*found 00 00 08 00"),
        (GOOD[:3] + b"\xff" + GOOD[4:], r"no idx file: .*found 00 00 08 ff"),
        (GOOD[:4] + b"\xff" * 12, r"is damaged: expected \d{29} bytes, found 16"),
        (GOOD[:4] + b"\0" * 4 + b"\xff" * 8, r"is empty: its header says \[0, 4294967295, 4294967295\]"),
        (b"PK\x03\x04" + GOOD, r"no idx file"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_damaged_idx_file_is_named(tmp_path, raw, message, pack):
    path = tmp_path / "broken-ubyte"
    path.write_bytes(pack(raw))
    with pytest.raises(UserError, match=rf"broken-ubyte .*{message}"):
        read_idx(path)


def test_a_gzip_stream_that_breaks_off_tells_how_much_came(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    packed = gzip.compress(idx_bytes(array))
    path = tmp_path / "short.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(
        UserError, match=r"short.gz is damaged: expected 39216 bytes, found (\d+) \(gzip: "
    ) as info:
        read_idx(path)
    found = int(str(info.value).split("found ")[1].split()[0])
    assert 10_000 < found < 30_000


@pytest.mark.parametrize("at", [12, -6], ids=["in the deflate stream", "in the checksum"])
def test_a_gzip_stream_with_a_flipped_byte_is_damaged(tmp_path, at):
    packed = bytearray(gzip.compress(GOOD))
    packed[at] ^= 0xFF
    (tmp_path / "bad.gz").write_bytes(packed)
    with pytest.raises(UserError, match=r"bad.gz is .*\(gzip: "):
        read_idx(tmp_path / "bad.gz")


def test_an_idx_file_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"nothing-ubyte cannot be read: No such file"):
        read_idx(tmp_path / "nothing-ubyte")


# --- folders


@pytest.mark.parametrize("layout", ["idx", "idx.gz", "npy", "npz"])
def test_every_layout_of_a_folder_gives_the_same_set(tmp_path, layout):
    arrays = make_set()
    if layout == "npy":
        write_npy(tmp_path, arrays)
    elif layout == "npz":
        np.savez(tmp_path / "train.npz", images=arrays[0], labels=arrays[1])
        np.savez_compressed(tmp_path / "test.npz", images=arrays[2], labels=arrays[3])
    else:
        for name, array in zip(IDX_NAMES, arrays, strict=True):
            write_idx(tmp_path / (name + layout.removeprefix("idx")), array)
    read = load(str(tmp_path))
    assert (read.name, read.classes, len(read.train), len(read.test)) == (tmp_path.name, 4, 12, 5)
    assert read.train.images.dtype == np.uint8  # a quarter of float32
    np.testing.assert_array_equal(read.train.images, arrays[0][..., None])
    np.testing.assert_array_equal(read.test.images, arrays[2][..., None])
    np.testing.assert_array_equal(read.train.labels, arrays[1])
    assert read.test.labels.dtype == np.int32


def test_colour_and_float_images_keep_their_values(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.random((4, 5, 5, 3)), rng.random((2, 5, 5, 3))
    write_npy(tmp_path, (train, np.arange(4), test, np.arange(2)))
    read = load(str(tmp_path))
    assert read.train.images.dtype == np.float32
    np.testing.assert_array_equal(read.train.images, train.astype(np.float32))


@pytest.mark.parametrize(
    ("at", "array", "message"),
    [
        (0, np.zeros((12, 6, 7), np.int32), r"train_images.npy: images are \(12, 6, 7\) of int32; store"),
        (0, np.zeros((12, 42), np.uint8), r"train_images.npy: images are \(12, 42\) of uint8"),
        (0, np.zeros((12, 1, 6, 7, 1), np.uint8), r"train_images.npy: images are \(12, 1, 6, 7, 1\)"),
        (0, np.zeros((0, 6, 7), np.uint8), r"train_images.npy: images are \(0, 6, 7\).*at least one"),
        (0, np.zeros((12, 6, 7), bool), r"train_images.npy: images are .* of bool"),
        (1, np.arange(12) - 1, r"train_labels.npy: labels run from -1 to 10; number the classes 0, 1, 2"),
        (1, np.arange(12) + 2**40, r"train_labels.npy: labels run from 1099511627776"),
        (1, np.arange(12.0), r"train_labels.npy: labels are \(12,\) of float64"),
        (1, np.eye(12, dtype=int), r"train_labels.npy: labels are \(12, 12\)"),
        (1, np.arange(11), r"train_labels.npy has 11 labels for the 12 images of .*train_images.npy"),
        (
            2,
            np.zeros((5, 7, 6), np.uint8),
            r"test_images.npy: images are \(7, 6, 1\), the training images \(6, 7, 1\)",
        ),
        (3, np.zeros(0, int), r"test_labels.npy: labels are \(0,\).*at least one"),
    ],
)
def test_arrays_that_are_no_labelled_images_name_their_file(tmp_path, at, array, message):
    arrays = list(make_set())
    arrays[at] = array
    write_npy(tmp_path, arrays)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path))


class Trap:
    """Fails the test if a pickle of it is ever opened."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_pickles_are_never_opened(tmp_path):
    write_npy(tmp_path, make_set())
    (tmp_path / "train_images.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"train_images.npy: images cannot be read"):
        load(str(tmp_path))
    np.save(tmp_path / "train_images.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"train_images.npy: images cannot be read \(Object arrays"):
        load(str(tmp_path))


def test_broken_npy_and_npz_files_are_named(tmp_path):
    write_npy(tmp_path, make_set())
    whole = (tmp_path / "test_images.npy").read_bytes()
    (tmp_path / "test_images.npy").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"test_images.npy: images cannot be read"):
        load(str(tmp_path))
    (tmp_path / "test_images.npy").unlink()
    with pytest.raises(UserError, match=r"test_images.npy: images cannot be read \(No such file"):
        load(str(tmp_path))
    (tmp_path / "test_labels.npy").unlink()
    np.savez(tmp_path / "test.npz", images=make_set()[2])
    with pytest.raises(UserError, match=r"test.npz: labels cannot be read .*labels.npy"):
        load(str(tmp_path))
    (tmp_path / "test.npz").write_bytes(whole)
    with pytest.raises(UserError, match=r"test.npz: images cannot be read"):
        load(str(tmp_path))


def test_a_folder_without_a_set_says_what_belongs_there(tmp_path):
    with pytest.raises(
        UserError, match=r"holds no train set; .*train-images-idx3-ubyte.*train_images.npy.*train.npz"
    ):
        load(str(tmp_path))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    write_npy(tmp_path / "set", make_set())
    assert load("~/set").name == "set"


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(UserError, match=r"'cifar' is neither .*digits, fashion-mnist, or a folder"):
        load("cifar")
    with pytest.raises(UserError, match=r"gone': this folder does not exist"):
        load(str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"this folder does not exist"):
        load("~nobody_of_this_name/set")
    (tmp_path / "file.npz").touch()
    with pytest.raises(UserError, match=r"is a file; give the folder it is in"):
        load(str(tmp_path / "file.npz"))


# --- known sets


def test_digits_split_is_stratified_disjoint_and_fixed():
    digits = load("digits")
    assert (len(digits.train), len(digits.test), digits.classes) == (1437, 360, 10)
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.train.images.min() == 0
    assert digits.train.images.max() == 1
    counts = np.bincount(digits.train.labels) + np.bincount(digits.test.labels)
    # Stratified: of each digit the test set has a fifth, to within one image.
    assert np.abs(np.bincount(digits.test.labels) - counts * 360 / 1797).max() <= 1
    seen = [{image.tobytes() for image in part.images} for part in (digits.train, digits.test)]
    assert not seen[0] & seen[1]
    np.testing.assert_array_equal(load("digits").test.images, digits.test.images)


def test_fashion_mnist_that_is_missing_tells_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "FASHION_MNIST", tmp_path / "gone")
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist.*--data FOLDER"):
        load("fashion-mnist")


@pytest.mark.skipif(
    not files.FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_fashion_mnist():
    read = load("fashion-mnist")
    assert read.train.images.shape == (60000, 28, 28, 1)
    assert (read.classes, read.name) == (10, "fashion-mnist")
    assert np.bincount(read.test.labels).tolist() == [1000] * 10


# --- batches


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 2, 2, 1), np.uint8), np.zeros(2, np.int32), r"labels are \(2,\) .*give \(3,\)"),
        (np.zeros((3, 2, 2, 1), np.int64), np.zeros(3, np.int32), r"images are .* of int64"),
        (np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.int32), r"images are \(3, 2, 2\)"),
        (np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int64), r"labels are .* of int64"),
    ],
)
def test_arrays_must_fit_together(images, labels, message):
    with pytest.raises(UserError, match=message):
        Arrays(images, labels)


def test_uint8_is_scaled_and_floats_are_passed_through():
    raw = np.arange(256, dtype=np.uint8).reshape(16, 4, 4, 1)
    labels = np.arange(16, dtype=np.int32)
    ((images, out),) = eval_batches(Arrays(raw, labels), 16)
    assert images.dtype == np.float32
    assert out.dtype == np.int32
    np.testing.assert_array_equal(images, raw.astype(np.float32) / 255)
    as_float = raw.astype(np.float32) * 3
    ((images, _),) = eval_batches(Arrays(as_float, labels), 16)
    np.testing.assert_array_equal(images, as_float)
    images[:] = 7  # the batch is a copy
    assert as_float.max() == 765


def test_images_and_labels_stay_together():
    for images, labels in itertools.islice(train_batches(numbered(10), 4, seed=0), 6):
        assert images.shape == (4, 2, 2, 1)
        np.testing.assert_array_equal(images[:, 1, 0, 0], labels)


def test_the_seed_decides_the_batches():
    first, again, other = (labels_of(train_batches(numbered(50), 8, seed=s), 20) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_one_seeds_second_epoch_is_not_the_next_seeds_first():
    # Grain adds the epoch to the seed of a shuffle; `seed` has to be hashed before that.
    second = labels_of(train_batches(numbered(50), 50, seed=1, start=1), 1)
    assert (second != labels_of(train_batches(numbered(50), 50, seed=2), 1)).any()


@pytest.mark.parametrize("start", [1, 5, 6, 7, 40])
def test_start_goes_on_where_a_run_stopped(start):
    # 50 examples, batches of 8: epochs end inside a batch.
    whole = labels_of(train_batches(numbered(50), 8, seed=3), start + 5)
    np.testing.assert_array_equal(
        labels_of(train_batches(numbered(50), 8, seed=3, start=start), 5), whole[start:]
    )


@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_processes(groups, start):
    k = 8 // groups
    parts = [
        labels_of(train_batches(numbered(50), 8, seed=3, start=start, rows=range(g * k, (g + 1) * k)), 15)
        for g in range(groups)
    ]
    whole = labels_of(train_batches(numbered(50), 8, seed=3, start=start), 15)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize(("n", "batch"), [(48, 8), (50, 8), (7, 7), (5, 1), (1, 1)])
def test_every_epoch_is_a_permutation_and_epochs_differ(n, batch):
    steps = -(-4 * n // batch)
    places = labels_of(train_batches(numbered(n), batch, seed=0), steps).ravel()
    epochs = places[: 4 * n].reshape(4, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (4, 1)))
    if n >= 7:  # of 1 or 5 examples two orders may well agree
        assert len({epoch.tobytes() for epoch in epochs}) == 4
        assert (epochs[0] != np.arange(n)).any()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch_size": 11}, r"a batch of 11 is more than the 10 examples; use 10 or less"),
        ({"batch_size": 0}, r"batch size 0"),
        ({"seed": -1}, r"seed=-1"),
        ({"start": -1}, r"start=-1"),
        ({"rows": range(0, 3)}, r"range\(0, 3\) is no share of a batch of 8"),
        ({"rows": range(2, 6)}, r"range\(2, 6\) is no share"),
        ({"rows": range(8, 16)}, r"is no share"),
        ({"rows": range(-4, 0)}, r"is no share"),
        ({"rows": range(0, 8, 2)}, r"is no share"),
        ({"rows": range(4, 4)}, r"is no share"),
    ],
)
def test_train_batches_that_cannot_be_had(asked, message):
    # At the call, before the first batch is asked for.
    with pytest.raises(UserError, match=message):
        train_batches(numbered(10), **{"batch_size": 8, "seed": 0, **asked})


@pytest.mark.parametrize("batch", [1, 4, 5, 10, 16])
def test_eval_covers_every_example_once_in_order(batch):
    batches = [labels for _, labels in eval_batches(numbered(10), batch)]
    assert {len(labels) for labels in batches[:-1]} <= {batch}
    assert np.concatenate(batches).tolist() == list(range(10))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_eval_shares_add_up_also_in_the_ragged_last_batch(groups):
    k = 8 // groups
    # 18 = 8 + 8 + 2: of the last batch most processes have no row at all, but a batch all the same.
    shares = [list(eval_batches(numbered(18), 8, rows=range(g * k, (g + 1) * k))) for g in range(groups)]
    assert {len(share) for share in shares} == {3}
    assert all(images.shape == (len(labels), 2, 2, 1) for share in shares for images, labels in share)
    whole = [labels.tolist() for _, labels in eval_batches(numbered(18), 8)]
    joined = [np.concatenate([share[step][1] for share in shares]).tolist() for step in range(3)]
    assert joined == whole
    with pytest.raises(UserError, match="is no share"):
        eval_batches(numbered(18), 8, rows=range(1, 3))
