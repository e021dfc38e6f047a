"""What a benchmark compares, each from image file to label file: nnU-Net's own predictor on folds of a model and on the
network of a bundle, and bundles on backends.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet.bench.worker import CaseRun, Runner
from fastnnunet.engines.base import Precision
from fastnnunet.engines.model_files import INT8_ENDINGS
from fastnnunet.engines.registry import EngineOptions, create_ensemble
from fastnnunet.errors import CorruptError
from fastnnunet.images.cases import Case
from fastnnunet.specs.bundle import BundleSpec, int8_file, load_bundle_spec

if TYPE_CHECKING:
    from fastnnunet.nnunet.reference import ReferencePredictor


def _cases_of(reference: "ReferencePredictor") -> Runner:
    """nnU-Net's predictor on one case after the other."""

    def run(case: Case, output: Path) -> CaseRun:
        told = reference.predict_case(case.files, output)
        return CaseRun(told.stages_s, told.forward_passes)

    return run


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceArm:
    """Folds of an nnU-Net model run by nnU-Net."""

    name: str
    model_folder: Path
    folds: tuple[int | str, ...]
    mirroring: bool
    threads: int
    checkpoint: str = "checkpoint_final.pth"
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def load(self) -> Runner:
        """Load all folds. Raises NotFoundError, CorruptError, SpecError."""
        from fastnnunet.nnunet.reference import load_reference

        reference = load_reference(
            self.model_folder,
            self.folds,
            mirroring=self.mirroring,
            threads=self.threads,
            checkpoint=self.checkpoint,
            device=self.device,
        )

        return _cases_of(reference)

    def describe(self) -> dict[str, Any]:
        """For the record; `parameters` of one network, `size_bytes` of the float32 weights of all folds.

        `mirrors`: forward passes of a fold for one tile.
        """
        from fastnnunet.nnunet.files.checkpoint import load_checkpoint
        from fastnnunet.nnunet.files.model import build_network, model_of
        from fastnnunet.nnunet.files.plans import read_json

        plans, dataset_json = (read_json(self.model_folder / f"{n}.json") for n in ("plans", "dataset"))
        first = load_checkpoint(self.model_folder / f"fold_{self.folds[0]}" / self.checkpoint)
        network = build_network(model_of(plans, first["init_args"]["configuration"], dataset_json))
        parameters = int(sum(p.numel() for p in network.parameters()))
        return {
            "kind": "nnunetv2",
            "model": self.model_folder.name,
            "folds": [str(f) for f in self.folds],
            "mirroring": self.mirroring,
            "mirrors": 2 ** len(first.get("inference_allowed_mirroring_axes") or ()) if self.mirroring else 1,
            "device": self.device,
            "precision": "fp32",
            "parameters": parameters,
            "size_bytes": 4 * parameters * len(self.folds),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StockArm:
    """The network of a bundle run by nnU-Net: what the bundle's own arms have to agree with."""

    name: str
    bundle: Path
    threads: int
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def load(self) -> Runner:
        """Rebuild the network of every fold. Raises NotFoundError, CorruptError, MismatchError, SpecError."""
        from fastnnunet.engines.torch import load_network, load_onnx_weights
        from fastnnunet.nnunet.reference import reference_of_network

        spec = load_bundle_spec(self.bundle)
        network, weights = load_network(spec, self.bundle / spec.model_file), []
        for file in spec.model_files:
            load_onnx_weights(network, self.bundle / file)
            weights.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        reference = reference_of_network(
            network,
            weights,
            spec.plans,
            spec.configuration,
            spec.dataset_json,
            mirror_axes=spec.mirror_axes,
            threads=self.threads,
            step_size=spec.step_size,
            device=self.device,
        )

        return _cases_of(reference)

    def describe(self) -> dict[str, Any]:
        """For the record."""
        spec = load_bundle_spec(self.bundle)
        return {
            "kind": "nnunetv2",
            "bundle": self.bundle.name,
            "folds": list(spec.folds),
            "mirroring": bool(spec.mirror_axes),
            "mirrors": 2 ** len(spec.mirror_axes or ()),
            "device": self.device,
            "precision": "fp32",
            "parameters": spec.provenance.get("parameters"),
            "size_bytes": sum((self.bundle / name).stat().st_size for name in spec.model_files),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleArm:
    """A bundle on one backend and device."""

    name: str
    bundle: Path
    backend: str
    precision: Precision
    threads: int
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def _options(self) -> EngineOptions:
        return {"threads": self.threads, "precision": self.precision, "device": self.device}

    def load(self) -> Runner:
        """Check and load the bundle. Raises NotFoundError, CorruptError, BackendError."""
        from fastnnunet.runtime.predict import Predictor

        predictor = Predictor.load(self.bundle, self.backend, **self._options)

        def run(case: Case, output: Path) -> CaseRun:
            times = asdict(predictor.predict_case(case, output).times)
            return CaseRun({name: float(value) for name, value in times.items()})

        return run

    def describe(self) -> dict[str, Any]:
        """For the record, with the parity of this backend on the bundle's own patches; `size_bytes` of all folds."""
        spec = load_bundle_spec(self.bundle)
        return {
            "kind": "bundle",
            "bundle": self.bundle.name,
            "backend": self.backend,
            "device": self.device,
            "precision": self.precision,
            "parameters": spec.provenance.get("parameters"),
            "size_bytes": self._model_bytes(spec),
            "parity": self.parity(),
        }

    def _model_bytes(self, spec: BundleSpec) -> int:
        """Of the files that are loaded; OpenVINO's own models keep their weights in a second file."""
        names = [Path(name) for name in spec.model_files]
        if self.precision == "int8":
            names = [Path(int8_file(name.name, INT8_ENDINGS.get(self.backend, ".onnx"))) for name in names]
        files = {self.bundle / name.with_suffix(suffix) for name in names for suffix in (name.suffix, ".bin")}
        return sum(file.stat().st_size for file in files if file.is_file())

    def parity(self) -> dict[str, float]:
        """This backend against the logits that PyTorch computed at export, on the patches of `parity.npz`."""
        spec = load_bundle_spec(self.bundle)
        try:
            with np.load(self.bundle / "parity.npz") as stored:
                image_NCX, expected_NHX = stored["image"], stored["logits"]
        except (OSError, ValueError, KeyError) as e:
            raise CorruptError(f"{self.bundle / 'parity.npz'} cannot be read ({e}); export the bundle again") from e
        backends = create_ensemble(self.backend, self.bundle, spec, **self._options)
        got_NHX = np.zeros_like(expected_NHX)
        for backend in backends:
            got_NHX += np.concatenate([np.array(backend.run(np.ascontiguousarray(i[None]))) for i in image_NCX])
        got_NHX /= len(backends)
        if spec.regions_class_order is not None:
            same = (got_NHX > 0) == (expected_NHX > 0)
        else:
            same = got_NHX.argmax(1) == expected_NHX.argmax(1)
        return {
            "max_abs_logit_difference": float(np.abs(got_NHX - expected_NHX).max()),
            "max_abs_logit": float(np.abs(expected_NHX).max()),
            "label_agreement": float(same.mean()),
        }
