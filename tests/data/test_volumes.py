"""Reading the brain, and crops as a function of (seed, step, row)."""

import gzip
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from shardtrain.data import volumes
from shardtrain.data.volumes import Volumes, block_means, eval_batches, load, train_batches
from shardtrain.errors import UserError


def numbered(n, extents=(5, 6, 7)):
    """Volumes of which every voxel has a number of its own, in image and label alike."""
    labels = np.arange(n * np.prod(extents), dtype=np.int32).reshape(n, *extents)
    return Volumes(labels[..., None].astype(np.float32), labels)


def crops(steps, batch_size=4, **kinds):
    arguments = {"size": (2, 3, 4), "seed": 0} | kinds
    return list(itertools.islice(train_batches(numbered(3), batch_size, **arguments), steps))


# --- the brain


def test_the_brain_has_its_tissues_where_they_are():
    pytest.importorskip("nilearn")
    brain = load("mni152", voxel=4)
    assert brain.classes == ("other", "grey matter", "white matter")
    for part in (brain.train, brain.test):
        assert len(part) == 1
        assert part.images.min() >= 0
        assert part.images.max() <= 1
        assert set(np.unique(part.labels)) == {0, 1, 2}
        # In a T1 image white matter is brighter than grey matter, and that than what is left.
        other, grey, white = (part.images[part.labels == k].mean() for k in range(3))
        assert white > grey + 0.1 > other + 0.2
    depth, height, width = brain.train.labels.shape[1:]
    assert brain.test.labels.shape[1:] == (depth, round(0.4 * (height + brain.test.labels.shape[2])), width)
    # The cerebellum is behind and below: the lower half of the training part has tissue at its rear.
    assert brain.train.labels[0, : depth // 3, height // 2 :].any()
    assert not brain.test.labels[0, : depth // 6, : height // 4].any()


def test_train_and_test_are_other_voxels_of_one_brain():
    pytest.importorskip("nilearn")
    whole, brain = (volumes._mni152("t1"), load("mni152"))
    both = np.concatenate([brain.test.images[0], brain.train.images[0]], axis=1)[..., 0]
    inside = np.nonzero(whole)
    box = tuple(slice(i.min(), i.max() + 1) for i in inside)
    np.testing.assert_array_equal(both, whole[box] / np.float32(255))


def test_the_two_halves_of_the_template_are_one():
    """Why it is not cut between left and right: the test would be the training data."""
    pytest.importorskip("nilearn")
    whole = volumes._mni152("t1")
    np.testing.assert_array_equal(whole, whole[:, :, ::-1])


def test_means_over_cubes():
    volume = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 2), dtype=np.uint8)
    means = block_means(volume, 2)
    assert means.shape == (2, 3, 3, 2)
    assert means[1, 1, 2, 0] == pytest.approx(volume[2:4, 2:4, 4:6, 0].mean())
    assert means[0, 2, 0, 1] == pytest.approx(volume[0:2, 4:5, 0:2, 1].sum() / 8)
    np.testing.assert_array_equal(block_means(volume, 1), volume)


@pytest.mark.parametrize(
    ("name", "voxel", "message"),
    [("mni", 1, "use mni152"), ("mni152", 0, "1 to 16"), ("mni152", 99, "1 to 16")],
)
def test_what_there_is_not(name, voxel, message):
    with pytest.raises(UserError, match=message):
        load(name, voxel=voxel)


def test_without_nilearn_the_sentence_says_what_to_type(monkeypatch):
    monkeypatch.setattr(volumes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'shardtrain\[volumes\]'"):
        load("mni152")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no gzip", gzip.compress(b"no volume" * 99)],
    ids=["missing", "empty", "no gzip", "no volume"],
)
def test_a_damaged_file_is_named(content, tmp_path, monkeypatch):
    pytest.importorskip("nibabel")
    path = tmp_path / volumes.MNI152.format("t1")
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(volumes.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"t1_tal_nlin_sym_09a_converted\.nii\.gz cannot be read"):
        load("mni152")


def test_a_file_that_breaks_off_is_named(tmp_path, monkeypatch):
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / volumes.MNI152.format("t1")
    path.parent.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 30), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:9000])
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(volumes.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="cannot be read"):
        load("mni152")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2), np.int32), r"\(N, D, H, W, C\)"),
        (np.zeros((1, 2, 2, 2, 1)), np.zeros((1, 2, 2, 2), np.int32), "float64"),
        (np.zeros((1, 2, 2, 2, 1), np.float32), np.zeros((1, 2, 2), np.int32), "one a voxel"),
        (np.zeros((1, 2, 2, 2, 1), np.float32), np.zeros((1, 2, 2, 2), np.int64), "int64"),
    ],
)
def test_arrays_that_are_no_labelled_volumes(images, labels, message):
    with pytest.raises(UserError, match=message):
        Volumes(images, labels)


# --- crops


def test_a_crop_is_a_box_of_a_volume_with_its_labels():
    for images, labels in crops(8):
        assert images.shape == (4, 2, 3, 4, 1)
        np.testing.assert_array_equal(images[..., 0], labels)
        steps = labels - labels[:, :1, :1, :1]
        box = np.arange(2)[:, None, None] * 42 + np.arange(3)[:, None] * 7 + np.arange(4)
        np.testing.assert_array_equal(steps, np.broadcast_to(box, labels.shape))


def test_all_places_come_up():
    corners = {int(label[0, 0, 0]) for _, labels in crops(600) for label in labels}
    assert len(corners) == 3 * 4 * 4 * 4


def test_a_step_depends_on_seed_and_step_alone():
    labels = [batch[1] for batch in crops(6)]
    for start in (1, 4):
        for ours, theirs in zip(crops(2, start=start), labels[start:], strict=False):
            np.testing.assert_array_equal(ours[1], theirs)
    assert not np.array_equal(crops(1, seed=1)[0][1], labels[0])


def test_processes_bring_the_rows_of_one_batch():
    whole = crops(3)
    parts = [crops(3, rows=range(start, start + 2)) for start in (0, 2)]
    for k, (images, labels) in enumerate(whole):
        np.testing.assert_array_equal(images, np.concatenate([part[k][0] for part in parts]))
        np.testing.assert_array_equal(labels, np.concatenate([part[k][1] for part in parts]))


def test_a_batch_can_be_written_to_without_harm():
    data = numbered(1)
    images, labels = next(train_batches(data, 1, size=(5, 6, 7), seed=0))
    images[:], labels[:] = -1, -1
    assert data.images.min() == data.labels.min() == 0


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"size": (6, 3, 3)}, "crops of 6x3x3 are no boxes in volumes of 5x6x7"),
        ({"size": (0, 3, 3)}, "crops of 0x3x3"),
        ({"size": (3, 3)}, "crops of 3x3 "),
        ({"seed": -1}, "seed=-1"),
        ({"start": -1}, "start=-1"),
        ({"rows": range(1, 3)}, "no share"),
        ({"batch_size": 0}, "use 1 or more"),
    ],
)
def test_what_no_batch_can_be_is_refused_at_the_call(kinds, message):
    with pytest.raises(UserError, match=message):
        train_batches(numbered(1), **{"batch_size": 4, "size": (2, 2, 2), "seed": 0} | kinds)


def test_a_share_that_is_none_is_refused_at_the_call():
    with pytest.raises(UserError, match="no share"):
        eval_batches(numbered(1), 4, rows=range(1, 3))


def test_the_test_batches_are_all_volumes_whole():
    data = numbered(5)
    for rows in (None, range(0, 2), range(2, 4)):
        batches = list(eval_batches(data, 4, rows=rows))
        assert len(batches) == 2
        first = rows.start if rows else 0
        last = rows.stop if rows else 4
        np.testing.assert_array_equal(batches[0][1], data.labels[first:last])
        assert len(batches[1][1]) == (1 if first == 0 else 0)
