"""The command line as a user meets it: whole commands in processes of their own."""

import errno
import json
import re
import subprocess
import sys
import time
from importlib import metadata

import pytest

from tests.tiny import CONFIGURATION, DATASET


def run(*words, module="fastnnunet.cli.main", function="main", env=None):
    code = f"from {module} import {function}\nif __name__ == '__main__': {function}()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=env,
    )


@pytest.fixture
def run_here(capsys):
    """`run` in this process, where torch and nnU-Net are imported already."""
    from fastnnunet.cli.main import main

    def run_here(*words):
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, words)))
        return subprocess.CompletedProcess(words, stopped.value.code, *capsys.readouterr())

    return run_here


def refused(done, *expected):
    """Exit code 2, one message, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    for text in expected:
        assert text in done.stderr
    return done.stderr


def test_spread_multi_values():
    from fastnnunet.cli.main import spread_multi_values

    given = ["train", "-f", "0", "1", "2", "-r", "2", "-d", "4"]
    assert spread_multi_values(given) == ["train", "-f", "0", "-f", "1", "-f", "2", "-r", "2", "-d", "4"]
    plain = ["predict", "-i", "a", "-o", "b"]
    assert spread_multi_values(plain) == plain


@pytest.mark.parametrize(
    "words",
    [
        "train -d 4 -f 0 -r 4 --precision fp32 bf16",
        "export tensorrt bundle --precision fp16 int8",
        "distill auto -d 4 -r 2 4 -o out -f 0 1",
    ],
)
def test_a_second_value_of_an_option_with_one_is_refused(words):
    done = run(*words.split())
    assert done.returncode == 2
    assert re.search(rf"unexpected extra argument.*\({words.split()[-1]}\)", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_message(capsys):
    from fastnnunet.cli.guard import guarded

    def fill():
        raise OSError(errno.ENOSPC, "No space left on device", "bundle/model.onnx")

    with pytest.raises(SystemExit) as stopped:
        guarded(fill)
    assert stopped.value.code == 2
    assert "error: No space left on device: bundle/model.onnx\nfree some space" in capsys.readouterr().err

    def copy():  # as shutil names both
        raise OSError(errno.ENOSPC, "No space left on device", "work/plans.json", None, "full/plans.json")

    with pytest.raises(SystemExit):
        guarded(copy)
    assert "error: No space left on device: full/plans.json\n" in capsys.readouterr().err

    def lose():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):  # nothing a user can mend: as it is
        guarded(lose)


def test_version():
    done = run("--version")
    assert done.returncode == 0
    for name in ("fastnnunet", "numpy", "onnxruntime"):
        assert f"{name} {metadata.version(name)}" in done.stdout
    assert "torch" in done.stdout
    assert done.stdout.count("\n") == 1


def test_help_is_fast_and_light():
    start = time.perf_counter()
    done = run("--help")
    elapsed_s = time.perf_counter() - start
    assert done.returncode == 0
    for command in ("cache", "train", "export", "predict", "benchmark", "evaluate"):
        assert command in done.stdout
    assert elapsed_s < 10, "a heavy import crept into the command line"  # the figure itself is a benchmark's business
    heavy = "('torch', 'numpy', 'nnunetv2', 'zarr')"
    probe = f"import sys, fastnnunet.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "command",
    [
        "cache build",
        "cache plan",
        "train",
        "export onnx",
        "export tensorrt",
        "export quantize",
        "predict",
        "evaluate",
        "benchmark",
    ],
)
def test_every_help_has_an_example(command):
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout


def test_three_stages_and_their_aliases(world, tmp_path):
    """nnU-Net-style commands build the cache when there is none; the plain commands find everything they left."""
    train = {"module": "fastnnunet.cli.aliases", "function": "distillation_train"}
    flags = ["-d", "998", "-f", "0", "-a", "0.3", "-temp", "3.0", "-r", "2", "-e", "1", "--iterations", "2"]
    done = run(*flags, **train)
    assert done.returncode == 0, done.stderr
    assert "building the soft-label cache first" in done.stderr
    assert "mean Dice on the validation fold" in done.stdout
    (progress,) = (world / "results").rglob("progress.png")
    assert progress.read_bytes().startswith(b"\x89PNG")
    refused(run(*flags, **train), "holds a finished run", "--overwrite")

    done = run("cache", "list", "-d", "998")
    assert done.returncode == 0, done.stderr
    again = run(
        "train", "-d", "998", "-f", "0", "-r", "4", "-temp", "3", "-e", "1", "--iterations", "1", "--no-validate"
    )
    assert again.returncode == 0, again.stderr  # the same cache serves another size

    bundle = tmp_path / "bundle"
    export = {"module": "fastnnunet.cli.aliases", "function": "distillation_export_onnx"}
    done = run("-d", "998", "-f", "0", "-a", "0.3", "-temp", "3.0", "-r", "2", "-o", bundle, "-v", **export)
    assert done.returncode == 0, done.stderr
    assert "parity with PyTorch" in done.stdout
    done = run("predict", "-i", world / "raw" / DATASET / "imagesTs", "-o", tmp_path / "out", "-m", bundle)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    done = run(
        "evaluate", "-p", tmp_path / "out", "-g", world / "raw" / DATASET / "labelsTs", "-o", tmp_path / "e.json"
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "e.json").read_text())["cases"]) == 2


class TestRefusals:
    def test_unknown_dataset(self, run_here, world):
        for command in ("cache build", "cache plan", "train -f 0 -r 2"):
            refused(run_here(*command.split(), "-d", "77"), "unknown data set '77'", DATASET)
        refused(run_here("export", "onnx", "-d", "77", "-f", "0", "-r", "2", "-o", "b"), "unknown data set '77'")

    def test_unset_variables(self, world, monkeypatch):
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            monkeypatch.delenv(name)
        refused(run("cache", "build", "-d", "998"), "nnUNet_preprocessed is not set")
        monkeypatch.delenv("nnUNet_results")
        refused(run("cache", "build", "-d", "998"), "nnUNet_results is not set")

    def test_missing_folds(self, run_here, world):
        refused(run_here("cache", "build", "-d", "998", "-f", "0", "7"), "fold(s) 7 have no checkpoint_final.pth")
        refused(run_here("cache", "build", "-d", "998", "-f", "zero"), "'zero' is no fold")

    def test_truncated_checkpoint(self, run_here, world):
        path = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}/fold_0/checkpoint_final.pth"
        path.write_bytes(path.read_bytes()[:1000])
        refused(run_here("cache", "build", "-d", "998"), "fold_0/checkpoint_final.pth cannot be read")

    def test_r_that_leaves_no_channels(self, run_here, world):
        refused(run_here("train", "-d", "998", "-f", "0", "-r", "99"), "-r 99 leaves no channels")

    def test_no_student(self, run_here, world):
        refused(
            run_here("export", "onnx", "-d", "998", "-f", "0", "-r", "3", "-o", "b"),
            "no student nnUNetPlans_r3",
            "fastnnunet train",
        )

    def test_wrong_spec_file(self, run_here, world, tmp_path):
        (tmp_path / "s.yaml").write_text("temprature: 2")
        refused(run_here("cache", "build", "-d", "998", "--spec", tmp_path / "s.yaml"), "unknown field 'temprature'")

    def test_base_install_says_which_extra_is_missing(self, tmp_path):
        blocked = "import sys\nfor m in ('torch', 'nnunetv2', 'zarr', 'google_crc32c'): sys.modules[m] = None\n"
        code = blocked + "from fastnnunet.cli.main import main\nmain(sys.argv[1:])"
        words = [sys.executable, "-c", code, "train", "-d", "998", "-f", "0", "-r", "2"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        refused(done, "needs the package", "pip install 'fastnnunet[train]'")

    def test_no_bundle(self, run_here, tmp_path):
        refused(run_here("predict", "-i", tmp_path, "-o", tmp_path / "o", "-m", tmp_path / "b"), "no bundle at")

    def test_a_file_as_the_model(self, run_here, tmp_path):
        (tmp_path / "model.zip").write_bytes(b"")
        done = run_here("predict", "-i", tmp_path, "-o", tmp_path / "o", "-m", tmp_path / "model.zip")
        refused(done, "model.zip is a file, expected the folder of a bundle or of an nnU-Net model", "unpack a zip")

    def test_no_model_to_learn_from(self, run_here, tmp_path):
        done = run_here("distill", "images", "-m", tmp_path / "b", "-i", tmp_path, "-r", 4, "-o", tmp_path / "o")
        refused(done, f"{tmp_path / 'b'} does not exist\n")
