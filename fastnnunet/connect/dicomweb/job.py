"""A study's series predicted, and the result stored in the archive it came from: at most once."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastnnunet.connect.dicomweb.archive import Archive, FoundSeries
from fastnnunet.connect.dicomweb.choose import choose_series
from fastnnunet.connect.dicomweb.identity import ObjectIdentity, give_identity, identity_of
from fastnnunet.connect.dicomweb.spec import DicomWebSpec, StoredKind
from fastnnunet.connect.http import WebServer, authorization_from
from fastnnunet.errors import FastnnUNetError, ServerError, SpecError
from fastnnunet.events import Listener, Message, ignore
from fastnnunet.images.io import WITHOUT_GEOMETRY
from fastnnunet.outputs.spec import OutputSpec, SegmentationType
from fastnnunet.specs.bundle import bundle_digest, load_bundle_spec
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.run.kept import KeptModelSpec

TOKEN, USER, PASSWORD = (f"FASTNNUNET_DICOMWEB_{name}" for name in ("TOKEN", "USER", "PASSWORD"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """An object that the archive has."""

    kind: StoredKind
    identity: ObjectIdentity
    is_new: bool  # stored by this call


def archive_of(spec: DicomWebSpec) -> Archive:
    """The archive, spoken to with the credentials of the environment. Raises SpecError."""
    authorization, how = authorization_from(TOKEN, USER, PASSWORD)
    return Archive(
        server=WebServer(
            url=spec.url,
            authorization=authorization,
            credentials=how,
            timeout_s=spec.timeout_s,
            tries=spec.tries,
            ca_file=spec.ca_file,
        )
    )


def predict_study(
    model: KeptModelSpec,
    spec: DicomWebSpec,
    *,
    label_codes: Path | None = None,
    segmentation_type: SegmentationType = "binary",
    archive: Archive | None = None,
    progress: Listener = ignore,
) -> tuple[StoredObject, ...]:
    """Predict the series that `spec` means with a bundle, and store what it asks for in the same study.

    `label_codes`, `segmentation_type`: as of `OutputSpec`.
    What was stored before by the same bundle with the same settings is found and left as it is; nothing is fetched
    where all of it is there. What is fetched lies in a temporary folder that only this user can read, and is removed.
    Raises SpecError and NotFoundError for a choice that is none, ServerError and CorruptError for the archive, what
    `load_bundle_spec` raises and the errors of a prediction, ModuleNotFoundError without the extra `dicom`: nothing is
    stored then.
    """
    bundle = load_bundle_spec(model.bundle)
    if bundle.previous_labels:
        raise SpecError(f"{model.bundle} is a cascade stage, which needs segmentations of another model")
    if bundle.reader_writer in WITHOUT_GEOMETRY:
        raise SpecError(f"{model.bundle} is a model of pictures ({bundle.reader_writer}), which takes no DICOM")
    import_module("highdicom")
    outputs = OutputSpec(formats=spec.store, label_codes=label_codes, segmentation_type=segmentation_type)
    archive = archive or archive_of(spec)
    if archive.server.is_open_to_others:
        progress(Message(text=f"{spec.url} is not encrypted: others on the network can read along", level="warning"))
    study = spec.study or archive.study_of(spec.accession or "")
    chosen = choose_series(archive.series_of(study), spec, len(bundle.channel_names))
    uids = [series.uid for series in chosen]
    digest, options = bundle_digest(model.bundle), {**model.changes(), **_changes(outputs)}
    wanted = {kind: identity_of(kind, uids, digest, options) for kind in spec.store}
    there = {kind for kind, uid in wanted.items() if archive.has(study, uid.series_uid, uid.instance_uid)}
    missing = {kind: identity for kind, identity in wanted.items() if kind not in there}
    if missing:
        with TemporaryDirectory(prefix="fastnnunet-dicomweb-") as folder:
            _make_and_store(archive, study, chosen, missing, Path(folder), model, spec, outputs, progress)
    return tuple(StoredObject(kind=kind, identity=uid, is_new=kind in missing) for kind, uid in wanted.items())


def _changes(outputs: OutputSpec) -> dict[str, Any]:
    """What of the outputs changes an object, where it is not the default."""
    found: dict[str, Any] = {}
    if outputs.segmentation_type != "binary":
        found["segmentation_type"] = outputs.segmentation_type
    if outputs.label_codes is not None:
        found["label_codes"] = sha256_of_file(outputs.label_codes)
    return found


def _make_and_store(
    archive: Archive,
    study: str,
    chosen: tuple[FoundSeries, ...],
    missing: dict[StoredKind, ObjectIdentity],
    folder: Path,
    model: KeptModelSpec,
    spec: DicomWebSpec,
    outputs: OutputSpec,
    progress: Listener,
) -> None:
    from fastnnunet.api.resident.kept import KeptModel
    from fastnnunet.images.cases import Case
    from fastnnunet.images.dicom.series import DicomSeries

    left = spec.largest_bytes
    channels = []
    for number, series in enumerate(chosen):
        place = folder / f"image_{number:04d}"
        count = archive.fetch(study, series, place, most_bytes=left, most_files=spec.slices, progress=progress)
        size = sum(file.stat().st_size for file in place.iterdir())
        left -= size
        progress(Message(text=f"fetched {count} slices of {series.modality or 'an unknown modality'}"))
        channels.append(DicomSeries(folder=place, uid=series.uid))
    kept = KeptModel(
        model,
        replace(
            outputs,
            formats=tuple(missing),
            segmentation_type=outputs.segmentation_type if "dicom-seg" in missing else "binary",
        ),
    )
    output = folder / f"segmentation{kept.ending}"
    made: dict[str, Path] = {**dict.fromkeys(map(str, missing), output), **kept.files(output)}
    case = Case("image", (), series=tuple(channels))
    try:
        kept.predict(case, output, progress=progress)
    except FastnnUNetError as e:  # files of ours, which will be gone
        raise type(e)(str(e).replace(f"{folder}/", "")) from e
    files = []
    for kind, identity in missing.items():
        give_identity(made[kind], identity)
        files.append((identity.instance_uid, made[kind]))
    if not archive.store(study, files):
        for kind, identity in missing.items():
            if not archive.has(study, identity.series_uid, identity.instance_uid):
                raise ServerError(f"{spec.url} took the {kind} and does not have it now; look there, and at its log")
