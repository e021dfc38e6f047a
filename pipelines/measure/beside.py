"""A measuring script of this checkout and of another one in turn: what a change did to every figure of the record.

    git worktree add ../before HEAD~1          # and install it into an environment of its own
    python -m pipelines.measure.beside ../before --python ../before/.venv/bin/python -o record.json \
        -- train.loader_speed -d 4 --rounds 3

A machine that others use is slow and fast by turns: hence pairs, this checkout and the other one alternately first, and
medians of the ratios within pairs. Figures are all numbers of the two records that have the same place in both.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.measure.head import CHECKOUT, arguments, commit, header, put

NOT_MEASURED = ("versions", "hardware", "created", "commit")


def figures(record: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record with its place, `median_s.soft`; flags, lists of runs and the head are left out."""
    if isinstance(record, dict):
        for name, value in record.items():
            if place or name not in NOT_MEASURED:
                yield from figures(value, f"{place}.{name}" if place else name)
    elif isinstance(record, (int, float)) and not isinstance(record, bool):
        yield place, float(record)


def run(python: Path, checkout: Path, module: str, words: Sequence[str]) -> dict[str, float]:
    """The figures of one run. Raises RuntimeError with what the script printed when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [str(python), "-m", module, *words, "-o", str(record)]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} in {checkout}: exit code {done.returncode}\n{done.stderr[-4000:]}")
        return dict(figures(json.loads(record.read_text())))


def compare(here: Sequence[dict[str, float]], there: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For each figure that all runs have: medians here and there, and the median of here / there over the pairs."""
    shared = [name for name in here[0] if all(name in run for run in [*here, *there])]
    table = {}
    for name in shared:
        pairs = [(ours[name], theirs[name]) for ours, theirs in zip(here, there, strict=True)]
        ratios = [ours / theirs for ours, theirs in pairs if theirs]
        table[name] = {
            "here": statistics.median(ours for ours, _ in pairs),
            "before": statistics.median(theirs for _, theirs in pairs),
            "ratio": statistics.median(ratios) if ratios else None,
            "ratios": ratios,
        }
    return table


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the other checkout's interpreter")
    parser.add_argument("--module-before", help="the script's module in the other checkout, where it has moved since")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("script", help="name of the script, here and there")
    parser.add_argument("words", nargs="*", help="its arguments, after --")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"here": [], "before": []}
    module = f"pipelines.measure.{args.script}"
    arms = {
        "here": (Path(sys.executable), CHECKOUT, module),
        "before": (args.python.absolute(), args.before.resolve(), args.module_before or module),
    }
    for pair in range(args.pairs):
        for arm in ("here", "before") if pair % 2 else ("before", "here"):
            runs[arm].append(run(*arms[arm], args.words))
            print(f"pair {pair + 1} of {args.pairs}: {arm} done", flush=True)
    table = compare(runs["here"], runs["before"])
    what = f"{args.script} {' '.join(args.words)}: this commit beside another"
    put(header(what) | {"before": commit(args.before), "pairs": args.pairs, "figures": table}, args.o)
    for name, row in table.items():
        print(f"{name:48} {row['here']:12.6g} {row['before']:12.6g}  ratio {row['ratio']}")
