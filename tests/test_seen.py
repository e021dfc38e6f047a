"""What is counted while a case is labelled: voxels of every label, and how far the folds agree."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import dice

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.seen import FoldTally, Seen, seen_of
from fastnnunet.cache.store.manifest import manifest_text
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.errors import CorruptError, SpecError
from fastnnunet.geometry.chunked_window import chunked_window, own_part
from fastnnunet.geometry.padding import centre_padding, pad_spatial
from fastnnunet.nnunet.files.model import ModelFolder
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.teacher import PublishedSpec
from fastnnunet.teachers.nnunet import make_teacher
from fastnnunet.teachers.published import open_published
from fastnnunet.testing import check_teacher
from tests.bundles import Toy
from tests.cache_fakes import FakeCases, FakeFactory, make_job
from tests.teachers import make_teacher as make_folder
from tests.teachers import nnunet_predictor

RECIPE = CacheSpec(precision="fp32", engine="torch", mirroring=False)
SIDES = st.tuples(*[st.integers(1, 20)] * 3)
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=SIDES, patch=SIDES, flat=st.booleans(), step=st.sampled_from([0.25, 0.5, 1.0]))
def test_every_voxel_belongs_to_the_tile_with_the_nearest_middle(shape, patch, flat, step):
    window = chunked_window(shape, patch[1:] if flat else patch, step, shape)
    voxels = np.stack(np.indices(shape), axis=-1)
    distances = [
        np.abs(voxels - [s + t // 2 for s, t in zip(start, window.tile, strict=True)]) for start in window.tiles
    ]
    owner = np.full(shape, -1)
    for number, start in enumerate(window.tiles):
        in_image, in_tile = own_part(window, number)
        assert (owner[in_image] == -1).all(), "a voxel belongs to two tiles"
        owner[in_image] = number
        for image, tile, first in zip(in_image, in_tile, start, strict=True):
            assert (image.start - tile.start, image.stop - tile.stop) == (first, first)
    for axis in range(3):  # the grid of tiles is a product, so the nearest is nearest along every axis
        nearest = np.min([d[..., axis] for d in distances], axis=0)
        own = np.take_along_axis(np.stack([d[..., axis] for d in distances]), owner[None], axis=0)[0]
        np.testing.assert_array_equal(own, nearest)


def folder_of(tmp_path, folds=(0, 1, 2), **toy):
    return make_folder(Toy(**toy), tmp_path / "results", folds)


def teacher_of(folder, folds, recipe=RECIPE):
    return make_teacher(ModelFolder(folder, folder.name.split("__")[-1], "checkpoint_final.pth"), folds, recipe, {})


def counted(teacher, image_CZYX, per_fold=None):
    """Values and counts of one pass."""
    tally = FoldTally(teacher.folds, teacher.num_heads, has_regions=teacher.has_regions)
    shape = image_CZYX.shape[1:]
    ((_, values),) = teacher.load(1).tallied_blocks(image_CZYX, teacher.folds, shape, per_fold, tally)
    return values, tally.seen(np.zeros(teacher.num_heads, np.int64))


def masks_of(logits_HZYX, has_regions):
    """A mask for each head."""
    if has_regions:
        return logits_HZYX > 0
    return np.stack([logits_HZYX.argmax(0) == head for head in range(len(logits_HZYX))])


def assert_counts(seen, masks):
    """`masks`: of each fold, a mask for each head."""
    np.testing.assert_array_equal(seen.of_folds, [m.sum(axis=(1, 2, 3)) for m in masks])
    pairs = list(itertools.combinations(range(len(masks)), 2))
    for both, (one, other) in zip(seen.shared, pairs, strict=True):
        sums = np.add(seen.of_folds[one], seen.of_folds[other])
        for head, (a, b) in enumerate(zip(masks[one], masks[other], strict=True)):
            assert 2 * both[head] / sums[head] == pytest.approx(1 - dice(a.ravel(), b.ravel()))


@pytest.mark.parametrize("toy", [{}, REGIONS, {"dims": 2, "spacing": (1.0, 1.0)}], ids=["classes", "regions", "2d"])
def test_folds_are_counted_as_each_predicts_alone(tmp_path, toy):
    """One tile an image, where nothing overlaps: label maps of nnU-Net's own predictor, one fold at a time."""
    import torch

    folder = folder_of(tmp_path, **toy)
    teacher = teacher_of(folder, (0, 1, 2))
    size = teacher.patch_size if len(teacher.patch_size) == 3 else (3, *teacher.patch_size)
    image = np.random.default_rng(0).normal(size=(1, size[0], size[1] - 4, size[2] - 2)).astype(np.float32)
    values, seen = counted(teacher, image)
    ((_, plain),) = teacher.load(1).blocks(image, teacher.folds, image.shape[1:])
    np.testing.assert_array_equal(values, plain, err_msg="counting changes a logit")
    masks = []
    for fold in teacher.folds:
        predictor = nnunet_predictor(folder, (fold,), mirroring=False, gaussian=False)
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float().numpy()
        masks.append(masks_of(logits, teacher.has_regions))
    assert seen.folds == ("0", "1", "2")
    got, expected = np.array(seen.of_folds), np.array([m.sum(axis=(1, 2, 3)) for m in masks])
    assert np.abs(got - expected).max() <= 3, "more than a few voxels whose logits are equal in half precision"
    for both, (a, b) in zip(seen.shared, itertools.combinations(masks, 2), strict=True):
        assert np.abs(np.array(both) - (a & b).sum(axis=(1, 2, 3))).max() <= 3
    assert min(both[-1] for both in seen.shared) > 0
    assert any(both[-1] < min(got[:, -1]) for both in seen.shared), "these folds do disagree somewhere"


@pytest.mark.parametrize("toy", [{}, REGIONS], ids=["classes", "regions"])
def test_where_tiles_overlap_the_nearest_counts(tmp_path, toy):
    """Several tiles: every tile predicted alone, each voxel taken from the tile with the nearest middle."""
    teacher = teacher_of(folder_of(tmp_path, **toy), (0, 1, 2))
    shape = (teacher.patch_size[0] - 3, 2 * teacher.patch_size[1] + 3, teacher.patch_size[2] + 5)
    image = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    window = chunked_window(shape, teacher.patch_size, 0.5, shape)
    assert len(window.tiles) > 4
    padded = pad_spatial(image, centre_padding(shape, window.tile))
    loaded = teacher.load(1)
    distance = np.full(shape, np.inf)
    logits = np.zeros((3, teacher.num_heads, *shape), np.float32)
    grid = np.indices(shape)
    for start in window.tiles:
        first = [s - axis[0] for s, axis in zip(start, window.starts, strict=True)]
        inside = tuple(slice(f, f + t) for f, t in zip(first, window.tile, strict=True))
        patch = np.ascontiguousarray(padded[0][inside])
        place = grid - np.reshape(start, (3, 1, 1, 1))
        size = np.reshape(window.tile, (3, 1, 1, 1))
        from_middle = np.abs(place - size // 2).sum(axis=0)
        nearer = (from_middle < distance) & ((place >= 0) & (place < size)).all(axis=0)
        distance[nearer] = from_middle[nearer]
        for fold in teacher.folds:
            ((_, values),) = loaded.blocks(patch[None], (fold,), window.tile)
            z, y, x = np.nonzero(nearer)
            logits[fold][:, z, y, x] = values[:, z - start[0], y - start[1], x - start[2]]
    _, seen = counted(teacher, image)
    assert_counts(seen, [masks_of(one, teacher.has_regions) for one in logits])
    # what a window for each fold would say is near
    whole = [next(loaded.blocks(image, (fold,), shape))[1] for fold in teacher.folds]
    a, b = (masks_of(one, teacher.has_regions)[1].ravel() for one in whole[:2])
    got = 2 * seen.shared[0][1] / (seen.of_folds[0][1] + seen.of_folds[1][1])
    assert got == pytest.approx(1 - dice(a, b), abs=0.05)


@pytest.mark.parametrize("toy", [{}, REGIONS, {"dims": 2, "spacing": (1.0, 1.0)}], ids=["classes", "regions", "2d"])
def test_teachers_pass_the_public_suite(tmp_path, toy):
    teacher = open_published(PublishedSpec(path=folder_of(tmp_path, (0, 1), **toy)), RECIPE)
    size = teacher.patch_size if len(teacher.patch_size) == 3 else (3, *teacher.patch_size)
    image = np.random.default_rng(2).normal(size=(1, size[0] + 3, size[1], size[2] + 9)).astype(np.float32)
    check_teacher(teacher, image, (8, 16, 16))


def test_the_suite_hears_of_a_voxel_that_is_counted_twice(tmp_path, monkeypatch):
    teacher = teacher_of(folder_of(tmp_path, (0, 1)), (0, 1))
    image = np.random.default_rng(2).normal(size=(1, *teacher.patch_size)).astype(np.float32)
    once = FoldTally.add
    monkeypatch.setattr(FoldTally, "add", lambda self, labels: once(self, labels) or once(self, labels))
    with pytest.raises(AssertionError, match="voxels of the folds add up to"):
        check_teacher(teacher, image, (8, 16, 16))


def images_of(teacher):
    """Cases of one channel for a cache."""
    return FakeCases({"one": tuple(teacher.patch_size), "two": (9, 30, 28)})


@pytest.mark.parametrize("pooling", ["logits", "probabilities"])
def test_counts_are_stored_with_the_case(tmp_path, pooling):
    teacher = teacher_of(folder_of(tmp_path), (0, 1, 2))
    job = make_job(tmp_path / "caches", images_of(teacher), teacher, dataclasses.replace(RECIPE, pooling=pooling))
    cache = build_cache(job)
    reader = SoftLabelReader(cache.path)
    for case in cache.cases:
        seen = seen_of(cache, case)
        labels = reader.to_probabilities(reader.read_case(case)).argmax(0)
        np.testing.assert_allclose(seen.voxels, np.bincount(labels.ravel(), minlength=3), atol=0.01 * labels.size)
        assert sum(seen.voxels) == labels.size
        _, alone = counted(teacher, job.source.image_CZYX(case))
        assert dataclasses.replace(alone, voxels=seen.voxels) == seen
    assert build_cache(job).missing_cases() == []
    if pooling != "logits":
        return  # workers take seconds to start
    with_workers = build_cache(dataclasses.replace(job, root=tmp_path / "elsewhere"), workers=1)
    assert with_workers.key == cache.key
    for case in cache.cases:
        assert seen_of(with_workers, case) == seen_of(cache, case)
        assert with_workers.manifest(case).content_sha256 == cache.manifest(case).content_sha256


def test_a_teacher_that_does_not_tell_its_folds_apart(tmp_path):
    cache = build_cache(make_job(tmp_path, factory=FakeFactory()))
    for case, shape in FakeCases().shapes.items():
        seen = seen_of(cache, case)
        assert (seen.folds, seen.of_folds, seen.shared) == ((), (), ())
        assert sum(seen.voxels) == np.prod(shape)


def change_attributes(cache, case, change):
    """Another zarr.json, with a manifest that says so."""
    folder = cache.path / case
    document = json.loads((folder / "zarr.json").read_text())
    change(document["attributes"]["fastnnunet"])
    (folder / "zarr.json").write_text(json.dumps(document))
    manifest = dataclasses.replace(cache.manifest(case), array_sha256=sha256_of_file(folder / "zarr.json"))
    (folder / "manifest.json").write_text(manifest_text(manifest))


def test_what_older_versions_stored_is_unknown_and_of_use(tmp_path):
    cache = build_cache(make_job(tmp_path))
    before = SoftLabelReader(cache.path).read_case("small")
    change_attributes(cache, "small", lambda attributes: attributes.pop("seen"))
    assert seen_of(cache, "small") is None
    assert cache.missing_cases() == []
    np.testing.assert_array_equal(SoftLabelReader(cache.path).read_case("small"), before)


def test_no_counts_of_a_damaged_case(tmp_path):
    cache = build_cache(make_job(tmp_path))
    change_attributes(cache, "small", lambda attributes: attributes.update(seen={"voxels": "many"}))
    with pytest.raises(CorruptError, match="expected a list"):
        seen_of(cache, "small")
    file = cache.path / "large" / "zarr.json"
    file.write_text(file.read_text().replace('"voxels":[', '"voxels":[1'))
    with pytest.raises(CorruptError, match="was changed"):
        seen_of(cache, "large")
    file.unlink()
    with pytest.raises(CorruptError, match="cannot be read"):
        seen_of(cache, "large")
    assert seen_of(dataclasses.replace(cache, cases={"absent": "0"}), "absent") is None
    with pytest.raises(SpecError, match="do not fit together"):
        Seen(voxels=(1, 2), folds=("0", "1"), of_folds=((1, 2), (3, 4)), shared=())
