"""A bundle in memory and its stages on arrays, each as nnU-Net 2.8 would."""

import copy
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from fastnnunet import native
from fastnnunet.engines.base import Engine, Precision, RunsOnDevice
from fastnnunet.engines.registry import choose_engine, create_engine, create_ensemble
from fastnnunet.errors import BackendError, ImageError, NotFoundError, SpecError
from fastnnunet.events import Listener, ignore
from fastnnunet.geometry.resample import ResamplePlan, ResampleSpec, parse_label_resample_spec, parse_resample_spec
from fastnnunet.runtime.ensemble import ensemble_logits
from fastnnunet.runtime.label_stream import stream_labels
from fastnnunet.runtime.locate import CERTAIN, Box, InBox, in_box, seen_box, with_margin
from fastnnunet.runtime.logits import label_rule, plan_logits, postprocess
from fastnnunet.runtime.normalize import check_normalization
from fastnnunet.runtime.one_pass import OnePassTiles
from fastnnunet.runtime.pipeline import OneThread
from fastnnunet.runtime.preprocess import Preprocessed, preprocess
from fastnnunet.runtime.sliding_window import SlidingWindow
from fastnnunet.runtime.times import StageTimes
from fastnnunet.runtime.ways import Way, in_memory
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec
from fastnnunet.specs.checks.reproducible import preprocessing_problems, stated
from fastnnunet.specs.one_pass import parse_memory

if TYPE_CHECKING:
    from fastnnunet.runtime.device.stages import DeviceLabels, DeviceStages, OnDevice

_log = logging.getLogger(__name__)
STAGES_VARIABLE = "FASTNNUNET_STAGES"  # `cpu`: what comes before and after the network stays there
# Logits of more bytes are not kept but labelled while the window goes on. Smaller ones are kept until it has passed, so
# that another thread can label them while the network is at the next case.
STREAM_BYTES = 2**29
_IN_ANY_THREAD = ("auto", "openvino", "onnxruntime")  # engines that may be made in one thread and used in another


@dataclass(frozen=True, slots=True)
class Labelled:
    """A segmentation in the model's axes, of the image's shape before it was cropped."""

    segmentation_ZYX: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Engines:
    """What runs the networks of a bundle and of its locator, and when it was there."""

    engines: tuple[Engine, ...]
    locator: "LoadedBundle | None" = None
    at: float = field(default_factory=time.perf_counter)


Inferred: TypeAlias = "native.HalfArray | Labelled | DeviceLabels"


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
    Predictions read their settings once; threads that want different ones take a bundle each from `with_settings`.
    In a forked process a loaded bundle goes on working on CPUs, unless another thread was predicting at that moment: it
    is refused then (BackendError), as it always is on a GPU.
    """

    def __init__(
        self,
        spec: BundleSpec,
        backends: "Sequence[Engine] | Engines | Future[Engines]",
        *,
        step_size: float | None = None,
        mirroring: bool = True,
        use_gaussian: bool = True,
        passes: int | None = None,
        memory_limit: int | str | None = None,
        locate: bool = True,
        threads: int | None = None,
    ) -> None:
        """`backends`: one for each model file of the bundle, which may be under way.

        `step_size`: largest step between tiles as a fraction of the patch, for nnU-Net's window; None: one pass where
        the bundle says how, else its window. `mirroring`: along the axes the model was trained with. `use_gaussian`:
        tiles of the window weigh less towards their rim.
        `passes` (default 1) and `memory_limit` (bytes, or a text such as 4G; default: see `specs/one_pass.py`) are of
        one pass, see `OnePassTiles`.
        `locate`: predict within the box that the bundle's locator finds, where it has one that was loaded with it;
        everywhere where it sees nothing.
        `threads`: of what is done before and after the network; None: all cores.
        Raises SpecError when the bundle needs something this runtime cannot reproduce, naming it, and for settings that
        cannot be.
        """
        self.spec = spec
        self._engines = backends if isinstance(backends, Future | Engines) else Engines(tuple(backends))
        self.locate = locate
        self.mirror_axes = spec.mirror_axes if mirroring else None
        self._device: list[DeviceStages | None] = []  # what is done on the GPU, once it is known
        self.way = self._choose_way(step_size, use_gaussian, passes, memory_limit)
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
        passes: int | None = None,
        memory_limit: int | str | None = None,
        locate: bool = True,
        wait: bool = True,
    ) -> Self:
        """Check a bundle folder and load its model, of an ensemble all `folds` or those named.

        `wait` False: the model is loaded in another thread where its engine allows that, and waited for when it is used
        first, which then raises what loading it raised.
        Raises NotFoundError, CorruptError (see load_bundle_spec), BackendError and SpecError.
        """
        spec = load_bundle_spec(bundle)
        if folds is not None:
            spec = _with_folds(spec, [str(fold) for fold in folds])

        def make() -> Engines:
            engines = create_ensemble(backend, bundle, spec, threads=threads, precision=precision, device=device)
            return Engines(tuple(engines), _load_locator(bundle, spec, backend, device, threads))

        backends: Engines | Future[Engines]
        if wait or backend not in _IN_ANY_THREAD or device not in (None, "cpu"):
            backends = make()
        else:
            loader = OneThread("load")
            backends = loader.submit(make)
            loader.close()
        return cls(
            spec,
            backends,
            step_size=step_size,
            mirroring=mirroring,
            use_gaussian=use_gaussian,
            passes=passes,
            memory_limit=memory_limit,
            locate=locate,
            threads=threads,
        )

    def with_settings(
        self,
        *,
        step_size: float | None,
        mirroring: bool,
        use_gaussian: bool,
        passes: int | None = None,
        memory_limit: int | str | None = None,
        locate: bool = True,
    ) -> Self:
        """The same bundle, not loaded again, with other settings. Raises SpecError."""
        other = copy.copy(self)
        if locate != self.locate:
            other._device = []  # a locator cuts on the CPU
        other.locate = locate
        other.mirror_axes = self.spec.mirror_axes if mirroring else None
        other.way = other._choose_way(step_size, use_gaussian, passes, memory_limit)
        return other

    def _choose_way(
        self, step_size: float | None, use_gaussian: bool, passes: int | None, memory_limit: int | str | None
    ) -> SlidingWindow | OnePassTiles:
        """Raises SpecError."""
        spec = self.spec
        if spec.one_pass is not None and step_size is None:
            tiles = OnePassTiles(
                num_heads=spec.num_heads,
                patch_size=spec.patch_size,
                rules=spec.one_pass,
                mirror_axes=self.mirror_axes,
                passes=1 if passes is None else passes,
                memory_limit=None if memory_limit is None else parse_memory(memory_limit),
                overhead=self.backend.overhead,
                largest_tile=self.backend.largest_tile,
            )
            tiles.check()
            return tiles
        if passes is not None or memory_limit is not None:
            given = "passes" if passes is not None else "memory limit"
            raise SpecError(
                f"{given}: nnU-Net's window has none, "
                + ("and a step size asks for it" if spec.one_pass else f"and the bundle {spec.name} has no other way")
                + f"\nleave out the {'step size' if spec.one_pass else given}"
            )
        if step_size is not None and not 0 < step_size <= 1:
            raise SpecError(f"step_size: got {step_size}, expected a number in (0, 1]")
        return SlidingWindow(
            num_heads=spec.num_heads,
            patch_size=spec.patch_size,
            step_size=spec.step_size if step_size is None else step_size,
            mirror_axes=self.mirror_axes,
            use_gaussian=use_gaussian,
        )

    @property
    def backends(self) -> Sequence[Engine]:
        """One for each model file. Waits for them; raises what making them raised."""
        return self._waited().engines

    @property
    def loaded_at(self) -> float:
        """When the model was there, as `time.perf_counter` counts."""
        return self._waited().at

    def _waited(self) -> "Engines":
        return self._engines.result() if isinstance(self._engines, Future) else self._engines

    @property
    def is_loading(self) -> bool:
        """Whether the model is still on its way."""
        return isinstance(self._engines, Future) and not self._engines.done()

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
            case = self.prepare(self._checked(image_CZYX, properties), properties, previous_ZYX)
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

    def prepare(
        self,
        image_CZYX: npt.NDArray[np.float32],
        properties: dict[str, Any],
        previous_ZYX: npt.NDArray[Any] | None = None,
    ) -> Preprocessed:
        """`preprocess` for `infer`: on the GPU of the engines, if they have one. Raises ImageError and BackendError."""
        stages = self._device_stages()
        if stages is not None and stages.can_preprocess:
            return stages.preprocess(image_CZYX, properties, self._resample_data)
        case = self.preprocess(image_CZYX, properties, previous_ZYX)
        return case if stages is None else replace(case, data_CZYX=cast(Any, stages.upload(case.data_CZYX)))

    def _device_stages(self) -> "DeviceStages | None":
        if isinstance(self._engines, Future):  # of a CPU
            return None
        if not self._device:
            self._device.append(None if os.environ.get(STAGES_VARIABLE) == "cpu" else self._new_device_stages())
        return self._device[0]

    def _new_device_stages(self) -> "DeviceStages | None":
        """None where an engine computes on the CPU, or the kernels cannot be had for its GPU, which is told.

        Also where a locator chooses what to predict, which cuts on the CPU.
        """
        if self.locate and self.spec.locator is not None:
            return None
        networks = []
        try:
            for engine in self.backends:
                network = engine.on_device() if isinstance(engine, RunsOnDevice) else None
                if network is None:
                    return None
                networks.append(network)
            from fastnnunet.runtime.device.stages import DeviceStages

            return DeviceStages(self.spec, networks)
        except BackendError as e:
            _log.warning("what comes before and after the network stays on the CPU: %s", e)
            return None

    def preprocess_array(
        self, image_CZYX: npt.NDArray[Any], properties: dict[str, Any], previous_ZYX: npt.NDArray[Any] | None = None
    ) -> Preprocessed:
        """`preprocess` of an array of the caller's, which is checked and left as it is. Raises ImageError."""
        return self.preprocess(self._checked(image_CZYX, properties), properties, previous_ZYX)

    def _checked(self, image_CZYX: npt.NDArray[Any], properties: dict[str, Any]) -> npt.NDArray[np.float32]:
        """A copy. Raises ImageError."""
        spacing = np.asarray(properties.get("spacing", ()), np.float64)
        if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
            raise ImageError(
                f"properties['spacing']: got {properties.get('spacing')}, expected three numbers above 0, mm (z, y, x)"
            )
        image = np.array(image_CZYX, dtype=np.float32)
        if image.size and not np.isfinite(native.limits(image, threads=self.threads)).all():
            raise ImageError("the image has NaN or infinite voxels, expected numbers")
        return image

    def infer(
        self, case: Preprocessed, times: StageTimes, progress: Listener = ignore, *, keep_logits: bool = False
    ) -> Inferred:
        """What `postprocess` needs of a preprocessed image: its logits; or its labels where there is one network, the
        logits are large, and they are not to be kept for probabilities.

        Raises BackendError, and SpecError before anything is computed where memory does not suffice.
        """
        plan = plan_logits(self._resample_logits, case)
        if not isinstance(case.data_CZYX, np.ndarray):
            return self._infer_on_device(case, plan, times, progress, keep_logits)
        logits_bytes = np.dtype(np.float16).itemsize * self.spec.num_heads * prod(case.data_CZYX.shape[1:])
        is_local = plan is None or plan.is_local
        if keep_logits or len(self.backends) > 1 or not is_local or logits_bytes <= STREAM_BYTES:
            with times.stage("infer"):
                return self.logits(case.data_CZYX, progress)
        with times.stage("infer"):
            way = self._way_of(case.data_CZYX)

        def stream(way: Way) -> npt.NDArray[Any]:
            network, rule, threads = self.backend.run, self._label_rule, self.threads
            return stream_labels(case, network, way, plan, rule, times, progress=progress, threads=threads)

        return Labelled(in_memory(way, case.data_CZYX.shape[1:], stream))

    def _infer_on_device(
        self, case: Preprocessed, plan: ResamplePlan | None, times: StageTimes, progress: Listener, keep_logits: bool
    ) -> Inferred:
        stages, data = self._device_stages(), cast("OnDevice", case.data_CZYX)
        assert stages is not None
        axes, rule = self.mirror_axes or (), self._label_rule

        def attempt(way: SlidingWindow | OnePassTiles) -> Inferred:
            if keep_logits:
                with times.stage("infer"):
                    return stages.fetched_logits(data, way, self.spec.num_heads, axes, progress)
            return stages.infer(case, data, way, plan, rule, axes, times, progress, stream_bytes=STREAM_BYTES)

        return in_memory(self.way, data.shape[1:], attempt)

    def logits(
        self, data_CZYX: npt.NDArray[np.float32], progress: Listener = ignore, folds: slice = slice(None)
    ) -> native.HalfArray:
        """Logits (heads, Z, Y, X) of a preprocessed image, background outside the box. Raises as `infer`."""

        def attempt(way: Way) -> native.HalfArray:
            return ensemble_logits(data_CZYX, self.backends[folds], way, progress=progress, threads=self.threads)

        return in_memory(self._way_of(data_CZYX), data_CZYX.shape[1:], attempt)

    def box_of(self, data_CZYX: npt.NDArray[np.float32]) -> Box | None:
        """What the locator sees of a preprocessed image, without margin; None where it sees nothing. Only where the
        bundle was loaded with its locator.
        """
        locator, rules = self._waited().locator, self.spec.locator
        assert locator is not None
        assert rules is not None
        return seen_box(data_CZYX, rules, locator.logits, self.threads)

    def part_of(self, data_CZYX: npt.NDArray[np.float32]) -> InBox | None:
        """The part of a preprocessed image that is predicted, the rest being background; None: everywhere."""
        rules, shape = self.spec.locator, data_CZYX.shape[1:]
        if not self.locate or rules is None or self._waited().locator is None:
            return None
        box = self.box_of(data_CZYX)
        if box is None:
            return None
        background = [-CERTAIN] * self.spec.num_heads
        if self._label_rule.regions_class_order is None:
            background[0] = 0.0
        box = with_margin(box, rules.margin_mm, self.spec.spacing_mm, shape)
        part = in_box(self.way, box, shape, tuple(background))
        return part if prod(part.size) < prod(shape) else None

    def _way_of(self, data_CZYX: npt.NDArray[np.float32]) -> Way:
        return self.part_of(data_CZYX) or self.way

    def postprocess(
        self,
        inferred: "native.Logits | Labelled | DeviceLabels",
        case: Preprocessed,
        return_probabilities: bool = False,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        """Segmentation and, if wanted, probabilities (which need logits) in the axes of the image as read."""
        if isinstance(inferred, Labelled):
            return inferred.segmentation_ZYX.transpose(self.spec.transpose_backward), None
        if not isinstance(inferred, np.ndarray):
            return inferred.fetch(), None
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
        """What predicts, and which way, for records."""
        return {
            "bundle": self.spec.name,
            "folds": list(self.spec.folds),
            "backend": self.backend.name,
            "precision": self.backend.precision,
            "mirror_axes": list(self.mirror_axes or ()),
            **self.way.describe(),
            **({} if self.spec.locator is None else {"locate": self.locate}),
        }


def _load_locator(
    bundle: Path, spec: BundleSpec, backend: str, device: str | None, threads: int | None
) -> LoadedBundle | None:
    """In float32, as its margin was measured, on the backend of the bundle; on the CPU where that needs built engines.

    Raises BackendError.
    """
    if spec.locator is None:
        return None
    if choose_engine(backend, device)[0] == "tensorrt":
        backend, device = "auto", None
    of_locator = spec.of_locator()
    return LoadedBundle(
        of_locator, [create_engine(backend, bundle, of_locator, threads=threads, device=device)], threads=threads
    )


def _check_names(spec: BundleSpec) -> None:
    """Refuse what earlier exports let pass. Raises SpecError."""
    preprocessor = stated(spec.plans, spec.configuration, "preprocessor_name")
    if problems := preprocessing_problems(preprocessor, spec.plans.get("label_manager")):
        raise SpecError(
            f"the bundle {spec.name} is of a model that this runtime cannot reproduce\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\npredict with nnU-Net itself, nnUNetv2_predict"
        )


def _with_folds(spec: BundleSpec, folds: list[str]) -> BundleSpec:
    """The part of a bundle that consists of these folds. Raises SpecError when it lacks one."""
    known = spec.folds or (str(spec.provenance.get("fold", "0")),)
    if missing := [fold for fold in folds if fold not in known]:
        raise SpecError(f"-f {' '.join(missing)}: the bundle {spec.name} has fold(s) {' '.join(known)}")
    file_of = dict(zip(known, spec.model_files, strict=True))
    return replace(spec, folds=tuple(folds), model_files=tuple(file_of[fold] for fold in folds))
