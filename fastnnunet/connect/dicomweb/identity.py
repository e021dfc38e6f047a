"""UIDs that are the same whenever the same is made of the same: what is in the archive already is found by them."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnnunet.connect.dicomweb.spec import StoredKind
from fastnnunet.specs.canonical import canonical_json

_NAMESPACE = uuid.UUID("6f0ae6f5-3c55-4f9e-9b0a-6f1f6c1b2a57")  # of these UIDs, made once
_FORMAT = 1  # raise it where other objects are made of the same


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectIdentity:
    """The UIDs of an object and of the series that holds it alone."""

    series_uid: str
    instance_uid: str


def identity_of(
    kind: StoredKind, series_uids: Sequence[str], bundle_digest: str, options: Mapping[str, Any]
) -> ObjectIdentity:
    """The identity of what a bundle with these options makes of these series."""
    known = {
        "format": _FORMAT,
        "kind": kind,
        "series": list(series_uids),
        "bundle": bundle_digest,
        "options": dict(options),
    }
    return ObjectIdentity(series_uid=_uid({**known, "is": "series"}), instance_uid=_uid({**known, "is": "instance"}))


def _uid(known: Mapping[str, Any]) -> str:
    """A UID of a UUID (PS3.5 B.2) that is named by its content."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, canonical_json(known)).int}"


def give_identity(file: Path, identity: ObjectIdentity) -> None:
    """Let a DICOM file have these UIDs instead of its own. Nothing may refer to it yet."""
    import pydicom

    data = pydicom.dcmread(file)
    data.SeriesInstanceUID = identity.series_uid
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = identity.instance_uid
    data.save_as(file, enforce_file_format=True)
