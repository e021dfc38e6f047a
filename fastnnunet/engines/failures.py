"""What a batch that failed is told as."""

from fastnnunet import native
from fastnnunet.errors import BackendError, NoMemoryError


def batch_failed(engine: str, shape_NCX: tuple[int, ...], error: object) -> BackendError:
    """To raise: NoMemoryError where the maker's message says that there was too little memory."""
    said = f"{engine} failed on a batch of shape {shape_NCX}: {error}"
    return NoMemoryError(said) if native.tells_no_memory(str(error)) else BackendError(said)
