"""Where the time of a case goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STAGES = ("read", "preprocess", "infer", "postprocess", "write")


@dataclass(slots=True)
class StageTimes:
    """Seconds per stage of one case; cases of a folder overlap, so their totals exceed the time on the clock."""

    read_s: float = 0.0
    preprocess_s: float = 0.0
    infer_s: float = 0.0
    postprocess_s: float = 0.0
    write_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.read_s + self.preprocess_s + self.infer_s + self.postprocess_s + self.write_s

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`_s."""
        start = time.perf_counter()
        try:
            yield
        finally:
            field_name = f"{name}_s"
            setattr(self, field_name, getattr(self, field_name) + time.perf_counter() - start)
