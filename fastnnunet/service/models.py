"""The models that are served: what clients may know of them. Ids are the names of the bundles' folders."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnnunet.errors import SpecError
from fastnnunet.service.answers import of_kinds
from fastnnunet.service.refusals import RefusedError
from fastnnunet.service.uploads.kinds import ENDINGS, kinds_of
from fastnnunet.specs.bundle import MEASURED, PRECISIONS, BundleSpec, load_bundle_spec
from fastnnunet.specs.checks.problems import is_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One structure: its value in label maps, for a region all values that belong to it, and a colour `#rrggbb`.

    `volume_unit`: of volumes in `statistics`; None for pictures, which have no thickness.
    """

    name: str
    value: int
    values: tuple[int, ...]
    colour: str
    volume_unit: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One input image. `unit`: of its intensities, where they have one: HU for CT."""

    number: int
    name: str
    unit: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A model as `GET /models` tells it."""

    id: str
    name: str
    configuration: str
    dimensions: int
    channels: tuple[Channel, ...]
    accepts: tuple[str, ...]  # file endings
    labels: tuple[Label, ...]
    spacing_mm: tuple[float, ...]  # of the model's grid
    answers: tuple[str, ...]
    measured: dict[str, Any]  # what the bundle knows of its quality and speed
    loaded: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """All models of a service."""

    models: Mapping[str, ModelCard]
    bundles: Mapping[str, Path]
    specs: Mapping[str, BundleSpec]

    def require(self, name: str) -> str:
        """The id, where there is such a model. Raises RefusedError."""
        if name not in self.models:
            raise RefusedError(404, f"no such model; there are {', '.join(self.models)}")
        return name

    def kinds(self, name: str) -> tuple[str, ...]:
        """Kinds of files that a model takes."""
        return kinds_of(self.specs[name].reader_writer)


def load_models(bundles: Sequence[Path], answers: Sequence[str]) -> Served:
    """Check bundles. Raises what `load_bundle_spec` raises, SpecError for two of one name and for cascade stages."""
    models: dict[str, ModelCard] = {}
    places: dict[str, Path] = {}
    specs: dict[str, BundleSpec] = {}
    for bundle in bundles:
        place = bundle.resolve()
        spec = load_bundle_spec(place)
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", place.name)[:100]
        if name in models:
            raise SpecError(f"two bundles are called {name}: {places[name]} and {place}\nrename one of the folders")
        if spec.previous_labels:
            raise SpecError(f"{place} is a cascade stage, which needs segmentations of another model; leave it out")
        models[name], places[name], specs[name] = _model(name, spec, answers), place, spec
    return Served(models, places, specs)


def _model(name: str, spec: BundleSpec, answers: Sequence[str]) -> ModelCard:
    from fastnnunet.api import structures_of

    kinds = kinds_of(spec.reader_writer)
    accepts = tuple(ENDINGS[kind] for kind in kinds)
    return ModelCard(
        id=name,
        name=spec.name,
        configuration=spec.configuration,
        dimensions=len(spec.patch_size),
        channels=tuple(
            Channel(number=number, name=channel, unit="HU" if channel.casefold() == "ct" else None)  # as nnU-Net tells
            for number, channel in enumerate(spec.channel_names)
        ),
        accepts=accepts,
        labels=tuple(
            Label(
                name=one.name,
                value=_value(spec, one.number, one.values),
                values=one.values,
                colour=one.colour,
                volume_unit="ml" if ".nii" in accepts else None,
            )
            for one in structures_of(spec.labels)
        ),
        spacing_mm=spec.spacing_mm,
        answers=of_kinds(answers, kinds),
        measured=_measured(spec),
    )


def _value(spec: BundleSpec, number: int, values: tuple[int, ...]) -> int:
    """In label maps; regions are written as `regions_class_order` says. `number`: from 1."""
    return values[0] if spec.regions_class_order is None else spec.regions_class_order[number - 1]


def _measured(spec: BundleSpec) -> dict[str, Any]:
    """What the bundle's provenance knows in numbers.

    parameters, label_agreement_with_pytorch; `quality` and `speed` as `release/measured.py` writes them; `precisions`.
    """
    known = spec.provenance
    found: dict[str, Any] = {}
    if is_number(known.get("parameters")):
        found["parameters"] = known["parameters"]
    parity = known.get("parity")
    if isinstance(parity, dict) and is_number(parity.get("label_agreement")):
        found["label_agreement_with_pytorch"] = parity["label_agreement"]
    measured = known.get(MEASURED)
    for name, figure in (("quality", "dice"), ("speed", "seconds_per_case")):
        told = measured.get(name) if isinstance(measured, dict) else None
        if isinstance(told, dict) and is_number(told.get(figure)) and is_number(told.get("cases")):
            found[name] = told
    if isinstance(known.get(PRECISIONS), dict):
        found[PRECISIONS] = known[PRECISIONS]
    return found
