"""A bundle in memory and its stages on arrays, each as nnU-Net 2.8 would."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.engines.base import Engine, Precision
from fastnnunet.engines.registry import create_ensemble
from fastnnunet.errors import ImageError, NotFoundError, SpecError
from fastnnunet.events import Listener, ignore
from fastnnunet.geometry.resample import ResampleSpec, parse_label_resample_spec, parse_resample_spec
from fastnnunet.runtime.ensemble import ensemble_logits
from fastnnunet.runtime.label_stream import stream_labels
from fastnnunet.runtime.logits import label_rule, plan_logits, postprocess
from fastnnunet.runtime.normalize import check_normalization
from fastnnunet.runtime.preprocess import Preprocessed, preprocess
from fastnnunet.runtime.sliding_window import SlidingWindow
from fastnnunet.runtime.times import StageTimes
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec
from fastnnunet.specs.checks.reproducible import preprocessing_problems, stated

# Logits of more bytes are not kept but labelled while the window goes on. Smaller ones are kept until it has passed, so
# that another thread can label them while the network is at the next case.
STREAM_BYTES = 2**29


@dataclass(frozen=True, slots=True)
class Labelled:
    """A segmentation in the model's axes, of the image's shape before it was cropped."""

    segmentation_ZYX: npt.NDArray[Any]


Inferred: TypeAlias = native.HalfArray | Labelled


@dataclass(slots=True)
class Prediction:
    """Segmentation in the axes of the image as read; probabilities (heads, those axes) float32 if asked for."""

    segmentation_ZYX: npt.NDArray[Any]
    probabilities_HZYX: npt.NDArray[np.float32] | None
    properties: dict[str, Any]  # nnU-Net's: what was read plus the crop
    times: StageTimes


class LoadedBundle:
    """A loaded bundle. Any number of threads may predict with it at once; each gets what it would get alone.

    Predictions run side by side, each with the backend's threads and with memory of its own; those of TensorRT take
    turns batch by batch. Where many threads predict, `threads=1` keeps them from competing for the cores.
    `step_size`, `mirror_axes` and `use_gaussian` may be changed between predictions, which read them once; threads that
    want different ones take a bundle each from `with_settings`.
    In a forked process a loaded bundle goes on working on CPUs, unless another thread was predicting at that moment: it
    is refused then (BackendError), as it always is on a GPU.
    """

    def __init__(
        self,
        spec: BundleSpec,
        backends: Sequence[Engine],
        *,
        step_size: float | None = None,
        mirroring: bool = True,
        use_gaussian: bool = True,
        threads: int | None = None,
    ) -> None:
        """`backends`: one for each model file of the bundle.

        `step_size`: largest step between tiles as a fraction of the patch; None: the bundle's. `mirroring`: along the
        axes the model was trained with. `use_gaussian`: tiles weigh less towards their rim.
        `threads`: of what is done before and after the network; None: all cores.
        Raises SpecError when the bundle needs something this runtime cannot reproduce, naming it.
        """
        self.spec = spec
        self.backends = backends
        self.step_size = spec.step_size if step_size is None else step_size
        _check_step_size(self.step_size)
        self.mirror_axes = spec.mirror_axes if mirroring else None
        self.use_gaussian = use_gaussian
        self.threads = threads
        _check_names(spec)
        check_normalization(spec.normalization_schemes, spec.intensity_properties)
        self._resample_data = parse_resample_spec(spec.resampling["data"], "the image")
        self._resample_logits = parse_resample_spec(spec.resampling["probabilities"], "the logits")
        self._resample_seg: ResampleSpec | None = None
        if spec.previous_labels:
            self._resample_seg = parse_label_resample_spec(spec.resampling["seg"], "the previous segmentation")
        self._label_rule = label_rule(spec)

    @classmethod
    def load(
        cls,
        bundle: Path,
        backend: str = "auto",
        *,
        threads: int | None = None,
        step_size: float | None = None,
        precision: Precision = "fp32",
        device: str | None = None,
        folds: Sequence[str | int] | None = None,
        mirroring: bool = True,
        use_gaussian: bool = True,
    ) -> Self:
        """Check a bundle folder and load its model, of an ensemble all `folds` or those named.

        Raises NotFoundError, CorruptError (see load_bundle_spec), BackendError and SpecError.
        """
        spec = load_bundle_spec(bundle)
        if folds is not None:
            spec = _with_folds(spec, [str(fold) for fold in folds])
        backends = create_ensemble(backend, bundle, spec, threads=threads, precision=precision, device=device)
        return cls(spec, backends, step_size=step_size, mirroring=mirroring, use_gaussian=use_gaussian, threads=threads)

    def with_settings(self, *, step_size: float, mirroring: bool, use_gaussian: bool) -> Self:
        """The same bundle, not loaded again, with settings that nobody else changes. Raises SpecError."""
        _check_step_size(step_size)
        other = copy.copy(self)
        other.step_size = step_size
        other.mirror_axes = self.spec.mirror_axes if mirroring else None
        other.use_gaussian = use_gaussian
        return other

    @property
    def backend(self) -> Engine:
        """What runs the network (of an ensemble, the first; the others are of its kind)."""
        return self.backends[0]

    def predict_array(
        self,
        image_CZYX: npt.NDArray[Any],
        properties: dict[str, Any],
        *,
        previous_ZYX: npt.NDArray[Any] | None = None,
        return_probabilities: bool = False,
        progress: Listener = ignore,
    ) -> Prediction:
        """Predict an image (C, z, y, x) as nnU-Net's reader returns it; 2d images have z = 1.

        `properties` needs only `spacing` (z, y, x) in mm. The input is left as it is.
        `previous_ZYX`: of a cascade stage, the previous stage's segmentation in the axes of the image.
        """
        times = StageTimes()
        with times.stage("preprocess"):
            case = self.preprocess_array(image_CZYX, properties, previous_ZYX)
        inferred = self.infer(case, times, progress, keep_logits=return_probabilities)
        with times.stage("postprocess"):
            segmentation, probabilities = self.postprocess(inferred, case, return_probabilities)
        return Prediction(segmentation, probabilities, case.properties, times)

    def preprocess(
        self,
        image_CZYX: npt.NDArray[np.float32],
        properties: dict[str, Any],
        previous_ZYX: npt.NDArray[Any] | None = None,
    ) -> Preprocessed:
        """What the network sees of an image (C, z, y, x) as read, which is overwritten. Raises ImageError."""
        return preprocess(
            image_CZYX, properties, self.spec, self._resample_data, previous_ZYX, self._resample_seg, self.threads
        )

    def preprocess_array(
        self, image_CZYX: npt.NDArray[Any], properties: dict[str, Any], previous_ZYX: npt.NDArray[Any] | None = None
    ) -> Preprocessed:
        """`preprocess` of an array of the caller's, which is checked and left as it is. Raises ImageError."""
        spacing = np.asarray(properties.get("spacing", ()), np.float64)
        if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
            raise ImageError(
                f"properties['spacing']: got {properties.get('spacing')}, expected three numbers above 0, mm (z, y, x)"
            )
        image = np.array(image_CZYX, dtype=np.float32)
        if image.size and not np.isfinite(native.limits(image, threads=self.threads)).all():
            raise ImageError("the image has NaN or infinite voxels, expected numbers")
        return self.preprocess(image, properties, previous_ZYX)

    @property
    def window(self) -> SlidingWindow:
        """The sliding window with the settings of this moment."""
        return SlidingWindow(
            num_heads=self.spec.num_heads,
            patch_size=self.spec.patch_size,
            step_size=self.step_size,
            mirror_axes=self.mirror_axes,
            use_gaussian=self.use_gaussian,
        )

    def infer(
        self, case: Preprocessed, times: StageTimes, progress: Listener = ignore, *, keep_logits: bool = False
    ) -> Inferred:
        """What `postprocess` needs of a preprocessed image: its logits; or its labels where there is one network, the
        logits are large, and they are not to be kept for probabilities. Raises BackendError.
        """
        plan = plan_logits(self._resample_logits, case)
        logits_bytes = np.dtype(np.float16).itemsize * self.spec.num_heads * prod(case.data_CZYX.shape[1:])
        is_local = plan is None or plan.is_local
        if keep_logits or len(self.backends) > 1 or not is_local or logits_bytes <= STREAM_BYTES:
            with times.stage("infer"):
                return self.logits(case.data_CZYX, progress)
        return Labelled(
            stream_labels(
                case,
                self.backend.run,
                self.window,
                plan,
                self._label_rule,
                times,
                progress=progress,
                threads=self.threads,
            )
        )

    def logits(
        self, data_CZYX: npt.NDArray[np.float32], progress: Listener = ignore, folds: slice = slice(None)
    ) -> native.HalfArray:
        """Logits (heads, Z, Y, X) of a preprocessed image. Raises BackendError."""
        return ensemble_logits(data_CZYX, self.backends[folds], self.window, progress=progress, threads=self.threads)

    def postprocess(
        self, inferred: native.Logits | Labelled, case: Preprocessed, return_probabilities: bool = False
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        """Segmentation and, if wanted, probabilities (which need logits) in the axes of the image as read."""
        if isinstance(inferred, Labelled):
            return inferred.segmentation_ZYX.transpose(self.spec.transpose_backward), None
        plan = plan_logits(self._resample_logits, case)
        return postprocess(inferred, case, self.spec, plan, self._label_rule, return_probabilities, self.threads)

    def check_previous(self, previous: Path | None) -> None:
        """Raise SpecError or NotFoundError unless a cascade stage, and only one, gets a folder that exists."""
        if (previous is None) != (not self.spec.previous_labels):
            raise SpecError(
                "this bundle is a cascade stage, it needs the segmentations of the previous stage\n"
                "predict them first and give their folder with -prev_stage_predictions"
                if self.spec.previous_labels
                else "-prev_stage_predictions: this bundle is no cascade stage; leave it out"
            )
        if previous is not None and not previous.is_dir():
            raise NotFoundError(f"-prev_stage_predictions: {previous} is no folder; give the previous stage's output")

    def describe(self) -> dict[str, Any]:
        """What predicts, for records."""
        return {
            "bundle": self.spec.name,
            "folds": list(self.spec.folds),
            "backend": self.backend.name,
            "precision": self.backend.precision,
            "step_size": self.step_size,
            "mirror_axes": list(self.mirror_axes or ()),
            "use_gaussian": self.use_gaussian,
        }


def _check_names(spec: BundleSpec) -> None:
    """Refuse what earlier exports let pass. Raises SpecError."""
    preprocessor = stated(spec.plans, spec.configuration, "preprocessor_name")
    if problems := preprocessing_problems(preprocessor, spec.plans.get("label_manager")):
        raise SpecError(
            f"the bundle {spec.name} is of a model that this runtime cannot reproduce\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\npredict with nnU-Net itself, nnUNetv2_predict"
        )


def _check_step_size(step_size: float) -> None:
    if not 0 < step_size <= 1:
        raise SpecError(f"step_size: got {step_size}, expected a number in (0, 1]")


def _with_folds(spec: BundleSpec, folds: list[str]) -> BundleSpec:
    """The part of a bundle that consists of these folds. Raises SpecError when it lacks one."""
    known = spec.folds or (str(spec.provenance.get("fold", "0")),)
    if missing := [fold for fold in folds if fold not in known]:
        raise SpecError(f"-f {' '.join(missing)}: the bundle {spec.name} has fold(s) {' '.join(known)}")
    file_of = dict(zip(known, spec.model_files, strict=True))
    return replace(spec, folds=tuple(folds), model_files=tuple(file_of[fold] for fold in folds))
