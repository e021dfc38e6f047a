"""ITK's messages: its errors made short, its warnings kept off the screen where our own checks say the same."""

from collections.abc import Iterator
from contextlib import contextmanager


def last_line(error: Exception) -> str:
    """The line that says what is wrong; SimpleITK's messages begin with source positions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ") if lines else type(error).__name__


@contextmanager
def no_warnings() -> Iterator[None]:
    """ITK prints no warnings inside the block."""
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
