"""Soft maps in a teacher's place: nnU-Net writes the maps and prepares the images that they are compared with."""

import pickle
import shutil
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fastnnunet.api.soft_maps import import_maps
from fastnnunet.cache.build import build_cache
from fastnnunet.cache.job import prepare_job
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.verify import verify_cache
from fastnnunet.cli.main import main
from fastnnunet.distill.job import TrainingJob
from fastnnunet.distill.train import train_student
from fastnnunet.errors import ImageError, MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import model_of
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from fastnnunet.teachers.maps.check import value_problems
from fastnnunet.teachers.maps.jobs import maps_job, preprocessed_model
from fastnnunet.teachers.maps.read import read_map
from fastnnunet.teachers.maps.teacher import on_grid
from fastnnunet.testing import check_teacher
from tests.test_kinds import prepare, recipe_for
from tests.tiny import CONFIGURATION, DATASET

DATA = TeacherSpec(dataset="998", folds=(0, 1))
RECIPE = CacheSpec(precision="fp32", mirroring=False, engine="torch")
CASES = ("tiny_00", "tiny_01")
ALL = tuple(f"tiny_{number:02d}" for number in range(10))


def image_of(world, case):
    return sitk.ReadImage(str(world / "raw" / DATASET / "imagesTr" / f"{case}_0000.nii.gz"))


def random_map(shape_zyx, seed):
    noise = 3 * np.random.default_rng(seed).standard_normal((3, *shape_zyx))
    values = np.exp(noise)
    return (values / values.sum(axis=0)).astype(np.float32)


def write_nifti(world, folder, case, values_CZYX):
    """A channel per class along the fourth axis, on the grid of the image."""
    folder.mkdir(exist_ok=True)
    image = image_of(world, case)
    volumes = []
    for channel in values_CZYX:
        volume = sitk.GetImageFromArray(channel)
        volume.CopyInformation(image)
        volumes.append(volume)
    sitk.WriteImage(sitk.JoinSeries(volumes), str(folder / f"{case}.nii.gz"))


def write_raters(world, folder, cases=CASES, seed=0):
    """NIfTI maps of cases; returns case -> values."""
    maps = {}
    for number, case in enumerate(cases):
        maps[case] = random_map(sitk.GetArrayFromImage(image_of(world, case)).shape, seed + number)
        write_nifti(world, folder, case, maps[case])
    return maps


def read_back(cache, case):
    reader = SoftLabelReader(cache.path)
    return reader.to_probabilities(reader.read_patch(case, (0, 0, 0), reader.shape_zyx(case)))


def softmax(logits, temperature):
    return torch.softmax(torch.from_numpy(np.asarray(logits, np.float64)) / temperature, 0).numpy()


def nnunets_maps(folder, only=CASES, teacher=DATA, recipe=RECIPE):
    """Maps of the teacher as nnU-Net saves them, and the cache that the teacher makes itself."""
    from nnunetv2.inference.export_prediction import export_prediction_from_logits

    folder.mkdir()
    source, factory, root = open_teacher(teacher, recipe)
    loaded, model = factory.load(1), factory.files.model
    for case in only:
        image = source.image_CZYX(case)
        ((_, logits),) = loaded.blocks(image, teacher.folds, image.shape[1:])
        properties = deepcopy(source.load(case)[3])
        export_prediction_from_logits(
            torch.from_numpy(logits), properties, model.config, model.manager, model.dataset_json, str(folder / case),
            save_probabilities=True, num_threads_torch=1,
        )  # fmt: skip
    return build_cache(prepare_job(source, factory, recipe, root, command="rebuild"), only=only)


def test_of_a_teacher_it_is_the_teachers_cache(world, tmp_path):
    direct = nnunets_maps(tmp_path / "maps")
    cache = import_maps([tmp_path / "maps"], DATA, RECIPE, cases=CASES).cache
    assert list(cache.cases) == [*CASES]
    assert cache.key != direct.key
    assert {case: direct.cases[case] for case in CASES} == cache.cases
    assert "checkpoints" not in cache.identity["teacher"]
    assert len(cache.identity["teacher"]["maps"]["0"]) == 64
    assert [report.status for report in verify_cache(cache)] == ["ok", "ok"]
    for case in CASES:
        ours, theirs = read_back(cache, case), read_back(direct, case)
        assert theirs.std() > 0.01
        assert np.abs(ours - theirs).max() <= cache.codec.eps + direct.codec.eps + 1e-3


@pytest.mark.parametrize("kind", ["regions", "2d"])
def test_other_kinds_from_nnunets_maps_to_a_student(world, tmp_path, kind):
    configuration = prepare(world, kind)
    teacher = TeacherSpec(dataset="998", configuration=configuration, folds=(0,))
    recipe = replace(recipe_for(kind), temperature=2.0)
    direct = nnunets_maps(tmp_path / "maps", ALL, teacher, recipe)
    cache = import_maps([tmp_path / "maps"], teacher, recipe).cache
    assert cache.codec.name == direct.codec.name == ("sigmoid_u8" if kind == "regions" else "simplex_u8")
    for case in CASES:
        ours, theirs = read_back(cache, case), read_back(direct, case)
        assert len(ours) == (2 if kind == "regions" else 3)
        assert theirs.std() > 0.01
        assert np.abs(ours - theirs).max() <= cache.codec.eps + direct.codec.eps + 1e-3
    distill = DistillSpec(
        alpha=0.5, temperature=2.0, epochs=1, iterations_per_epoch=1, val_iterations_per_epoch=1, precision="fp32",
        start="random",
    )  # fmt: skip
    steps = []
    job = TrainingJob(
        teacher=teacher, student=StudentSpec(r=2), distill=distill, cache=recipe, fold=0, device="cpu", threads=1,
        soft_labels=cache.path.name,
    )  # fmt: skip
    folder = train_student(job, validate=False, progress=steps.append)
    assert load_checkpoint(folder / "checkpoint_final.pth")["fastnnunet"]["cache_key"] == cache.key
    assert all(step.soft > 0 for step in steps)


def test_region_maps_of_raters_are_averaged_and_tempered(world, tmp_path):
    """Each region by itself: they overlap, and no sum is one."""
    prepare(world, "regions")
    recipe = replace(recipe_for("regions"), temperature=2.0)
    maps = {}
    for rater, seed in (("a", 0), ("b", 50)):
        for number, case in enumerate(CASES):
            shape = sitk.GetArrayFromImage(image_of(world, case)).shape
            values = np.random.default_rng(seed + number).random((2, *shape), np.float32)
            maps[rater, case] = values
            write_nifti(world, tmp_path / rater, case, values)
    cache = import_maps([tmp_path / "a", tmp_path / "b"], DATA, recipe, cases=CASES).cache
    for case in CASES:
        mean = (maps["a", case].astype(np.float64) + maps["b", case]) / 2
        tempered = 1 / (1 + ((1 - mean) / mean) ** 0.5)  # sigmoid(logit(mean) / 2)
        assert np.abs(read_back(cache, case) - tempered).max() <= cache.codec.eps + 1e-3
    write_nifti(world, tmp_path / "a", CASES[0], maps["a", CASES[0]] * 1.5)
    with pytest.raises(MismatchError, match="expected probabilities from 0 to 1"):
        import_maps([tmp_path / "a", tmp_path / "b"], DATA, recipe, cases=CASES)


def test_raters_are_averaged_and_tempered(world, tmp_path):
    one, other = (write_raters(world, tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 50)))
    folders = [tmp_path / "a", tmp_path / "b"]
    recipe = replace(RECIPE, encoding="float16", temperature=2.0)
    cache = import_maps(folders, DATA, recipe, cases=CASES).cache
    pooled = import_maps(folders, DATA, replace(recipe, pooling="probabilities"), cases=CASES).cache
    for case in CASES:
        mean = (one[case].astype(np.float64) + other[case]) / 2
        np.testing.assert_allclose(read_back(cache, case), softmax(np.log(mean), 2), atol=1e-3)
        each = [softmax(np.log(maps[case]), 2) for maps in (one, other)]
        np.testing.assert_allclose(read_back(pooled, case), np.mean(each, axis=0), atol=1e-3)
    assert import_maps(folders[::-1], DATA, recipe, cases=CASES).cache.key == cache.key  # raters have no order
    write_nifti(world, tmp_path / "a", CASES[0], random_map(one[CASES[0]].shape[1:], 99))
    assert import_maps(folders, DATA, recipe, cases=CASES).cache.key != cache.key


def test_a_teacher_like_any_other(world, tmp_path):
    write_raters(world, tmp_path / "a"), write_raters(world, tmp_path / "b", seed=50)
    job = maps_job(DATA, RECIPE, [tmp_path / "a", tmp_path / "b"], only=CASES)
    check_teacher(job.factory, job.source.image_CZYX(CASES[0]), (9, 10, 11))


def test_grid_is_that_of_nnunets_preprocessor(world):
    """A map that is the image: with the same resampling it must come out as nnU-Net prepares that image."""
    model = preprocessed_model(DATA)
    plans = deepcopy(model.plans) | {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    config = plans["configurations"][CONFIGURATION]
    config |= {"spacing": [1.2, 1.1, 0.9], "normalization_schemes": ["NoNormalization"]}
    config["resampling_fn_data"] = config["resampling_fn_probabilities"]
    config["resampling_fn_data_kwargs"] = config["resampling_fn_probabilities_kwargs"]
    changed = model_of(plans, CONFIGURATION, model.dataset_json)
    first = np.zeros((20, 24, 22), np.float32)
    first[3:18, 2:20, 1:21] = random_map((15, 18, 20), 4)[0]
    prepared, _, properties = changed.config.preprocessor_class(verbose=False).run_case_npy(
        first[None], None, {"spacing": [1.5, 1.0, 1.0]}, changed.manager, changed.config, changed.dataset_json
    )
    assert prepared.shape[1:] != properties["shape_after_cropping_and_before_resampling"]
    ours = on_grid(np.stack([first, 1 - first, 0 * first]), properties, changed, prepared.shape[1:])
    np.testing.assert_allclose(ours[0], prepared[0], atol=1e-5)
    np.testing.assert_allclose(ours.sum(axis=0), 1, atol=1e-5)


def nan(values):
    values[1, 3, 4, 5] = np.nan
    return values


WRONG = {
    "shape": (lambda v: v[:, 1:], r"got 19 x 24 x 22 voxels \(z, y, x\), expected 20 x 24 x 22"),
    "classes": (lambda v: v[:2] / v[:2].sum(0), "got 2 channels, expected 3, the classes with background"),
    "finite": (nan, r"1 values are not finite"),
    "range": (lambda v: v * 255, "expected probabilities from 0 to 1"),
    "sum": (lambda v: v * 0.9, r"sum to 0\.9000, expected 1, or off by 0\.005 at most"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_values_that_are_no_soft_map(world, tmp_path, wrong):
    change, message = WRONG[wrong]
    maps = write_raters(world, tmp_path / "maps")
    file = tmp_path / "maps" / f"{CASES[0]}.npz"
    np.savez(file, probabilities=change(maps[CASES[0]].copy()))
    properties = maps_job(DATA, RECIPE, [tmp_path / "maps"], only=CASES[1:]).factory.cases.load(CASES[0])[3]
    file.with_suffix(".pkl").write_bytes(pickle.dumps(properties))
    with pytest.raises(MismatchError, match=message):
        import_maps([tmp_path / "maps"], DATA, RECIPE, cases=CASES)
    assert not list((world / "preprocessed" / DATASET).glob("fastnnunet_*"))


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_that_is_cut_off_or_not_finite(tmp_path, ending, vectors):
    """ITK reads what is missing, and NaN, as zeros, which are probabilities too."""
    values = np.random.default_rng(0).uniform(0.2, 0.9, (2, 6, 7, 8)).astype(np.float32)
    file = tmp_path / f"map{ending}"

    def write():
        array = np.moveaxis(values, 0, -1) if vectors else values
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vectors), str(file))

    write()
    np.testing.assert_array_equal(read_map(file).values_CZYX, values)
    content = file.read_bytes()
    for share in (0.5, 0.9, 0.999):
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ImageError, match=rf"{file.name} is truncated"):
            read_map(file)
    values[1, 3, 4, 5] = np.nan
    write()
    read = read_map(file).values_CZYX
    np.testing.assert_array_equal(read, values)
    assert value_problems(read, sums_to_one=False) == ["1 values are not finite (NaN or infinite)"]


@pytest.mark.parametrize("stored", [np.uint8, np.float64])
def test_nifti_whose_values_are_rescaled(tmp_path, stored):
    file = tmp_path / "map.nii"
    sitk.WriteImage(sitk.GetImageFromArray(np.full((6, 5, 4), 128, stored)), str(file))
    content = bytearray(file.read_bytes())
    content[112:116] = np.float32(1 / 256).tobytes()  # scl_slope
    file.write_bytes(content)
    if stored is np.uint8:
        np.testing.assert_allclose(read_map(file).values_CZYX, np.full((1, 6, 5, 4), 0.5), rtol=1e-6)
    else:
        with pytest.raises(ImageError, match="rescaled floating point numbers; write it again as float32"):
            read_map(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.SetSpacing((1.0, 1.0, 1.6, 1.0)), "spacing_zyx: got"),
        (lambda i: i.SetOrigin((0.0, 5.0, 0.0, 0.0)), "origin_xyz: got"),
        (lambda i: i.SetDirection(np.diag([1.0, -1, 1, 1]).ravel().tolist()), "direction: got"),
    ],
    ids=["spacing", "origin", "direction"],
)
def test_maps_that_lie_elsewhere(world, tmp_path, change, message):
    write_raters(world, tmp_path / "maps")
    file = str(tmp_path / "maps" / f"{CASES[1]}.nii.gz")
    image = sitk.ReadImage(file)
    change(image)
    sitk.WriteImage(image, file)
    with pytest.raises(MismatchError, match=message):
        import_maps([tmp_path / "maps"], DATA, RECIPE, cases=CASES)


def test_all_problems_in_one_message(world, tmp_path, capsys):
    maps = write_raters(world, tmp_path / "maps", ALL[:3])
    write_nifti(world, tmp_path / "maps", ALL[0], maps[ALL[0]] * 2)
    (tmp_path / "maps" / f"{ALL[1]}.nii.gz").write_bytes(b"no image")
    shutil.copy(tmp_path / "maps" / f"{ALL[2]}.nii.gz", tmp_path / "maps" / "stranger.nii.gz")
    with pytest.raises(SystemExit) as ended:
        main(["cache", "import", str(tmp_path / "maps"), "-d", "998", "--cases", *ALL[:4]])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    for words in (
        "4 problem(s)",
        "from 0 to 1",
        f"{ALL[1]}.nii.gz is not a NIfTI image",
        f"no map of case {ALL[3]}",
        "stranger",
    ):
        assert words in said
    assert not list((world / "preprocessed" / DATASET).glob("fastnnunet_*"))


def test_hostile_properties_are_not_run(world, tmp_path):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    maps = write_raters(world, tmp_path / "maps", CASES[:1])
    np.savez(tmp_path / "maps" / f"{CASES[0]}.npz", probabilities=maps[CASES[0]])
    (tmp_path / "maps" / f"{CASES[0]}.pkl").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(MismatchError, match="cannot be read"):
        import_maps([tmp_path / "maps"], DATA, RECIPE, cases=CASES[:1])
    assert not (tmp_path / "touched").exists()


def test_other_refusals(world, tmp_path):
    maps = tmp_path / "maps"
    write_raters(world, maps, CASES[:1])
    with pytest.raises(NotFoundError, match="is no folder"):
        import_maps([tmp_path / "absent"], DATA, RECIPE)
    with pytest.raises(SpecError, match="a folder twice"):
        import_maps([maps, maps], DATA, RECIPE)
    with pytest.raises(SpecError, match="soft maps have no folds"):
        import_maps([maps], DATA, replace(RECIPE, policy="out_of_fold"))
    with pytest.raises(SpecError, match="--cases: got nobody"):
        import_maps([maps], DATA, RECIPE, cases=["nobody"])
    with pytest.raises(MismatchError, match=r"9 problem\(s\)"):
        import_maps([maps], DATA, RECIPE)


def test_a_damaged_case_is_made_again(world, tmp_path, capsys):
    write_raters(world, tmp_path / "maps")
    words = ["cache", "import", str(tmp_path / "maps"), "-d", "998", "--cases", *CASES]
    main_quietly(words)
    said = capsys.readouterr()
    assert "compared" not in said.out + said.err  # there is no teacher
    cache = import_maps([tmp_path / "maps"], DATA, CacheSpec(), cases=CASES).cache
    before = read_back(cache, CASES[0])
    shard = cache.case_dir(CASES[0]) / "c" / "0" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    assert [report.status for report in verify_cache(cache)] == ["damaged", "ok"]
    assert "--cases" in cache.rebuild_command(CASES[0])
    assert "--case " not in cache.rebuild_command(CASES[0])
    main_quietly(words)
    np.testing.assert_array_equal(read_back(cache, CASES[0]), before)
    assert f"--soft-labels {cache.path.name}" in capsys.readouterr().out
    main_quietly(["cache", "list", "-d", "998"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(cache.path.name))
    assert line.split()[3:7] == ["import", "1", "map(s)", "2/2"], "maps are of no fold"


def main_quietly(words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code


class TestTraining:
    SHORT = DistillSpec(
        alpha=0.5, temperature=2.0, epochs=1, iterations_per_epoch=2, val_iterations_per_epoch=1, precision="fp32",
        start="random",
    )  # fmt: skip

    def job(self, which, **changes):
        fields = {
            "teacher": DATA, "student": StudentSpec(r=2), "distill": self.SHORT, "fold": 0, "device": "cpu",
            "cache": CacheSpec(temperature=2.0), "threads": 1, "soft_labels": which,
        }  # fmt: skip
        return TrainingJob(**fields | changes)

    def test_without_any_teacher(self, world, tmp_path):
        write_raters(world, tmp_path / "maps", ALL)
        cache = import_maps([tmp_path / "maps"], DATA, CacheSpec(temperature=2.0)).cache
        shutil.rmtree(world / "results" / DATASET)
        job = self.job(cache.path.name[:8])
        with pytest.raises(NotFoundError, match="--start random"):
            train_student(replace(job, distill=replace(self.SHORT, start="teacher")), validate=False)
        cooler = replace(job, cache=CacheSpec(temperature=1.0), distill=replace(self.SHORT, temperature=1.0))
        with pytest.raises(MismatchError, match=r"--temp 2, or make another with: .* --temp 1$"):
            train_student(cooler, validate=False)
        with pytest.raises(NotFoundError, match="no such cache"):
            train_student(replace(job, soft_labels="beef"), validate=False)
        assert not (world / "results" / DATASET).exists()
        folder = train_student(job, validate=False)
        checkpoint = load_checkpoint(folder / "checkpoint_final.pth")
        assert checkpoint["fastnnunet"]["cache_key"] == cache.key

    def test_caches_of_other_cases(self, world, tmp_path):
        write_raters(world, tmp_path / "maps")
        cache = import_maps([tmp_path / "maps"], DATA, CacheSpec(temperature=2.0), cases=CASES).cache
        with pytest.raises(MismatchError, match="new cases: tiny_02") as refused:
            train_student(self.job(str(cache.path)), validate=False)
        advice = str(refused.value).splitlines()[-1]
        assert advice.startswith("make one that does with: fastnnunet cache import")
        assert "--cases" not in advice  # which made this one

    def test_options_that_exclude_it(self):
        with pytest.raises(SpecError, match="-a 0"):
            self.job("abc", distill=replace(self.SHORT, alpha=0.0))
