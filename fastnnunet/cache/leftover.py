"""What `cache gc` removed, or would."""

from dataclasses import dataclass

from fastnnunet.cache.store.storage import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """One thing that was removed, or would be."""

    path: Place
    reason: str
    size_bytes: int
