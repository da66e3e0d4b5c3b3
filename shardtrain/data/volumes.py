"""Labelled volumes: reads them, and makes batches of crops that depend on the seed and the step alone.

As with images, a run that stopped after s steps continues with `train_batches(..., start=s)`, and the number
of processes may change in between.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Num, UInt8

from shardtrain.data.images import check_position, share
from shardtrain.errors import UserError

VolumeBatch = tuple[
    Float32[np.ndarray, "rows depth height width channel"], Int32[np.ndarray, "rows depth height width"]
]

MNI152 = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
"""Path of the template's volumes in nilearn's package: t1, gm (grey matter) and wm (white matter)."""

TEST_SHARE = 0.4
"""The share of a brain's rows, from the front, that is for testing; the rest is for training."""


@dataclass(frozen=True)
class Volumes:
    """Volumes and the label of each voxel, in memory.

    Attributes:
        images: (N, D, H, W, C), float32 in [0, 1].
        labels: (N, D, H, W), int32.

    Raises:
        UserError: if an array has another dtype or rank, or if labels and images differ in extents.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 5 or images.dtype != np.float32:
            raise UserError(
                f"volumes are {images.shape} of {images.dtype}; give (N, D, H, W, C) of float32 in [0, 1]"
            )
        if labels.shape != images.shape[:4] or labels.dtype != np.int32:
            raise UserError(
                f"labels are {labels.shape} of {labels.dtype}; give {images.shape[:4]} of int32, one a voxel"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class VolumeSet:
    """Volumes to train on and to test with, and the names of the labels 0, 1, 2 and so on."""

    name: str
    train: Volumes
    test: Volumes
    classes: tuple[str, ...]


def load(name: str, *, voxel: int = 1) -> VolumeSet:
    """Reads a set of labelled volumes by its name.

    The one name is `"mni152"`, the ICBM 152 template in nilearn's package: the mean T1 image of 152 brains,
    and for each voxel of 1 mm the share of these brains that has grey and white matter there. A voxel's label
    is that of the largest share: 0 other, 1 grey matter, 2 white matter. Depth runs from the neck up, height
    from front to back, width from left to right.

    Args:
        name: `"mni152"`.
        voxel: edge of a voxel in mm. Image and shares are averaged over cubes of that edge.

    Returns:
        One volume to train on and one to test with. They are parts of one brain. Its left half is the exact
        mirror image of the right one, so the parts are separated between front and back: the front 40 % are
        for testing.

    Raises:
        UserError: if the name is unknown, if `voxel` is not from 1 to 16, or if nilearn is not installed or
            one of its files is damaged.

    Example:
        >>> brain = st.data.volumes.load("mni152", voxel=2)
        >>> brain.train.images.shape, brain.test.labels.shape
        ((1, 78, 55, 73, 1), (1, 78, 36, 73))
    """
    if name != "mni152":
        raise UserError(f"data {name!r}: there are no such volumes; use mni152, which comes with nilearn")
    if not 1 <= voxel <= 16:
        raise UserError(f"a voxel of {voxel} mm: use 1 to 16, the edge of a cube to average over")
    t1, grey, white = (_mni152(part) for part in ("t1", "gm", "wm"))
    inside = np.nonzero(t1)
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in inside)
    shares = np.stack([255 - grey - white, grey, white], axis=-1)  # in uint8: no two of them exceed 255
    image = block_means(t1[box][..., None], voxel) / np.float32(255)
    labels = block_means(shares[box], voxel).argmax(-1).astype(np.int32)
    cut = round(TEST_SHARE * labels.shape[1])
    test = Volumes(image[None, :, :cut], labels[None, :, :cut])
    train = Volumes(image[None, :, cut:], labels[None, :, cut:])
    return VolumeSet(name, train, test, ("other", "grey matter", "white matter"))


def _mni152(part: str) -> UInt8[np.ndarray, "depth height width"]:
    """Returns a volume of the template, from the neck up, front to back, left to right."""
    spec = importlib.util.find_spec("nilearn")  # importing it would take seconds
    if spec is None or spec.origin is None:
        raise UserError(
            "mni152 comes with nilearn, which is not installed; type pip install 'shardtrain[volumes]'"
        )
    path = Path(spec.origin).parent / MNI152.format(part)
    import nibabel  # comes with nilearn

    try:
        volume = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); type pip install --force-reinstall nilearn"
        ) from error
    return volume.transpose(2, 1, 0)[:, ::-1]  # from (left to right, back to front, up)


def block_means(
    volume: Num[np.ndarray, "depth height width channel"], edge: int
) -> Float32[np.ndarray, "blocks_d blocks_h blocks_w channel"]:
    """Returns the means over cubes of `edge` voxels; incomplete cubes are padded with zeros.

    Example:
        >>> block_means(np.ones((4, 4, 3, 1)), 2)[0, 0, :, 0]
        array([1. , 0.5], dtype=float32)
    """
    volume = np.pad(volume, [*((0, -n % edge) for n in volume.shape[:3]), (0, 0)])
    d, h, w, c = volume.shape
    blocks = volume.reshape(d // edge, edge, h // edge, edge, w // edge, edge, c)
    return blocks.mean((1, 3, 5), dtype=np.float32)


def train_batches(
    volumes: Volumes,
    batch_size: int,
    *,
    size: Sequence[int],
    seed: int,
    start: int = 0,
    rows: range | None = None,
) -> Iterator[VolumeBatch]:
    """Returns an endless iterator over batches of crops from random places of the volumes.

    Row r of the batch of step s depends on `seed`, s and r alone.

    Args:
        volumes: the training set.
        batch_size: number of crops of the global batch, over all processes.
        size: depth, height and width of a crop.
        seed: seed of the places.
        start: number of the first step; for a resumed run, the number of steps it has done.
        rows: the rows of the global batch that this process needs, as for `data.train_batches`.

    Returns:
        An iterator over pairs: images (k, *size, C), float32, and labels (k, *size), int32.

    Raises:
        UserError: if a crop does not fit into the volumes, if `rows` is no share of the batch, or if `seed`
            or `start` is negative.

    Example:
        >>> brain = st.data.volumes.load("mni152", voxel=2)
        >>> batches = st.data.volumes.train_batches(brain.train, 2, size=(64, 32, 48), seed=0)
        >>> images, labels = next(batches)
        >>> images.shape, labels.shape
        ((2, 64, 32, 48, 1), (2, 64, 32, 48))
    """
    rows = share(batch_size, rows)
    extents = volumes.labels.shape[1:]
    if len(size) != 3 or not all(1 <= n <= m for n, m in zip(size, extents, strict=True)):
        raise UserError(
            f"crops of {_by(size)} are no boxes in volumes of {_by(extents)}; give depth, height and width "
            f"of at most that"
        )
    check_position(seed, start)

    def crop(step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng((seed, step, row))
        which = int(random.integers(len(volumes)))
        corner = random.integers(np.subtract(extents, size) + 1).tolist()
        d, h, w = (slice(a, a + n) for a, n in zip(corner, size, strict=True))
        return volumes.images[which, d, h, w], volumes.labels[which, d, h, w]

    def batches(step: int) -> Iterator[VolumeBatch]:
        while True:
            images, labels = zip(*(crop(step, row) for row in rows), strict=True)
            yield np.stack(images), np.stack(labels)
            step += 1

    return batches(start)


def eval_batches(volumes: Volumes, batch_size: int, *, rows: range | None = None) -> Iterator[VolumeBatch]:
    """Returns an iterator over all volumes once, whole and in order; the last batch has the remaining ones.

    Args:
        volumes: the test set.
        batch_size: number of volumes of the global batch; it may be larger than the set.
        rows: as for `train_batches`; if the last batch is shorter, a process gets those of its rows that
            exist.

    Returns:
        An iterator over images and labels as from `train_batches`, with the extents of the volumes.

    Raises:
        UserError: if the batch size is below 1, or if `rows` is no share of it.

    Example:
        >>> brain = st.data.volumes.load("mni152", voxel=2)
        >>> [labels.shape for _, labels in st.data.volumes.eval_batches(brain.test, 2)]
        [(1, 78, 36, 73)]
    """
    rows = share(batch_size, rows)
    begins = range(0, len(volumes), batch_size)
    shares = (slice(begin + rows.start, begin + rows.stop) for begin in begins)
    return ((volumes.images[some], volumes.labels[some]) for some in shares)


def _by(extents: Sequence[int]) -> str:
    return "x".join(map(str, extents))
