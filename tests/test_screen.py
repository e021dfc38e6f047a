"""Bad scans are found by a stated rule, with the numbers, and ordinary ones are left alone."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.distance import dice

from fastnnunet.api import label
from fastnnunet.cache.build import build_cache
from fastnnunet.errors import ImageError
from fastnnunet.events import Message
from fastnnunet.nnunet.files.model import model_of
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.teachers.images import open_images
from fastnnunet.teachers.intensities import (
    Fingerprint,
    fingerprints_of,
    intensities_of,
    outside,
    require_modality,
    sample_of,
)
from fastnnunet.teachers.measured import measure_scans
from fastnnunet.teachers.screen import (
    MIN_DICE,
    SURE_DICE,
    agreement_of,
    dice_bound,
    head_names,
    rare_labels,
    rare_text,
    screen,
)
from tests.bundles import Toy, _dataset_json, _plans
from tests.cache_fakes import FakeCases, FakeFactory, FakeTeacher, in_chunks, make_job
from tests.test_seen import REGIONS, change_attributes
from tests.test_unlabelled_images import RECIPE, TEACHER, image_folder

SHAPE = (12, 16, 18)
FOLDS = (0, 1, 2)
DISPUTED, BLANK, SPARSE = "disputed", "blank", "sparse"
ORDINARY = tuple(f"scan{i}" for i in range(9))
MR = Fingerprint(scheme="ZScoreNormalization", percentile_00_5=28, percentile_99_5=2.8e5, mean=2e4, std=6e4, minimum=0)
LIVER = Fingerprint(scheme="CTNormalization", percentile_00_5=-17, percentile_99_5=201, mean=99, std=39, minimum=-1000)
PICTURES = Fingerprint(scheme="NoNormalization", percentile_00_5=15, percentile_99_5=230, mean=90, std=50, minimum=0)


def model(**toy):
    made = Toy(**toy)
    return model_of(_plans(made), f"{made.dims}d_toy", _dataset_json(made))


def ball(centre, radius, shape=SHAPE):
    grid = np.indices(shape)
    return ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0) < radius**2


@dataclasses.dataclass(frozen=True)
class Scans(FakeCases):
    """Images whose values are what the teacher is to see: label 1 or 2, and 9 in a corner where folds differ."""

    shapes: dict = dataclasses.field(default_factory=lambda: dict.fromkeys((*ORDINARY, DISPUTED, BLANK, SPARSE), SHAPE))

    def image_CZYX(self, case_id):
        image = np.zeros(SHAPE, np.float32)
        if case_id == SPARSE:
            image[0, 0, :3] = 1
        elif case_id != BLANK:
            image[ball((6, 7, 5 + len(case_id) % 2), 4)] = 1
            if case_id in ORDINARY[:1]:
                image[ball((6, 8, 13), 3)] = 2
        image[0, 0, 0] = 9 if case_id == DISPUTED else 0
        return image[None]


@dataclasses.dataclass(frozen=True)
class Folds(FakeTeacher):
    """The third fold is a voxel off, all are far apart in a disputed scan."""

    def map_of(self, image, fold):
        label = np.where(image[0] <= 2, image[0], 0)
        return np.roll(label, 4 * fold if image[0, 0, 0, 0] == 9 else fold // 2, axis=1)

    def of_fold(self, image, fold):
        label = self.map_of(image, fold)
        return np.stack([np.where(label == head, 8.0, -8.0) for head in range(3)]).astype(np.float32)

    def tallied_blocks(self, image, folds, chunk_zyx, per_fold, tally):
        alone = [self.of_fold(image, fold) for fold in folds]
        if tally is not None:
            tally.add([tally.labels(one) for one in alone])
        yield from in_chunks(np.mean([one if per_fold is None else per_fold(one) for one in alone], axis=0), chunk_zyx)

    def blocks(self, image, folds, chunk_zyx, per_fold=None):
        return self.tallied_blocks(image, folds, chunk_zyx, per_fold, None)


@dataclasses.dataclass(frozen=True)
class Ensemble(FakeFactory):
    unseen: dict = dataclasses.field(default_factory=dict)

    def load(self, threads):
        return Folds(3, 0.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return build_cache(make_job(tmp_path_factory.mktemp("caches"), Scans(), Ensemble()))


def expected_dice(case):
    """Of whole label maps of every fold, which scipy compares."""
    image, teacher = Scans().image_CZYX(case), Folds(3, 0.0)
    maps = [teacher.map_of(image, fold) for fold in FOLDS]
    labels = [label for label in (1, 2) if any((m == label).any() for m in maps)]
    return {
        label: np.mean(
            [1 - dice((a == label).ravel(), (b == label).ravel()) for a, b in itertools.combinations(maps, 2)]
        )
        for label in labels
    }


class TestFolds:
    def test_a_scan_on_which_the_folds_disagree(self, cache):
        found = screen(cache, model())
        verdicts = {verdict.case_id: verdict for verdict in found.verdicts}
        for case in (*ORDINARY, DISPUTED):
            oracle = expected_dice(case)
            agreement = verdicts[case].agreement
            assert agreement.dice == pytest.approx(np.mean(list(oracle.values())))
            assert agreement.labels == pytest.approx({"ab"[label - 1]: value for label, value in oracle.items()})
        assert verdicts[DISPUTED].agreement.worst == ("0", "2")
        assert [r.rule for r in verdicts[DISPUTED].reasons] == ["folds disagree"]
        assert f"pairwise Dice {np.mean(list(expected_dice(DISPUTED).values())):.2f}" in verdicts[DISPUTED].line
        assert verdicts[DISPUTED].line in "\n".join(found.lines())
        assert set(found.left_out) == {DISPUTED, BLANK, SPARSE}
        assert found.kept == ORDINARY

    def test_keep_all_keeps_and_still_tells(self, cache):
        found, kept = screen(cache, model()), screen(cache, model(), keep_all=True)
        assert kept.verdicts == found.verdicts
        assert kept.left_out == ()
        assert set(kept.kept) == set(cache.cases)
        assert "3 of 12 scans are kept (--keep-all)" in kept.lines()[0]
        assert "3 of 12 scans are left out of training (--keep-all keeps them)" in found.lines()[0]

    def test_a_scan_much_worse_than_the_others(self):
        usual = [0.93, 0.94, 0.95, 0.94, 0.93, 0.95, 0.94, 0.93]
        assert dice_bound(usual) == SURE_DICE, "where folds agree well, well enough is good enough"
        lesions = [0.55, 0.6, 0.65, 0.6, 0.62, 0.58, 0.7, 0.56]
        assert dice_bound(lesions) == MIN_DICE, "a hard task is no reason"
        close = [0.75, 0.76, 0.77, 0.75, 0.76, 0.77, 0.75, 0.76]
        lower, upper = np.quantile(close, [0.25, 0.75])
        assert dice_bound(close) == pytest.approx(lower - 3 * (upper - lower))
        assert dice_bound(usual[:7]) == MIN_DICE, "of a few scans nothing is usual"
        assert dice_bound([]) == MIN_DICE

    def test_what_cannot_be_told_is_no_reason(self, cache, tmp_path):
        single = build_cache(make_job(tmp_path / "one", Scans(), Ensemble(folds=(0,))))
        mute = build_cache(make_job(tmp_path / "mute", FakeCases(), FakeFactory(unseen={})))
        old = tmp_path / "old" / cache.path.name
        shutil.copytree(cache.path, old)
        old_cache = dataclasses.replace(cache, path=old)
        change_attributes(old_cache, DISPUTED, lambda attributes: attributes.pop("seen"))
        for one, why, number in (
            (single, "there is one fold", 12),
            (mute, "the teacher does not tell its folds apart", 3),
            (old_cache, "labelled by a version that did not count it", 1),
        ):
            found = screen(one, model())
            assert f"unknown of {number} of {len(one.cases)} scans: whether the folds agree ({why})" in found.lines()
            assert not any(r.rule == "folds disagree" for v in found.verdicts for r in v.reasons)
        before = {v.case_id: v.voxels for v in screen(cache, model()).verdicts}
        assert {v.case_id: v.voxels for v in found.verdicts} == before, "counted in the soft labels instead"

    def test_regions(self, tmp_path):
        regions = model(**REGIONS)
        assert head_names(regions) == ("whole", "core")
        assert head_names(model()) == (None, "a", "b")
        job = make_job(
            tmp_path,
            FakeCases(),
            FakeFactory(num_heads=2, has_regions=True, unseen={}),
            CacheSpec(encoding="sigmoid_u8"),
        )
        cache = build_cache(job)
        counted = screen(cache, regions).verdicts
        for case in cache.cases:
            change_attributes(cache, case, lambda attributes: attributes.pop("seen"))
        assert any(v.voxels["core"] for v in counted)
        for verdict, again in zip(counted, screen(cache, regions).verdicts, strict=True):
            assert again.voxels["core"] == verdict.voxels["core"]
            assert again.voxels["whole"] >= verdict.voxels["whole"], "a label map puts the core inside the whole"


def test_a_scan_in_which_the_teacher_sees_nothing(cache):
    verdicts = {verdict.case_id: verdict for verdict in screen(cache, model()).verdicts}
    for case, most in ((BLANK, 0), (SPARSE, 2)):
        assert [r.rule for r in verdicts[case].reasons] == ["nothing seen"]
        assert f"at most {most} voxels of any label" in verdicts[case].line
    assert verdicts[BLANK].agreement.dice is None


def test_labels_in_too_few_scans(cache):
    found = screen(cache, model())
    assert rare_labels(found.verdicts, found.kept) == {"b": 1}
    assert rare_labels(found.verdicts, ORDINARY[1:]) == {"b": 0}
    assert rare_labels(found.verdicts, ORDINARY[:2]) == {"a": 2, "b": 1}
    assert rare_labels(found.verdicts, found.kept, least=1) == {}
    text = rare_text({"a": 2, "b": 0}, 9)
    assert "too few of the 9 scans to train on show these labels: a in 2; b in none" in text


class TestIntensities:
    def test_equal_to_nnunets_fingerprint(self):
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

        image = np.random.default_rng(0).normal(50, 200, (1, 11, 30, 24)).astype(np.float32)
        _, (expected,) = DatasetFingerprintExtractor.collect_foreground_intensities(
            np.ones(image.shape, np.int8), image, num_samples=10
        )
        found = intensities_of(image[0])
        assert found.minimum == pytest.approx(expected["min"])
        assert found.maximum == pytest.approx(expected["max"])
        for name in ("percentile_00_5", "median", "percentile_99_5"):
            assert getattr(found, name) == pytest.approx(expected[name])
        assert found.below_zero == pytest.approx((image < 0).mean())
        assert (found.not_finite, found.at_median) == (0, pytest.approx(0, abs=1e-3))
        large = np.tile(image[0], (1, 30, 30))
        assert intensities_of(large).percentile_99_5 == pytest.approx(found.percentile_99_5, rel=0.02)

    def test_units_of_ct(self):
        rng = np.random.default_rng(1)
        scan = np.where(rng.random((20, 40, 40)) < 0.4, -1000, rng.normal(40, 120, (20, 40, 40)))
        ordinary = {"": scan, "padded": np.where(rng.random(scan.shape) < 0.1, -3024, scan)}
        ordinary["a crop of soft tissue"] = rng.normal(60, 30, scan.shape)
        ordinary["metal"] = np.where(rng.random(scan.shape) < 0.001, 30000, scan)
        for name, image in ordinary.items():
            assert outside(intensities_of(image), LIVER) is None, name
        low, high = scan.min(), scan.max()
        others = {
            "0 to 1": (scan - low) / (high - low),
            "-1 to 1": (scan - low) / (high - low) * 2 - 1,
            "z-scored": (scan - scan.mean()) / scan.std(),
            "grey values": np.round((scan - low) / (high - low) * 255),
            "without its offset": scan - low,
            "MR": np.abs(rng.normal(400, 200, scan.shape)),
            "constant": np.full(scan.shape, -5.0),
            "NaN": np.where(rng.random(scan.shape) < 0.01, np.nan, scan),
            "infinite": np.where(rng.random(scan.shape) < 0.01, np.inf, scan),
        }
        for name, image in others.items():
            assert outside(intensities_of(image.astype(np.float32)), LIVER), name
        said = outside(intensities_of(others["0 to 1"].astype(np.float32)), LIVER)
        assert "the teacher learnt from -17 to 201" in said
        assert "got 0 to 1 " in said or "got 0 to 0." in said

    def test_units_that_do_not_matter(self):
        rng = np.random.default_rng(2)
        for image in (rng.random((9, 20, 20)), 1e6 * rng.random((9, 20, 20)), rng.normal(size=(9, 20, 20)) - 50):
            assert outside(intensities_of(image), MR) is None
        nearly = np.zeros((9, 20, 20))
        nearly[0, 0, :3] = 7
        assert "99.92% of the voxels have the value 0" in outside(intensities_of(nearly), MR)
        nearly[0, :, :3] = 7
        assert outside(intensities_of(nearly), MR) is None
        assert "no finite numbers" in outside(intensities_of(np.full((2, 3, 4), np.nan)), MR)

    def test_values_taken_as_they_are(self):
        rng = np.random.default_rng(3)
        assert outside(intensities_of(rng.integers(0, 20, (1, 50, 50)).astype(float)), PICTURES) is None
        assert "taken as they are" in outside(intensities_of(rng.random((1, 50, 50))), PICTURES)

    def test_a_folder_of_another_modality_is_refused(self, tmp_path):
        teacher = ct_model()
        found = write_scans(tmp_path, {"one": 1, "two": 1, "three": 1}, unit=0.001)
        measured = measure_scans(sample_of(found), teacher)
        with pytest.raises(ImageError) as caught:
            require_modality(measured, teacher)
        assert "all 3 looked at are far outside" in str(caught.value)
        assert "one: channel 0 (CTNormalization): got " in str(caught.value)
        assert "the teacher learnt from -17 to 201" in str(caught.value)
        mixed = {**measured, **measure_scans(write_scans(tmp_path, {"four": 1}), teacher)}
        require_modality(mixed, teacher)
        require_modality({}, teacher)
        require_modality(measured, model())

    def test_an_even_choice(self, tmp_path):
        many = {f"case{i:02d}": (tmp_path / f"{i}",) for i in range(40)}
        assert list(sample_of(many)) == [f"case{i:02d}" for i in range(0, 40, 5)]
        assert sample_of(many, 100) == many

    def test_measured_once(self, tmp_path, monkeypatch):
        teacher, record = ct_model(), tmp_path / "work" / "intensities.json"
        found = write_scans(tmp_path, {"one": 1, "two": 2})
        first = measure_scans(found, teacher, record=record)
        for case, files in found.items():
            assert first[case] == (intensities_of(sitk.GetArrayFromImage(sitk.ReadImage(str(files[0])))),)
        read = []
        monkeypatch.setattr(
            "fastnnunet.teachers.measured.read_channels",
            lambda task: read.append(task.case_id) or sitk.GetArrayFromImage(sitk.ReadImage(str(task.files[0])))[None],
        )
        assert measure_scans(found, teacher, record=record) == first
        assert read == []
        write_scans(tmp_path, {"two": 3})
        changed = measure_scans(found, teacher, record=record)
        assert read == ["two"]
        assert changed["one"] == first["one"]
        assert changed["two"] != first["two"]
        record.write_text(record.read_text()[:50])
        assert measure_scans(found, teacher, record=record) == changed
        assert sorted(read) == ["one", "two", "two"]
        assert json.loads(record.read_text())["cases"].keys() == {"one", "two"}

    def test_all_that_cannot_be_read_are_named_and_the_others_kept(self, tmp_path):
        teacher, record = ct_model(), tmp_path / "intensities.json"
        found = write_scans(tmp_path, {"one": 1, "two": 2, "three": 3})
        found["two"][0].write_bytes(found["two"][0].read_bytes()[:200])
        found["three"][0].write_bytes(b"")
        with pytest.raises(ImageError, match="2 scan") as caught:
            measure_scans(found, teacher, record=record)
        assert "  three: three_0000.nii.gz is cut off or empty" in str(caught.value)
        assert "  two: two_0000.nii.gz is cut off" in str(caught.value)
        assert json.loads(record.read_text())["cases"].keys() == {"one"}

    def test_what_prediction_refuses_is_refused_before_labels(self, tmp_path):
        """ITK reads NaN in a NIfTI file as 0: the teacher would label it, and no student could be judged on it."""
        found = write_scans(tmp_path, {"one": 1, "two": 2})
        file = str(found["two"][0])
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(file)).astype(np.float32)
        voxels[0, 0, 0] = np.nan
        sitk.WriteImage(sitk.GetImageFromArray(voxels), file)
        with pytest.raises(ImageError, match=f"two: two_0000.nii.gz: 1 of {voxels.size} voxels are NaN"):
            measure_scans(found, ct_model())

    def test_an_interrupt_keeps_what_was_measured(self, tmp_path, monkeypatch):
        teacher, record = ct_model(), tmp_path / "intensities.json"
        found = write_scans(tmp_path, {"one": 1, "two": 2})

        def interrupted(task):
            if task.case_id == "two":
                raise KeyboardInterrupt
            return np.ones((1, 2, 3, 4), np.float32)

        monkeypatch.setattr("fastnnunet.teachers.measured.read_channels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_scans(found, teacher, record=record)
        assert json.loads(record.read_text())["cases"].keys() == {"one"}

    def test_a_scan_in_other_units_among_others(self, cache):
        """Told by the file, and by what normalisation clipped where the file was not measured."""
        rng = np.random.default_rng(5)
        hounsfield = rng.normal(40, 300, SHAPE)
        measured = {case: (intensities_of(hounsfield),) for case in cache.cases}
        measured["scan3"] = (intensities_of(hounsfield / 1000),)
        found = screen(cache, ct_model(), measured=measured)
        assert set(found.left_out) == {DISPUTED, BLANK, SPARSE, "scan3"}
        (verdict,) = (v for v in found.verdicts if v.case_id == "scan3")
        assert [r.rule for r in verdict.reasons] == ["intensities"]
        assert "the teacher learnt from -17 to 201" in verdict.line

    def test_what_is_clipped(self, cache):
        from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

        statistics = {"mean": 99.0, "std": 39.0, "percentile_00_5": -17.0, "percentile_99_5": 201.0}

        class Normalised(Scans):
            def image_CZYX(self, case_id):
                values = 100 + 30 * np.random.default_rng(6).normal(size=SHAPE)
                values = values + 1024 if case_id == "scan4" else values
                return CTNormalization(False, statistics).run(values.astype(np.float32))[None]

        asked = []

        def labels(case):
            asked.append(case)
            image = Scans().image_CZYX(case)[0]
            return np.where(image <= 2, image, 0).astype(np.uint8)

        found = screen(cache, ct_model(), cases=Normalised(), label_ZYX=labels)
        assert sorted(asked) == sorted(cache.cases)
        clipped = {v.case_id: v.clipped for v in found.verdicts}
        assert clipped.pop("scan4") == 1
        assert max(clipped.values()) < 0.05
        (verdict,) = (v for v in found.verdicts if v.case_id == "scan4")
        assert "100% of what the teacher labels lies beyond the range it learnt from (-17 to 201" in verdict.line
        assert "unknown of 12 of 12 scans: intensities of the file (not measured)" in found.lines()
        asked.clear()
        assert all(v.clipped is None for v in screen(cache, model(), cases=Normalised(), label_ZYX=labels).verdicts)
        assert asked == [], "z-scored images need no look at their labels"


def ct_model():
    intensity = {"percentile_00_5": -17.0, "percentile_99_5": 201.0, "mean": 99.0, "std": 39.0, "min": -1000.0}
    made = model(schemes=["CTNormalization"], intensity=intensity)
    assert fingerprints_of(made)[0] == LIVER
    return made


def write_scans(folder, seeds, unit=1.0):
    found = {}
    for case, seed in seeds.items():
        image = np.random.default_rng(seed).normal(0, 400, (8, 9, 10)) * unit
        file = folder / f"{case}_0000.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.float32)), str(file))
        found[case] = (file,)
    return found


class TestCacheOfImages:
    """`cache build --images` names bad scans, and refuses a folder of another modality."""

    def test_bad_scans_and_rare_labels_are_named(self, world, monkeypatch):
        folder = image_folder(world, "tiny_10", "tiny_11", part="Ts")
        monkeypatch.setattr("fastnnunet.teachers.screen.dice_bound", lambda dices: 1.0)
        events = []
        made = label(TEACHER, RECIPE, images=folder, threads=1, progress=events.append)
        warnings = [event.text for event in events if isinstance(event, Message) and event.level == "warning"]
        rare = [text for text in warnings if "too few of the 2 scans" in text]
        (bad,) = (text for text in warnings if "2 of 2 images may do harm" in text)
        assert "u_tiny_10: folds disagree: pairwise Dice" in bad
        assert len(rare) == 1
        assert "bright in " in rare[0]
        change_attributes(made.cache, "u_tiny_10", lambda attributes: attributes.pop("seen"))
        label(TEACHER, RECIPE, images=folder, threads=1, progress=events.append)
        assert any("some were labelled before it was counted" in e.text for e in events if isinstance(e, Message))

    def test_another_modality(self, world):
        folder = image_folder(world, "tiny_00", "tiny_01")
        for file in folder.iterdir():
            image = sitk.ReadImage(str(file))
            sitk.WriteImage(sitk.Cast(image * 0.001, sitk.sitkFloat32), str(file))
        with pytest.raises(ImageError, match="all 2 looked at are far outside"):
            label(TEACHER, RECIPE, images=folder, threads=1)
        assert not open_images(TEACHER, RECIPE, folder).target.folder.exists()
        for file in folder.iterdir():
            file.write_bytes(b"")
        with pytest.raises(ImageError, match=r"2 image\(s\) in .* cannot be used"):
            label(TEACHER, RECIPE, images=folder, threads=1)


class TestRealScans:
    """Ordinary scans of each kind, and the other kind in their place."""

    def test_fingerprints_of_real_teachers(self, shared):
        ct = sitk.GetArrayFromImage(sitk.ReadImage(str(shared / "data" / "volumes" / "ct_thorax_1.5mm.nii.gz")))
        mr = {}
        for name, teacher in (("Dataset004_Hippocampus", "teacher"), ("Dataset111_OASISdeep", "teacher_oasis")):
            plans = json.loads((shared / teacher / "plans.json").read_text())
            description = json.loads((shared / teacher / "dataset.json").read_text())
            (expected,) = fingerprints_of(model_of(plans, "3d_fullres", description))
            files = sorted((shared / "data" / name / "imagesTs").glob("*.nii.gz"))[:6]
            for file in files:
                mr[file] = intensities_of(sitk.GetArrayFromImage(sitk.ReadImage(str(file))))
                assert outside(mr[file], expected) is None
            assert len(files) > 4
        assert outside(intensities_of(ct), LIVER) is None
        lungs = dataclasses.replace(LIVER, percentile_00_5=-960, percentile_99_5=60, mean=-700, std=250)
        assert outside(intensities_of(ct), lungs) is None
        bone = dataclasses.replace(LIVER, percentile_00_5=-50, percentile_99_5=1500, mean=350, std=300, minimum=-400)
        assert outside(intensities_of(ct), bone) is None
        for fingerprint in (LIVER, lungs, bone):
            assert outside(intensities_of((ct - ct.min()) / (ct.max() - ct.min())), fingerprint)
            assert outside(intensities_of(ct + 1024 - (ct.min() + 1024)), fingerprint)
            for found in mr.values():
                assert outside(found, fingerprint)


def test_agreement_does_not_hang_on_a_few_voxels():
    from fastnnunet.cache.seen import Seen

    seen = Seen(
        voxels=(0, 100, 0),
        folds=("0", "1"),
        of_folds=((900, 100, 0), (891, 100, 9)),
        shared=((880, 90, 0),),
    )
    agreement = agreement_of(seen, (None, "large", "speck"))
    assert agreement.labels == {"large": pytest.approx(0.9)}
    assert agreement.dice == pytest.approx(0.9)
