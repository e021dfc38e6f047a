"""The manifest of one case: the proof that it was written whole. A case exists if and only if its manifest is valid."""

from dataclasses import dataclass

from fastnnunet.cache.store.storage import Place
from fastnnunet.errors import CorruptError
from fastnnunet.specs.canonical import canonical_json, sha256_of, to_plain
from fastnnunet.specs.checks.json_text import parse_json
from fastnnunet.specs.load import build_spec

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was stored for a case. Everything but `seconds` is the same in every build of the same cache."""

    case_id: str
    key: str  # of the cache
    image_sha256: str  # preprocessed image the teacher saw
    shape: tuple[int, ...]  # (stored channels, Z, Y, X)
    eps: float
    max_error: float  # measured, <= eps
    stored_bytes: int
    absent_chunks: int  # all-zero chunks that are not in the shard
    shard_sha256: str
    index_crc32c: str
    array_sha256: str  # of zarr.json
    seconds: float  # teacher, encoding and writing

    @property
    def voxels(self) -> int:
        _, z, y, x = self.shape
        return z * y * x

    @property
    def content_sha256(self) -> str:
        """Digest of everything a rebuild must reproduce."""
        plain = to_plain(self)
        del plain["seconds"]
        return sha256_of(plain)


def manifest_text(manifest: Manifest) -> str:
    """The file's text: canonical JSON with the digest of everything else in `self_sha256`."""
    plain = to_plain(manifest)
    return canonical_json({**plain, "self_sha256": sha256_of(plain)})


def read_manifest(case_dir: Place) -> Manifest | None:
    """The manifest of a case, None when there is none. Raises CorruptError when it was damaged or changed."""
    path = case_dir / MANIFEST_NAME
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise CorruptError(f"{path} cannot be read ({e})") from e
    try:
        raw = parse_json(text, path)
        declared = raw.pop("self_sha256")
        manifest = build_spec(Manifest, raw, where=str(path))
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise CorruptError(f"{path} is damaged ({e})") from e
    if sha256_of(manifest) != declared or manifest_text(manifest) != text:
        raise CorruptError(f"{path} was changed (its digest does not match)")
    return manifest
