"""nnU-Net's own commands on the folder of a student, in processes in which fastnnunet cannot be imported."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.distill.job import TrainingJob
from fastnnunet.distill.train import train_student
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from tests.tiny import CONFIGURATION, DATASET, world_environment

CASES = ["tiny_10", "tiny_11"]
CPU = ["-device", "cpu", "-npp", "1", "-nps", "1"]
SPEC = DistillSpec(alpha=0.0, epochs=1, iterations_per_epoch=2, val_iterations_per_epoch=1, precision="fp32")


@pytest.fixture(scope="module")
def trained(pristine_world, tmp_path_factory):
    """A world with one trained student, made once: (environment, root, model folder of the student)."""
    root = tmp_path_factory.mktemp("stock") / "nnunet"
    shutil.copytree(pristine_world, root)
    environment = {**world_environment(root), "nnUNet_n_proc_DA": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        job = TrainingJob(
            teacher=TeacherSpec(dataset="998", folds=(0, 1)),
            student=StudentSpec(r=2),
            distill=SPEC,
            cache=CacheSpec(precision="fp32", mirroring=False),
            fold=0,
            device="cpu",
            threads=1,
        )
        return environment, root, train_student(job).parent


@pytest.fixture
def stock(trained, tmp_path):
    """Runs an entry point of nnU-Net: stock("module:function", *arguments)."""

    def run(entry, *arguments, **changes):
        module, function = entry.split(":")
        script = tmp_path / "stock.py"
        script.write_text(
            "import sys; sys.modules['fastnnunet'] = None\n"  # spawned processes run this line as well
            f"from nnunetv2.{module} import {function}\n"
            f"if __name__ == '__main__': {function}()\n"
        )
        command = [sys.executable, str(script), *map(str, arguments)]
        environment = {**trained[0], **{k: str(v) for k, v in changes.items()}}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def read(folder):
    return {case: sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}.nii.gz"))) for case in CASES}


def predict(stock, root, model, out, *options):
    images = root / "raw" / DATASET / "imagesTs"
    entry = "inference.predict_from_raw_data:predict_entry_point_modelfolder"
    stock(entry, "-i", images, "-o", out, "-m", model, "-f", "0", *CPU, *options)
    return read(out)


def test_export_and_install_into_an_empty_results_folder(trained, stock, tmp_path):
    _, root, model = trained
    expected = predict(stock, root, model, tmp_path / "direct")
    plans = model.name.split("__")[1]
    names = f"-d 998 -c {CONFIGURATION} -p {plans} -f 0".split()
    stock("model_sharing.entry_points:export_pretrained_model_entry", *names, "-o", tmp_path / "student.zip")
    empty = tmp_path / "results"
    empty.mkdir()
    stock("model_sharing.entry_points:install_from_zip_entry_point", tmp_path / "student.zip", nnUNet_results=empty)
    assert (empty / DATASET / model.name / "fold_0" / "checkpoint_final.pth").is_file()
    images, out = root / "raw" / DATASET / "imagesTs", tmp_path / "installed"
    entry = "inference.predict_from_raw_data:predict_entry_point"
    stock(entry, "-i", images, "-o", out, *names, *CPU, nnUNet_results=empty)
    for case, labels in read(out).items():
        np.testing.assert_array_equal(labels, expected[case])


def test_find_best_configuration(trained, stock):
    _, root, model = trained
    plans = model.name.split("__")[1]
    options = f"998 -c {CONFIGURATION} -p {plans} -f 0 -np 1 --disable_ensembling".split()
    stock("evaluation.find_best_configuration:find_best_configuration_entry_point", *options)
    instructions = (root / "results" / DATASET / "inference_instructions.txt").read_text()
    assert f"-p {plans}" in instructions
    assert (model / "crossval_results_folds_0" / "postprocessing.pkl").is_file()


def test_ensemble_of_student_and_teacher(trained, stock, tmp_path):
    """The oracle: the class of the larger mean of the probabilities that nnU-Net stored."""
    _, root, model = trained
    teacher = root / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    members = [tmp_path / "student", tmp_path / "teacher"]
    for folder, out in zip((model, teacher), members, strict=True):
        predict(stock, root, folder, out, "--save_probabilities")
    stock("ensembling.ensemble:entry_point_ensemble_folders", "-i", *members, "-o", tmp_path / "both", "-np", "1")
    student = read(members[0])
    for case, labels in read(tmp_path / "both").items():
        mean = sum(np.load(m / f"{case}.npz")["probabilities"].astype(np.float32) for m in members) / 2
        assert (labels == mean.argmax(0)).mean() > 0.999  # equal but for ties
        assert (labels != student[case]).any(), "the teacher must count"
