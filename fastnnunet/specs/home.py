"""The folder of this machine for what can be made or fetched again: shards of remote caches, engines."""

import os
from pathlib import Path

HOME_VARIABLE = "FASTNNUNET_CACHE_HOME"


def local_home() -> Path:
    """`$FASTNNUNET_CACHE_HOME`, else `fastnnunet` in the user's cache folder."""
    if folder := os.environ.get(HOME_VARIABLE):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastnnunet"
