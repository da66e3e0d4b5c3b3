"""Labelled volumes: reading them, and batches of crops that depend on (seed, step) alone.

As with images, a run that stops at step s goes on with `train_batches(..., start=s)`, and the number of
processes may change between the two.
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
"""Where nilearn's wheel keeps the template's volumes: t1, gm (grey matter) and wm (white matter)."""

TEST_SHARE = 0.4
"""Of a brain's rows, front to back: those before are for the test, those behind for training."""


@dataclass(frozen=True)
class Volumes:
    """Volumes (N, D, H, W, C), float32 in [0, 1], and the label of each voxel (N, D, H, W), int32.

    Raises:
        UserError: other dtypes or ranks, or labels of other extents than the images.
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
    """Volumes to train on and to test with, and the names of their labels, from 0."""

    name: str
    train: Volumes
    test: Volumes
    classes: tuple[str, ...]


def load(name: str, *, voxel: int = 1) -> VolumeSet:
    """Reads a set of volumes by name.

    Args:
        name: "mni152", the ICBM 152 template in nilearn's wheel: the mean T1 image of 152 brains, and for
            each voxel of 1 mm the share of them that has grey and white matter there. A voxel's label is
            the largest share: 0 other, 1 grey matter, 2 white matter. Depth runs from the neck up, height
            from front to back, width from left to right.
        voxel: edge of a voxel in mm: image and shares are averaged over cubes of so many voxels.

    Returns:
        One volume to train on and one to test with. There is one brain, and its left half is the exact
        mirror image of the right one, so the two are cut apart between front and back: the front 40 % are
        for the test.

    Raises:
        UserError: another name, a voxel that is not 1 to 16 mm, no nilearn, or a damaged file of it.

    Example:
        >>> brain = load("mni152", voxel=2)
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
    """One volume of the template, from the neck up, front to back, left to right."""
    spec = importlib.util.find_spec("nilearn")  # not imported, which would take seconds
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
    """Means over cubes of `edge` voxels; what a last cube lacks counts as zeros.

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
    """Endless batches of crops at random places; row r of step s depends on `seed`, s and r alone.

    Args:
        batch_size: of the global batch, over all processes.
        size: depth, height and width of a crop.
        start: the step to begin at, the number of steps a resumed run has behind it.
        rows: the rows of the global batch that this process needs, as in `data.train_batches`.

    Returns:
        An iterator over images (k, *size, C), float32, and labels (k, *size), int32.

    Raises:
        UserError: crops that are no box inside the volumes, other `rows`, a negative `seed` or `start`.

    Example:
        >>> images, labels = next(train_batches(load("mni152").train, 2, size=(64, 32, 48), seed=0))
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
    """Every volume once, whole and in order; the last batch has what is left.

    Args:
        batch_size: of the global batch; it may be larger than the set.
        rows: as in `train_batches`; of a last batch that is too short a process gets the rows that exist.

    Returns:
        An iterator over images and labels as from `train_batches`, of the volumes' own extents.

    Raises:
        UserError: a batch size below 1, or `rows` that are no share of it.

    Example:
        >>> [labels.shape for _, labels in eval_batches(load("mni152", voxel=2).test, 2)]
        [(1, 78, 36, 73)]
    """
    rows = share(batch_size, rows)
    begins = range(0, len(volumes), batch_size)
    shares = (slice(begin + rows.start, begin + rows.stop) for begin in begins)
    return ((volumes.images[some], volumes.labels[some]) for some in shares)


def _by(extents: Sequence[int]) -> str:
    return "x".join(map(str, extents))
