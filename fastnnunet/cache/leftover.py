"""What `cache gc` removed, or would."""

from dataclasses import dataclass

from fastnnunet.cache.store.storage import Place
from fastnnunet.events import Progress


def looked_at(case_id: str) -> Progress:
    """The event of one case among cases that nobody counted."""
    return Progress(what="looking at", done=0, total=None, unit="cases", note=case_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """One thing that was removed, or would be."""

    path: Place
    reason: str
    size_bytes: int
