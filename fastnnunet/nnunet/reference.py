"""The baseline of every speed claim: nnU-Net's own predictor, one case at a time, file in and file out."""

import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.nnunet.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor


@dataclass(frozen=True, slots=True)
class ReferencePredictor:
    """nnU-Net's `nnUNetPredictor`, loaded. Make one with `load_reference`."""

    predictor: "nnUNetPredictor"
    threads: int

    def predict_case(self, files: Sequence[Path], output: Path) -> dict[str, float]:
        """Predict the channel `files` of a case into the file `output`; seconds per stage.

        The same calls in the same order as the loop of `nnUNetPredictor.predict_from_files_sequential`, which cannot be
        used as it is because it forgets its Gaussian after every call. `preprocess` includes reading, `postprocess`
        writing.
        """
        import torch
        from nnunetv2.inference.export_prediction import export_prediction_from_logits

        p = self.predictor
        torch.set_num_threads(self.threads)
        output.parent.mkdir(parents=True, exist_ok=True)
        ending = p.dataset_json["file_ending"]
        with contextlib.redirect_stdout(io.StringIO()):
            marks = [time.perf_counter()]
            preprocessor = p.configuration_manager.preprocessor_class(verbose=False)
            data_CZYX, _, properties = preprocessor.run_case(
                [str(f) for f in files], None, p.plans_manager, p.configuration_manager, p.dataset_json
            )
            marks.append(time.perf_counter())
            logits_HZYX = p.predict_logits_from_preprocessed_data(torch.from_numpy(data_CZYX)).cpu()
            marks.append(time.perf_counter())
            export_prediction_from_logits(
                logits_HZYX,
                properties,
                p.configuration_manager,
                p.plans_manager,
                p.dataset_json,
                str(output).removesuffix(ending),
                False,
            )
            marks.append(time.perf_counter())
        stages = ("preprocess_s", "infer_s", "postprocess_s")
        return {name: end - start for name, start, end in zip(stages, marks, marks[1:], strict=False)}


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
    import torch
    from nnunetv2.configuration import default_num_processes
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    if default_num_processes < threads:
        raise SpecError(
            f"nnUNet_def_n_proc={default_num_processes} limits nnU-Net's predictor to that many threads, "
            f"but {threads} are to be measured\nunset it, or give --threads {default_num_processes}"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError(f"--device {device}: no CUDA device is available here\nuse --device cpu")
    for fold in folds:  # before nnU-Net unpickles them: only files that hold nothing but tensors and numbers
        load_checkpoint(model_folder / f"fold_{fold}" / checkpoint)
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(
            tile_step_size=step_size,
            use_mirroring=mirroring,
            device=torch.device(device),
            perform_everything_on_device=device != "cpu",
            allow_tqdm=False,
        )
        predictor.initialize_from_trained_model_folder(str(model_folder), tuple(folds), checkpoint)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise MismatchError(f"{model_folder} is a cascade stage; give a configuration without a previous stage")
    return ReferencePredictor(predictor, threads)
