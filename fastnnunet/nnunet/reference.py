"""The baseline of every speed claim: nnU-Net's own predictor, one case at a time, file in and file out."""

import contextlib
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint, load_weights
from fastnnunet.nnunet.files.model import FoldFacts, ModelFolder, build_network
from fastnnunet.nnunet.files.paths import resolve_dataset
from fastnnunet.nnunet.files.plans import configuration_of, read_json, trainer_class
from fastnnunet.specs.teacher import TeacherSpec

if TYPE_CHECKING:
    import torch

    from fastnnunet.nnunet.v2 import nnUNetPredictor


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """Seconds per stage of one case (`read_s`, `preprocess_s`, `infer_s`, `postprocess_s`, `write_s`), and how often
    the network ran.
    """

    stages_s: dict[str, float]
    forward_passes: int


@dataclass(frozen=True, slots=True)
class ReferencePredictor:
    """nnU-Net's `nnUNetPredictor`, loaded. Make one with `load_reference` or `reference_of_network`."""

    predictor: "nnUNetPredictor"
    threads: int

    def predict_case(self, files: Sequence[Path], output: Path) -> ReferenceRun:
        """Predict the channel `files` of a case into the file `output`.

        The same calls in the same order as the loop of `nnUNetPredictor.predict_from_files_sequential`, which cannot be
        used as it is because it forgets its Gaussian after every call; those of `run_case` and
        `export_prediction_from_logits` one by one, so that reading and writing have times of their own.
        """
        import torch

        from fastnnunet.nnunet.v2 import convert_predicted_logits_to_segmentation_with_correct_shape

        p = self.predictor
        torch.set_num_threads(self.threads)
        output.parent.mkdir(parents=True, exist_ok=True)
        passes = 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        hook = p.network.register_forward_hook(count)
        with contextlib.redirect_stdout(io.StringIO()):
            marks = [time.perf_counter()]
            io_class = p.plans_manager.image_reader_writer_class
            image_CZYX, properties = io_class().read_images([str(f) for f in files])
            marks.append(time.perf_counter())
            preprocessor = p.configuration_manager.preprocessor_class(verbose=False)
            data_CZYX, _, properties = preprocessor.run_case_npy(
                image_CZYX, None, properties, p.plans_manager, p.configuration_manager, p.dataset_json
            )
            del image_CZYX
            marks.append(time.perf_counter())
            logits_HZYX = p.predict_logits_from_preprocessed_data(torch.from_numpy(data_CZYX)).cpu()
            marks.append(time.perf_counter())
            segmentation_ZYX = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits_HZYX, p.plans_manager, p.configuration_manager, p.label_manager, properties
            )
            marks.append(time.perf_counter())
            io_class().write_seg(segmentation_ZYX, str(output), properties)
            marks.append(time.perf_counter())
        hook.remove()
        stages = ("read_s", "preprocess_s", "infer_s", "postprocess_s", "write_s")
        seconds = {name: end - start for name, start, end in zip(stages, marks, marks[1:], strict=False)}
        return ReferenceRun(seconds, passes)


def load_reference(
    model_folder: Path,
    folds: Sequence[int | str],
    *,
    mirroring: bool,
    threads: int,
    checkpoint: str = "checkpoint_final.pth",
    step_size: float = 0.5,
    device: str = "cpu",
) -> ReferencePredictor:
    """Load folds of a model folder with `initialize_from_trained_model_folder`, in nnU-Net's own precision.

    Raises NotFoundError or CorruptError for a checkpoint, MismatchError for a cascade, SpecError when the environment
    would hold nnU-Net to fewer threads than asked for, which would flatter whatever is compared with it.
    """
    for fold in folds:  # before nnU-Net unpickles them: only files that hold nothing but tensors and numbers
        stored = load_checkpoint(model_folder / f"fold_{fold}" / checkpoint)
        trainer_class(stored["trainer_name"])  # and before it looks up the names in plans
        configuration_of(read_json(model_folder / "plans.json"), stored["init_args"]["configuration"])
    predictor = _predictor(mirroring=mirroring, threads=threads, step_size=step_size, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        predictor.initialize_from_trained_model_folder(str(model_folder), tuple(folds), checkpoint)
    _check_no_cascade(predictor, model_folder.name)
    return ReferencePredictor(predictor, threads)


def reference_of_network(
    network: "torch.nn.Module",
    weights: Sequence[Any],
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    *,
    mirror_axes: Sequence[int] | None,
    threads: int,
    step_size: float = 0.5,
    device: str = "cpu",
) -> ReferencePredictor:
    """nnU-Net's predictor around a network that is not in a model folder; `weights`: one state dict per fold.

    Raises MismatchError for a cascade, SpecError as `load_reference` does.
    """
    plans_manager, config = configuration_of(plans, configuration)
    predictor = _predictor(mirroring=bool(mirror_axes), threads=threads, step_size=step_size, device=device)
    predictor.manual_initialization(
        network.to(predictor.device).eval(),
        plans_manager,
        config,
        list(weights),
        dataset_json,
        "nnUNetTrainer",
        tuple(mirror_axes) if mirror_axes else None,
    )
    _check_no_cascade(predictor, configuration)
    return ReferencePredictor(predictor, threads)


@dataclass(frozen=True, slots=True)
class FoldReference:
    """nnU-Net's predictor over preprocessed patches, one fold at a time, read from disk as nnU-Net reads it."""

    predictor: "nnUNetPredictor"
    files: ModelFolder

    @property
    def name(self) -> str:
        """What it is, for a record."""
        return f"nnunetv2 {metadata.version('nnunetv2')} nnUNetPredictor on {self.predictor.device.type}"

    def logits(self, patch_CZYX: np.ndarray, fold: int | str) -> np.ndarray:
        """float32 (heads, z, y, x) of a patch float32 (C, z, y, x)."""
        import torch

        facts = self.files.facts(fold)
        if facts.trainer == facts.trained_by:
            self.predictor.initialize_from_trained_model_folder(str(self.files.folder), (fold,), self.files.checkpoint)
        else:  # a trainer that nnU-Net does not find either
            self._initialize(fold, facts)
        logits: np.ndarray = (
            self.predictor.predict_logits_from_preprocessed_data(torch.from_numpy(patch_CZYX)).float().numpy()
        )
        return logits

    def _initialize(self, fold: int | str, facts: FoldFacts) -> None:
        model, weights = self.files.model, self.files.take_weights(fold)
        network = build_network(model, trainer=facts.trainer)
        load_weights(network, weights, self.files.path(fold))
        self.predictor.manual_initialization(
            network.to(self.predictor.device).eval(),
            model.manager,
            model.config,
            [weights],
            model.dataset_json,
            facts.trainer,
            facts.mirror_axes or None,
        )


def fold_reference(files: ModelFolder, *, mirroring: bool, step_size: float) -> FoldReference:
    """nnU-Net's predictor for the folds of a model folder, on a CUDA device where there is one."""
    import torch

    from fastnnunet.nnunet.v2 import nnUNetPredictor

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a note about the device
        predictor = nnUNetPredictor(
            tile_step_size=step_size, use_mirroring=mirroring, device=device, verbose=False, allow_tqdm=False
        )
    return FoldReference(predictor, files)


def predict_command(
    teacher: TeacherSpec,
    folds: Sequence[int | str],
    images: Path,
    output: Path,
    *,
    mirroring: bool,
    device: str = "cpu",
) -> list[str]:
    """`nnUNetv2_predict` with folds of the teacher over a folder of images, for a new process of this interpreter."""
    entry = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()"
    names = ["-d", resolve_dataset(teacher.dataset), "-c", teacher.configuration, "-p", teacher.plans]
    names += ["-tr", teacher.trainer, "-chk", teacher.checkpoint, "-f", *(str(fold) for fold in folds)]
    files = ["-i", str(images), "-o", str(output), "-device", device]
    return [sys.executable, "-c", entry, *files, *names, *([] if mirroring else ["--disable_tta"])]


def _predictor(*, mirroring: bool, threads: int, step_size: float, device: str) -> "nnUNetPredictor":
    import torch

    from fastnnunet.nnunet.v2 import default_num_processes, nnUNetPredictor

    if default_num_processes < threads:
        raise SpecError(
            f"nnUNet_def_n_proc={default_num_processes} limits nnU-Net's predictor to that many threads, "
            f"but {threads} are to be measured\nunset it, or give --threads {default_num_processes}"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError(f"--device {device}: no CUDA device is available here\nuse --device cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        return nnUNetPredictor(
            tile_step_size=step_size,
            use_mirroring=mirroring,
            device=torch.device(device),
            perform_everything_on_device=device != "cpu",
            allow_tqdm=False,
        )


def _check_no_cascade(predictor: "nnUNetPredictor", where: str) -> None:
    if predictor.configuration_manager.previous_stage_name is not None:
        raise MismatchError(f"{where} is a cascade stage; give a configuration without a previous stage")
