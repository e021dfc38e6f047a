"""nnU-Net prints to standard output from everywhere; its log file keeps what matters."""

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def nnunet_quiet() -> Iterator[None]:
    """Within, nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
