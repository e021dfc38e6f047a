"""Predictions by the C interface of the engine in a process of its own, which sees the emulated GPU: so its driver
comes into no other test.

    python -m tests.engine_worker jobs.json

`jobs.json` is a list: bundle, image (.npy), spacing, options, stream_bytes, probabilities, previous (.npy), and `out`,
a .npz that is written with the labels, or with the error. `cancel_at`: a prediction is begun before and ended at that
tile.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import engine
from tests.engine import Engine, EngineError


def run(job: dict[str, Any]) -> dict[str, Any]:
    before = engine.stream_bytes(job.get("stream_bytes", 2**29))
    try:
        one = Engine(Path(job["bundle"]), "tensorrt", **job.get("options", {}))
        previous = np.load(job["previous"]) if "previous" in job else None
        if "cancel_at" in job:
            with pytest.raises(EngineError) as caught:
                one.predict(np.load(job["image"]), job["spacing"], heard=lambda done, _: int(done == job["cancel_at"]))
            assert caught.value.status == engine.CANCELLED
        heard: list[tuple[int, int]] = []
        got = one.predict(
            np.load(job["image"]),
            job["spacing"],
            previous,
            heard=lambda done, total: heard.append((done, total)) or 0,
            probabilities=job.get("probabilities", False),
        )
        made = {"labels": got.labels_ZYX, "describe": np.array(one.describe()), "heard": np.array(heard)}
        if got.probabilities_HZYX is not None:
            made["probabilities"] = got.probabilities_HZYX
        return made
    except EngineError as e:
        return {"error": np.array(str(e)), "status": np.array(e.status)}
    finally:
        engine.stream_bytes(before)


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        np.savez(one["out"], **run(one))
