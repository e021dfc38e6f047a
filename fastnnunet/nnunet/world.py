"""A private nnU-Net world: its folders below one of ours, whatever the user's own variables say."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@contextmanager
def world_in(folder: Path) -> Iterator[None]:
    """Within, nnU-Net's folders are those below `folder`, here and in the processes that are started from here.

    nnU-Net 2.8 asks the environment whenever it needs a path, so nothing that it has imported must be changed. The
    environment belongs to the whole process: other threads see it too.
    """
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update({name: str(folder.absolute() / name) for name in VARIABLES})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
