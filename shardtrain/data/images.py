"""Labelled images: reads them from disk, and makes batches that depend on the seed and the step alone.

A run that stopped after s steps continues with `train_batches(..., start=s)`. No iterator state is saved. The
global batch of a step is the same for any number of processes, so that number may change in between.
"""

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Float32, Int32, Shaped

from shardtrain.errors import UserError
from shardtrain.files import regular

ImageBatch = tuple[Float32[np.ndarray, "rows height width channel"], Int32[np.ndarray, "rows"]]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""The folder of the idx files of Debian's package `dataset-fashion-mnist`."""

IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

# The arrays are in memory, so 2 threads and 4 batches are enough to be ready before the next step.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclass(frozen=True)
class Arrays:
    """Images and their labels, in memory.

    Images of uint8 stay uint8 in memory, which takes a quarter of the bytes, and are scaled to [0, 1] in each
    batch.

    Attributes:
        images: (N, H, W, C), uint8, or float32 in [0, 1].
        labels: (N,), int32.

    Raises:
        UserError: if an array has another dtype or rank, or if there are not as many labels as images.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
            raise UserError(f"images are {_kind(images)}; give (N, H, W, C) of uint8 or of float32 in [0, 1]")
        if labels.shape != images.shape[:1] or labels.dtype != np.int32:
            raise UserError(f"labels are {_kind(labels)}; give ({len(images)},) of int32, one an image")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Images to train on and to test with, all of one shape, with labels from 0 to `classes` - 1."""

    name: str
    train: Arrays
    test: Arrays
    classes: int


def load(name: str) -> Dataset:
    """Reads a data set of labelled images by its name, or from a folder.

    A folder has one of these sets of files, of which the first that is there is read:

    - `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, each with or without `.gz`;
    - `{train,test}_{images,labels}.npy`;
    - `train.npz` and `test.npz`, each with the arrays `images` and `labels`.

    Images are (N, H, W) or (N, H, W, C), of uint8 (0 to 255) or floats (0 to 1); labels are (N,) integers
    from 0.

    Args:
        name: `"digits"` (8x8 pixels, 1437 + 360 images, comes with scikit-learn), `"fashion-mnist"` (28x28,
            60000 + 10000, a Debian package), or the path of a folder.

    Raises:
        UserError: if the name is unknown, if the folder does not exist or has none of these files, or if a
            file is damaged or has other arrays; the message names the file.

    Example:
        >>> data = st.data.load("digits")
        >>> data.train.images.shape, len(data.test), data.classes
        ((1437, 8, 8, 1), 360, 10)
    """
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        if not FASHION_MNIST.is_dir():
            raise UserError(
                f"fashion-mnist is not in {FASHION_MNIST}; type `apt-get install dataset-fashion-mnist`, or "
                "`--data FOLDER` with a folder that holds its idx files"
            )
        return _folder(FASHION_MNIST)
    folder = Path(os.path.expanduser(name))  # Path.expanduser raises for ~nobody
    if name and folder.is_dir():
        return _folder(folder)
    possible = "use digits, fashion-mnist, or a folder of idx, npy or npz files"
    if folder.is_file():
        raise UserError(f"data {name!r} is a file; give the folder it is in, {str(folder.parent)!r}")
    if os.sep in name or name.startswith(("~", ".")):
        raise UserError(f"data {name!r}: this folder does not exist; {possible}")
    raise UserError(f"data {name!r} is neither a known data set nor a folder; {possible}")


def _digits() -> Dataset:
    # Importing it takes a second, and no other data set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int32)
    a, b, c, d = train_test_split(images, labels, stratify=labels, random_state=0, test_size=360)
    return Dataset("digits", Arrays(a, c), Arrays(b, d), classes=10)


def _folder(folder: Path) -> Dataset:
    train = _part(folder, "train", "train")
    test = _part(folder, "test", "t10k", train.images.shape[1:])
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    return Dataset(folder.resolve().name, train, test, classes)


def _part(folder: Path, part: str, idx: str, shape: tuple[int, ...] | None = None) -> Arrays:
    """Returns the training or test set of a folder, from the first of idx, npy and npz that is there."""
    choices = (
        (f"{idx}-images-idx3-ubyte", f"{idx}-labels-idx1-ubyte"),
        (f"{part}_images.npy", f"{part}_labels.npy"),
        (f"{part}.npz", f"{part}.npz"),
    )
    for names in choices:
        paths = [_or_gz(folder / name) for name in names]
        if any(path.is_file() for path in paths):
            break
    else:
        (a, b), (c, d), (e, _) = choices
        raise UserError(
            f"{folder} holds no {part} set; put there {a} and {b} (or both with .gz), or {c} and {d}, or {e} "
            "with the arrays images and labels"
        )
    images = _images(_read(paths[0], "images"), paths[0])
    labels = _labels(_read(paths[1], "labels"), paths[1])
    if len(images) != len(labels):
        raise UserError(
            f"{paths[1]} has {len(labels)} labels for the {len(images)} images of {paths[0]}; "
            "store one label an image"
        )
    if shape and images.shape[1:] != shape:
        raise UserError(
            f"{paths[0]}: images are {images.shape[1:]}, the training images {shape}; make them one (H, W, C)"
        )
    return Arrays(images, labels)


def _or_gz(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    return packed if path.name.endswith("-ubyte") and not path.is_file() and packed.is_file() else path


def _images(array: np.ndarray, where: Path) -> np.ndarray:
    if array.ndim not in (3, 4) or not array.size or (array.dtype != np.uint8 and array.dtype.kind != "f"):
        raise UserError(
            f"{where}: images are {_kind(array)}; store at least one, (N, H, W) or (N, H, W, C), of uint8 "
            "(0 to 255) or float32 (0 to 1)"
        )
    array = array if array.ndim == 4 else array[..., None]
    return array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


def _labels(array: np.ndarray, where: Path) -> np.ndarray:
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise UserError(f"{where}: labels are {_kind(array)}; store at least one, (N,), of integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= np.iinfo(np.int32).max:
        raise UserError(f"{where}: labels run from {low} to {high}; number the classes 0, 1, 2 and so on")
    return array.astype(np.int32, copy=False)


def _kind(array: np.ndarray) -> str:
    return f"{array.shape} of {array.dtype}"


def _read(path: Path, what: str) -> np.ndarray:
    if path.suffix not in (".npy", ".npz"):
        return read_idx(path)
    # np.load goes by content: under either name it would accept a npy, a zip or a pickle.
    try:
        if path.suffix == ".npy":
            with regular(path) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        with regular(path) as whole, zipfile.ZipFile(whole) as archive, archive.open(f"{what}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # a damaged header can raise nearly anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: {what} cannot be read ({reason}); write it again with numpy") from error


def read_idx(path: Path) -> Shaped[np.ndarray, "..."]:
    """Returns the array of an idx file (the format of MNIST), plain or gzip, in native byte order.

    Args:
        path: path of the file.

    Raises:
        UserError: if there is no such file, if it is not an idx file, or if its length is not what its header
            says.

    Example:
        >>> header = bytes([0, 0, 0x08, 1]) + (3).to_bytes(4, "big")  # unsigned bytes, one dimension of 3
        >>> _ = (tmp / "labels").write_bytes(header + bytes([7, 2, 1]))
        >>> st.data.read_idx(tmp / "labels")
        array([7, 2, 1], dtype=uint8)
    """
    data, trouble = _content(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_TYPES or not 1 <= data[3] <= 64:
        raise UserError(
            f"{path} is no idx file: expected 00 00, a type of 08 to 0e and 1 to 64 dimensions, "
            f"found {data[:4].hex(' ') or 'nothing'}{trouble}; fetch it again"
        )
    dtype, header = np.dtype(IDX_TYPES[data[2]]), 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    size = header + math.prod(shape) * dtype.itemsize
    if trouble or len(data) != size:
        found = f"{len(data)}{trouble}"
        raise UserError(f"{path} is damaged: expected {size} bytes, found {found}; fetch it again")
    if 0 in shape:
        raise UserError(f"{path} is empty: its header says {shape}; fetch it again")
    array = np.frombuffer(data, dtype, offset=header).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _content(path: Path) -> tuple[bytearray, str]:
    """Returns the bytes of a plain or gzip file as far as they can be read, and why they end early, if so."""
    data = bytearray()
    try:
        with regular(path) as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            # read would drop the bytes it has when the stream ends early; read1 does not.
            while chunk := file.read1(1 << 20):
                data += chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return data, f" (gzip: {error})"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a file that can be") from error
    return data, ""


def train_batches(
    arrays: Arrays, batch_size: int, *, seed: int, start: int = 0, rows: range | None = None
) -> Iterator[ImageBatch]:
    """Returns an endless iterator over training batches, in a new random order in every epoch.

    The batch of step s depends on `seed` and s alone. With the epochs concatenated, step s takes the examples
    from s * batch_size to (s + 1) * batch_size - 1. A batch may thus contain the end of one epoch and the
    beginning of the next, and no example is left out.

    Args:
        arrays: the training set.
        batch_size: number of examples of the global batch, over all processes.
        seed: seed of the order.
        start: number of the first step; for a resumed run, the number of steps it has done.
        rows: the rows of the global batch that this process needs, such as `trainer.rows(batch_size)`. They
            are `range(g * k, (g + 1) * k)` with a k that divides `batch_size`; by default all. Other rows are
            not read.

    Returns:
        An iterator over pairs: images (k, H, W, C), float32 in [0, 1], and labels (k,), int32.

    Raises:
        UserError: if a batch has more rows than there are examples, if `rows` is no such share, or if `seed`
            or `start` is negative.

    Example:
        >>> digits = st.data.load("digits")
        >>> images, labels = next(st.data.train_batches(digits.train, 64, seed=0, start=100))
        >>> images.shape, labels.shape
        ((64, 8, 8, 1), (64,))
    """
    rows = share(batch_size, rows)
    have = len(arrays)
    if batch_size > have:
        raise UserError(f"a batch of {batch_size} is more than the {have} examples; use {have} or less")
    check_position(seed, start)
    size, shares = len(rows), batch_size // len(rows)
    # Only indices go through Grain: one gather a batch is quicker than a copy of each example and a stack.
    order = grain.MapDataset.range(have).seed(seed).shuffle().repeat()
    # Without drop_remainder Grain rounds the length of an endless set up to 2**63, which is one too many.
    pieces = order.batch(size, drop_remainder=True, batch_fn=np.array)
    mine = pieces[start * shares + rows.start // size :: shares]
    return iter(mine.map(lambda indices: _gather(arrays, indices)).to_iter_dataset(READ))


def eval_batches(arrays: Arrays, batch_size: int, *, rows: range | None = None) -> Iterator[ImageBatch]:
    """Returns an iterator over all examples once, in order; the last batch has the remaining ones.

    Args:
        arrays: the test set.
        batch_size: number of examples of the global batch; it may be larger than the set.
        rows: as for `train_batches`. If the last batch is shorter, a process gets those of its rows that
            exist, which may be none: every process gets the same number of batches.

    Returns:
        An iterator over images and labels as from `train_batches`.

    Raises:
        UserError: if the batch size is below 1, or if `rows` is no share of it.

    Example:
        >>> digits = st.data.load("digits")
        >>> [len(labels) for _, labels in st.data.eval_batches(digits.test, 100)]
        [100, 100, 100, 60]
    """
    rows = share(batch_size, rows)

    def batch(begin: int) -> ImageBatch:
        first, end = begin + rows.start, min(begin + rows.stop, len(arrays))
        return _gather(arrays, np.arange(first, end))  # none where the end lies before the first

    begins = grain.MapDataset.range(0, len(arrays), batch_size)
    return iter(begins.map(batch).to_iter_dataset(READ))


def hold_out(arrays: Arrays, *, seed: int, share: float = 0.1) -> tuple[Arrays, Arrays]:
    """Cuts a set of images in two: to train on, and to validate with.

    Args:
        arrays: the whole set.
        seed: which examples are held out depends on it and on the size of the set alone.
        share: of the examples that are held out; at least one is, and one stays.

    Returns:
        The examples to train on, and those held out, each in their old order.

    Raises:
        UserError: a share that is not between 0 and 1, or a set of fewer than two images.

    Example:
        >>> digits = st.data.load("digits")
        >>> train, validation = st.data.hold_out(digits.train, seed=0)
        >>> len(train), len(validation)
        (1293, 144)
    """
    if not 0 < share < 1 or len(arrays) < 2:
        raise UserError(f"hold_out: a share of {share} of {len(arrays)} images; give a share between 0 and 1")
    count = min(max(1, round(share * len(arrays))), len(arrays) - 1)
    held = np.zeros(len(arrays), bool)
    held[np.random.default_rng(seed).permutation(len(arrays))[:count]] = True
    return Arrays(arrays.images[~held], arrays.labels[~held]), Arrays(
        arrays.images[held], arrays.labels[held]
    )


def check_position(seed: int, start: int) -> None:
    """Refuses a negative seed or first step with a `UserError`."""
    if seed < 0 or start < 0:
        raise UserError(f"seed={seed}, start={start}: neither can be negative; use 0 or more")


def share(batch_size: int, rows: range | None) -> range:
    """Returns the rows of a global batch that a process needs: `rows`, or all by default.

    Raises:
        UserError: if the batch size is below 1, or if `rows` is no share of it.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is no size; use 1 or more")
    rows = range(batch_size) if rows is None else rows
    size = len(rows)
    if not size or batch_size % size or rows.step != 1 or rows.start not in range(0, batch_size, size):
        raise UserError(
            f"{rows} is no share of a batch of {batch_size}; use range(g*k, (g+1)*k) with a k that divides "
            f"{batch_size}"
        )
    return rows


def _gather(arrays: Arrays, indices: np.ndarray) -> ImageBatch:
    images = arrays.images[indices]  # a copy, so no caller can change the data set
    return images / np.float32(255) if images.dtype == np.uint8 else images, arrays.labels[indices]
