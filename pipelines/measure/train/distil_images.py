"""`fastnnunet distill images` as a whole: from the model folder to the report, then other sizes from that work folder.

    python -m pipelines.measure.train.distil_images -m MODEL -i scans --work W --sizes 4 6 -o R.json -- --no-mirroring

Each size is a command of its own, with whatever follows `--`; W is its output and must not be there yet. The record has
the seconds of every command and of its stages, and what the command says of its students. Nothing else should run.
"""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.provenance import write_json
from pipelines.measure.head import arguments, header, put

STAGE = re.compile(r"^distill images \d+/\d+: (.+?), .+ left of all")


def run(command: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds of a command, and of its stages by name; shows what it says."""
    begin, begun = time.monotonic(), {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if found := STAGE.search(line):
                begun[found[1]] = time.monotonic() - begin
    if process.returncode:
        sys.exit(process.returncode)
    total = time.monotonic() - begin
    ends = [*list(begun.values())[1:], total]
    return total, {name: round(end - at, 1) for (name, at), end in zip(begun.items(), ends, strict=True)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("-m", type=Path, required=True, metavar="MODEL")
    parser.add_argument("-i", type=Path, required=True, metavar="SCANS")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 6])
    parser.add_argument("options", nargs="*", help="of the command, after --")
    args = parser.parse_args()
    if args.work.exists():
        sys.exit(f"--work {args.work} is there already; name a folder that is not")
    record: dict[str, Any] = header(__doc__.splitlines()[0]) | {"options": args.options, "runs": [], "students": []}
    for number, size in enumerate(args.sizes):
        command = [sys.executable, "-m", "fastnnunet", "distill", "images", "-m", str(args.m), "-i", str(args.i)]
        seconds, stages = run([*command, "-r", str(size), "-o", str(args.work), *args.options])
        what = "another size from the same work folder" if number else "model folder to report, nothing there before"
        record["runs"].append({"r": size, "what": what, "seconds": round(seconds), "stages": stages})
        told = read_json_object(args.work / "summary.json")
        record["training"], record["mirroring"] = told["training"], told["mirroring"]
        record["teacher_seconds_per_case"] = told["teacher"]["seconds_per_case"]
        record["scans"] = {name: len(told[name]) for name in ("learnt_from", "held_out", "left_out")}
        (student,) = told["students"]
        fields = ("tag", "seconds", "parameters", "bundle_bytes", "temperature")
        fidelity = {"fidelity": student["fidelity"]["mean"], "labels": student["fidelity"]["labels"]}
        record["students"].append({name: student[name] for name in fields} | fidelity)
        write_json(args.o, record)
    put(record, args.o)


if __name__ == "__main__":
    main()
