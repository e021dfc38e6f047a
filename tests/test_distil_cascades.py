"""A student of a published cascade from scans without labels; the oracle is nnU-Net's predictor on both stages."""

import json
import shutil

import pytest

from fastnnunet.api.images import distil_images, label_images, train_on_images
from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.world import VARIABLES
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import PublishedSpec
from fastnnunet.teachers.nnunet import NnUNetTeacher
from tests.bundles import smooth_noise, write_image
from tests.teachers import nnunet_files, nnunet_predictor
from tests.test_distil_images import RECIPE, TRAINING, Events, read, stock_label
from tests.test_published import CASCADE, LOWRES, publish, zipped

CASES = ("a", "b", "c")
FIRST = f"labelling by {LOWRES}"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The command on a zip of both stages, interrupted once between two scans of the first."""
    root = tmp_path_factory.mktemp("cascade")
    low, full = publish(root / "results", LOWRES, folds=(0, 1)), publish(root / "results", CASCADE)
    zipped(root / "results", root / "model.zip", root / "results")
    for seed, case in enumerate(CASES):
        write_image(smooth_noise((22, 29, 31), seed, border=2), root / f"scans/{case}_0000.nii.gz", (1.1, 0.9, 1.3))

    def interrupt(event):
        if (getattr(event, "what", ""), getattr(event, "done", 0)) == (FIRST, 2):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("FASTNNUNET_CACHE_HOME", str(root / "home"))
        with pytest.raises(KeyboardInterrupt):
            run(root, root / "out", progress=interrupt)
        before = times_of_first(root / "out")
        events = Events()
        distilled = run(root, root / "out", progress=events)
        after = times_of_first(root / "out")
    assert len(before) == 2
    assert before.items() < after.items(), "what the first stage had labelled was labelled again"
    assert [event.done for event in events if getattr(event, "what", "") == FIRST] == [1]
    return root, distilled, (low, full)


@pytest.fixture
def home(done, monkeypatch):
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(done[0] / "home"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


def run(root, output, **options):
    model = PublishedSpec(path=root / "model.zip", configuration=CASCADE, folds=(0,))
    options = {"recipe": RECIPE, "training": TRAINING, "keep_all": True, **options}
    return distil_images(model, root / "scans", output, [StudentSpec(r=2)], **options)


def times_of_first(output):
    (base,) = (output / "work/nnUNet_preprocessed").glob("Dataset*/unlabelled/scans")
    return {p.name: p.stat().st_mtime_ns for p in base.glob(f"*.{LOWRES}.*/*.b2nd")}


def no_teacher(self, _threads):
    raise AssertionError(f"{self.folder} labels")


def test_labels_are_what_nnunet_makes_of_both_stages(done, tmp_path):
    root, distilled, (low, full) = done
    files = {case: [root / f"scans/{case}_0000.nii.gz"] for case in CASES}
    nnunet_files(nnunet_predictor(low, (0, 1), mirroring=False), files, tmp_path / "low")
    second = nnunet_predictor(full, (0,), mirroring=False)
    nnunet_files(second, files, tmp_path / "full", previous=tmp_path / "low")
    (tmp_path / "other").mkdir()
    for case in CASES:  # what the first stage saw matters
        shutil.copy(tmp_path / f"low/{CASES[CASES.index(case) - 1]}.nii.gz", tmp_path / f"other/{case}.nii.gz")
    nnunet_files(second, files, tmp_path / "others", previous=tmp_path / "other")
    for case in CASES:
        expected, found = read(tmp_path / f"full/{case}.nii.gz"), read(distilled.scans.labels / f"{case}.nii.gz")
        assert set(expected.flat) == {0, 1, 2}
        assert (found == expected).mean() > 0.99
        assert (read(tmp_path / f"others/{case}.nii.gz") == expected).mean() < 0.97


def test_the_student_sees_the_scan_alone(done, tmp_path):
    root, distilled, _ = done
    (student,), (held_out,) = distilled.students, distilled.scans.held_out
    assert load_bundle_spec(student.bundle).previous_labels == ()
    plans = json.loads((student.model / "plans.json").read_text())["configurations"]
    assert "previous_stage" not in plans[CASCADE]
    expected = stock_label(student.model, (0,), root / f"scans/{held_out}_0000.nii.gz", tmp_path / "stock")
    predicted = read(student.bundle.parent / f"predictions/{held_out}.nii.gz")
    assert (predicted == expected).mean() > 0.999
    summary = json.loads(distilled.summary.read_text())
    assert summary["first_stage"] == {"configuration": LOWRES, "folds": ["0", "1"]}
    assert f"{LOWRES} (fold 0, 1) labels a scan before {CASCADE} does" in distilled.report.read_text()


def test_first_weights_are_the_teachers_of_the_image(done):
    from torch import randn

    from fastnnunet.nnunet.files.model import ModelFolder, build_network, model_of
    from fastnnunet.nnunet.files.plans import without_previous_stage
    from fastnnunet.nnunet.student.inherit import inherit_weights

    files = ModelFolder(done[2][1], CASCADE, "checkpoint_final.pth")
    weights = files.take_weights(0)
    model = model_of(without_previous_stage(files.plans, CASCADE), CASCADE, files.dataset_json)
    network = build_network(model).eval()  # as wide as the teacher
    assert inherit_weights(network, weights) == 1
    teacher = build_network(files.model).eval()
    teacher.load_state_dict(weights)
    image = randn(1, 3, *model.patch_size)
    image[:, 1:] = 0
    assert (network(image[:, :1]) - teacher(image)).abs().max() < 1e-5


def test_elsewhere_it_does_nothing_twice_and_another_size_is_trained(done, home, tmp_path, monkeypatch):
    root, distilled, _ = done
    shutil.copytree(root / "out", tmp_path / "moved")
    load = NnUNetTeacher.load
    monkeypatch.setattr(
        NnUNetTeacher,
        "load",
        lambda self, n: load(self, n) if self.folder.name == "nnunet_model" else no_teacher(self, n),
    )
    events = Events()
    again = run(root, tmp_path / "moved", progress=events)
    assert not [event for event in events if getattr(event, "unit", "") == "iterations"]
    assert again.students[0].fidelity.dice == distilled.students[0].fidelity.dice
    assert again.scans.teacher_s == distilled.scans.teacher_s
    model = PublishedSpec(path=root / "model.zip", configuration=CASCADE, folds=(0,))
    options = {"recipe": RECIPE, "training": TRAINING}
    (other,) = train_on_images(model, root / "scans", tmp_path / "moved/work", [StudentSpec(r=3)], **options)
    assert (other.folder / "checkpoint_final.pth").is_file()


def test_refusals(done, home, tmp_path):
    root, _, (low, full) = done
    alone = PublishedSpec(path=full, folds=(0,))
    options = {"recipe": RECIPE, "keep_all": True}
    shutil.copytree(full, tmp_path / "alone" / full.name)
    with pytest.raises(NotFoundError, match=f"needs the predictions of {LOWRES}, which is not beside it"):
        label_images(PublishedSpec(path=tmp_path / "alone" / full.name), root / "scans", tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()
    shutil.copytree(root / "results", tmp_path / "results")
    shutil.rmtree(tmp_path / "results" / low.parent.name / low.name / "fold_1")
    other = PublishedSpec(path=tmp_path / "results" / full.parent.name / full.name, folds=(0,))
    with pytest.raises(MismatchError, match="first stage, folds: 0 1 -> 0\n"):
        label_images(other, root / "scans", root / "out/work", **options)
    damaged = tmp_path / "results" / low.parent.name / low.name / "fold_1/checkpoint_final.pth"
    damaged.parent.mkdir()
    damaged.write_bytes((low / "fold_1/checkpoint_final.pth").read_bytes()[:-3000])
    with pytest.raises(CorruptError, match=rf"(?s){damaged}.*or leave fold 1 out, by taking {damaged.parent} away"):
        label_images(other, root / "scans", root / "out/work", **options)
    assert label_images(alone, root / "scans", root / "out/work", **options).held_out, "the folder is the zip's"
    with pytest.raises(NotFoundError, match="not preprocessed yet"):
        train_on_images(alone, root / "scans", tmp_path / "new", [StudentSpec(r=2)], recipe=RECIPE, training=TRAINING)
    online = {**TRAINING, "online_teacher": 0.5}
    with pytest.raises(SpecError, match=f"--online-teacher: {CASCADE} needs labels of the stage before it"):
        train_on_images(alone, root / "scans", root / "out/work", [StudentSpec(r=2)], recipe=RECIPE, training=online)
