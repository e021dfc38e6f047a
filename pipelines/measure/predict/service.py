"""`fastnnunet serve` under load: what a request takes, whether any is lost, whether memory grows, what SIGKILL leaves.

    python -m pipelines.measure.predict.service --bundle STUDENT --images FOLDER -o record.json

alone      one client, `--alone` requests after the model is loaded: milliseconds at the client, and at the server from
           the last byte of the upload to the first of the answer (`queued` and `total` of Server-Timing)
together   `--clients` at once for `--requests` requests: statuses, how many label maps are `fastnnunet predict`'s byte
           for byte, and the resident memory of all processes of the service after every tenth request
killed     SIGKILL while one job runs and one waits, and a new service in the same folder: what each job then answers

Images are `*_0000.nii.gz`, the first `--images-used` of the folder, sent in turn. Linux alone.
"""

import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import httpx

from pipelines.measure.head import CHECKOUT, arguments, header, put
from tests.serving import children, serving_process, until

TIMEOUT_S = 300.0


def expected(bundle: Path, images: Sequence[Path], words: Sequence[str], folder: Path) -> list[bytes]:
    """What `fastnnunet predict` writes for each image."""
    (folder / "images").mkdir()
    for image in images:
        (folder / "images" / image.name).symlink_to(image.resolve())
    command = ["predict", "-i", folder / "images", "-o", folder / "out", "-m", bundle, *words]
    subprocess.run([sys.executable, "-m", "fastnnunet", *map(str, command)], cwd=CHECKOUT, check=True)
    return [(folder / "out" / image.name.replace("_0000.", ".")).read_bytes() for image in images]


def resident_bytes(pid: int) -> int:
    """Of a process and its children; what they share counts for each."""
    total = 0
    for one in (pid, *children(pid)):
        match = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{one}/status").read_text())
        total += 1024 * int(match[1]) if match else 0
    return total


def server_ms(answer: httpx.Response) -> dict[str, float]:
    """The parts of Server-Timing."""
    return {
        name: float(value) for name, value in re.findall(r"([a-z]+);dur=([0-9.]+)", answer.headers["server-timing"])
    }


def alone(client: httpx.Client, place: str, images: Sequence[bytes], requests: int) -> dict[str, Any]:
    wall, stages = [], []
    for number in range(requests + 3):
        begin = time.perf_counter()
        answer = client.post(place, content=images[number % len(images)])
        if number >= 3:
            wall.append(1e3 * (time.perf_counter() - begin))
            stages.append(server_ms(answer))
    at_server = [one["queued"] + one["total"] for one in stages]
    return {
        "requests": requests,
        "client_ms": {"median": statistics.median(wall), "least": min(wall), "most": max(wall)},
        "server_ms": {"median": statistics.median(at_server), "least": min(at_server), "most": max(at_server)},
        "stages_ms": {name: statistics.median(one[name] for one in stages) for name in stages[0]},
    }


def together(
    url: str, place: str, images: Sequence[bytes], right: Sequence[bytes], args: Any, pid: int
) -> dict[str, Any]:
    numbers, lock = itertools.count(), Lock()
    statuses: Counter[int] = Counter()
    equal, resident, wall = 0, {}, []

    def work(_client: int) -> None:
        nonlocal equal
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            while (number := next(numbers)) < args.requests:
                begin = time.perf_counter()
                answer = client.post(place, content=images[number % len(images)])
                elapsed = 1e3 * (time.perf_counter() - begin)
                with lock:
                    wall.append(elapsed)
                    statuses[answer.status_code] += 1
                    equal += answer.content == right[number % len(images)]
                    if (done := sum(statuses.values())) % 10 == 0:
                        resident[done] = resident_bytes(pid)

    begin = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(work, range(args.clients)))
    early, late = resident.get(50), resident.get(args.requests)
    return {
        "clients": args.clients,
        "requests": args.requests,
        "wall_s": time.perf_counter() - begin,
        "client_ms_median": statistics.median(wall),
        "statuses": dict(statuses),
        "lost": args.requests - statuses[200],
        "equal_to_predict": equal,
        "resident_bytes_after": resident,
        "resident_growth_from_50": None if early is None or late is None else late / early - 1,
    }


def killed(bundle: Path, folder: Path, words: Sequence[str], model: str, image: bytes, right: bytes) -> dict[str, Any]:
    place = f"/models/{model}/jobs"
    with serving_process([bundle], folder, *words) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        done = client.post(place, content=image).json()["id"]
        until(lambda: client.get(f"/jobs/{done}").json()["state"] == "done", TIMEOUT_S)
        (child,) = children(process.pid)
        os.kill(child, signal.SIGSTOP)  # so that the next one is still running when the service is killed
        running, waiting = (client.post(place, content=image).json()["id"] for _ in range(2))
        until(lambda: client.get(f"/jobs/{running}").json()["state"] == "running", TIMEOUT_S)
        process.kill()
        process.wait()
        os.kill(child, signal.SIGCONT)
    until(lambda: not Path(f"/proc/{child}").exists(), TIMEOUT_S)
    with serving_process([bundle], folder, *words) as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        whole = client.get(f"/jobs/{done}/result")
        return {
            "job that was done": {"status": whole.status_code, "equal_to_predict": whole.content == right},
            "job that ran": client.get(f"/jobs/{running}").status_code,
            "its result": client.get(f"/jobs/{running}/result").status_code,
            "job that waited": client.get(f"/jobs/{waiting}").status_code,
            "child that predicted": "ended by itself",
        }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of *_0000.nii.gz")
    parser.add_argument("--images-used", type=int, default=8)
    parser.add_argument("--alone", type=int, default=40)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    files = sorted(args.images.glob("*_0000.nii.gz"))[: args.images_used]
    words = ["--backend", args.backend, "--precision", args.precision, "--threads", str(args.threads)]
    record = header("fastnnunet serve under load") | {
        "bundle": args.bundle.name,
        "backend": args.backend,
        "precision": args.precision,
        "threads": args.threads,
        "images": len(files),
        "upload_bytes": [file.stat().st_size for file in files],
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        right = expected(args.bundle, files, words, folder)
        images = [file.read_bytes() for file in files]
        model = args.bundle.resolve().name
        with serving_process([args.bundle], folder / "work", *words, "--idle", "3600") as (process, url):
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
                record["alone"] = alone(client, f"/models/{model}/predict", images, args.alone)
            print(record["alone"], flush=True)
            record["together"] = together(url, f"/models/{model}/predict", images, right, args, process.pid)
            print(record["together"], flush=True)
        record["killed"] = killed(args.bundle, folder / "killed", words, model, images[0], right[0])
        print(record["killed"], flush=True)
    put(record, args.o)
