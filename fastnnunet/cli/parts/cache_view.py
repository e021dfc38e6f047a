"""What `fastnnunet cache` shows: tables and sums."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastnnunet.api.view import View
from fastnnunet.cache.find import case_differences
from fastnnunet.cache.leftover import Leftover
from fastnnunet.cache.plan import CachePlan
from fastnnunet.cache.store.folder import CacheFolder, open_cache
from fastnnunet.cache.store.manifest import Manifest
from fastnnunet.cache.store.storage import Place
from fastnnunet.cache.verify import CaseReport
from fastnnunet.errors import CorruptError, NewerFormatError
from fastnnunet.specs.canonical import differences, to_plain
from fastnnunet.system.words import size_text, time_text

console = Console(highlight=False, soft_wrap=True)
TABLE_WIDTH = 200  # where there is no terminal and hence no width to fit into


def cache_view() -> View:
    """Events on standard output, where the results of these commands go."""
    return View(console=console)


def print_preprocessing(folder: Path, missing: int, cases: int, size_bytes: int) -> None:
    """What preprocessing unlabelled images would write."""
    _print_rows(
        [
            ("images", f"{cases}, of which {missing} to preprocess"),
            ("into", f"{folder}: at most {size_text(size_bytes)} more"),
        ]
    )


def print_plan(plan: CachePlan, place: str | None = None) -> None:
    """What a build would write, need and take; `place` where the cache has no name yet."""
    source = "measured on the stored cases" if plan.bytes_measured else "rule of thumb until a case is stored"
    rows = [
        ("cache", place or str(plan.path)),
        ("cases", f"{plan.cases}, of which {plan.cases_todo} to do"),
        ("voxels to do", f"{plan.voxels_todo:,}"),
        ("disk", f"{size_text(plan.bytes_estimated)} ({plan.bytes_per_voxel:.2f} B/voxel, {source}); "
                 + ("object store" if plan.bytes_free is None else f"free: {size_text(plan.bytes_free)}")),
        ("memory", f"{size_text(plan.memory_per_worker)} per process at most, beside the teacher; x {plan.workers}"),
    ]  # fmt: skip
    if plan.seconds_estimated is not None and plan.seconds_per_patch is not None:
        rows.append(
            (
                "time",
                f"about {time_text(plan.seconds_estimated)} ({plan.seconds_per_patch:.2f} s per patch x "
                f"{plan.tiles_todo} patches / {plan.workers} processes)",
            )
        )
    _print_rows(rows)


def print_list(folders: Sequence[Place]) -> None:
    """One table per place, one line per cache."""
    if not folders:
        console.print("no caches")
    for place, group in groupby(folders, key=lambda folder: folder.parent):
        table = Table(box=None, pad_edge=False)
        for heading in ("key", "T", "encoding", "policy", "folds", "cases", "size", "B/voxel"):
            table.add_column(heading, no_wrap=True)
        for folder in group:
            table.add_row(*_list_row(folder))
        console.print(escape(f"{place}:"))
        (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(table)


def _list_row(folder: Place) -> tuple[str, ...]:
    try:
        cache = open_cache(folder)
    except NewerFormatError:
        return folder.name, "", "[red]newer format[/red]"
    except CorruptError:
        return folder.name, "", "[red]damaged[/red]"
    stored = cache.stored_manifests()
    size, voxels = _totals(stored)
    policy, labels = cache.identity["policy"], cache.identity["soft_labels"]
    of_maps = "maps" in cache.identity["teacher"]  # imported
    return (
        folder.name,
        f"{cache.temperature:g}" if cache.temperature is not None else "{:g}-{:g}".format(*labels["temperature_range"]),
        labels["encoding"] + (f", {labels['levels']} levels" if "levels" in labels else ""),
        "import" if of_maps else policy["name"],
        f"{len(policy['folds'])} map(s)" if of_maps else " ".join(map(str, policy["folds"])),
        f"{len(stored)}/{len(cache.cases)}",
        size_text(size),
        f"{size / voxels:.3f}" if voxels else "-",
    )


def print_info(cache: CacheFolder) -> None:
    """Everything known about one cache."""
    import yaml

    stored = cache.stored_manifests()
    size, voxels = _totals(stored)
    rows = [
        ("folder", str(cache.path)),
        ("key", cache.key),
        (
            "cases",
            f"{len(stored)} of {len(cache.cases)} stored"
            + ("" if len(stored) == len(cache.cases) else " (unfinished)"),
        ),
        ("size", f"{size_text(size)}" + (f", {size / voxels:.3f} bytes per voxel" if voxels else "")),
    ]
    if stored:
        rows.append(
            ("error", f"at most {max(m.max_error for m in stored):.6f} measured, {cache.codec.eps:.6f} guaranteed")
        )
        rows.append(("teacher time", time_text(sum(m.seconds for m in stored))))
    _print_rows(rows)
    document = {"identity": cache.identity, "recipe": to_plain(cache.spec), "provenance": cache.provenance}
    console.print(escape(yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=120)))


def print_summary(cache: CacheFolder) -> None:
    """One line after a build."""
    stored = cache.stored_manifests()
    size, voxels = _totals(stored)
    console.print(
        f"{len(stored)} of {len(cache.cases)} cases stored, {size_text(size)}, "
        f"{size / max(voxels, 1):.3f} bytes per voxel, "
        f"largest error {max((m.max_error for m in stored), default=0):.6f} (bound {cache.codec.eps:.6f})"
    )


def print_reports(cache: CacheFolder, reports: Sequence[CaseReport]) -> bool:
    """Print what is not right and the command that mends it; True when everything is."""
    bad = [report for report in reports if report.status != "ok"]
    for report in bad:
        console.print(f"{report.case_id} [red]{report.status}[/red]: {escape(report.problem or '')}")
    damaged = [report.case_id for report in bad if report.status == "damaged"]
    missing = len(bad) - len(damaged)
    console.print(f"{len(reports) - len(bad)} cases ok, {len(damaged)} damaged, {missing} missing")
    if damaged:
        console.print(f"rebuild the damaged ones with: {escape(cache.rebuild_command(*damaged))}")
    if missing:
        console.print(f"build the missing ones with: {escape(cache.build_command)}")
    return not bad


def print_differences(left: CacheFolder, right: CacheFolder) -> bool:
    """Print the identity fields, and the cases, in which two caches differ; True when there are none."""
    fields = differences(left.identity, right.identity)
    if not fields:
        console.print(f"no difference: both have the key {left.key}")
        return True
    console.print(f"{left.path.name} -> {right.path.name}")
    for line in (*(f"  {field}" for field in fields), *case_differences(left.cases, right.cases)):
        console.print(escape(line))
    return False


def print_leftovers(leftovers: Sequence[Leftover], *, dry_run: bool) -> None:
    """What was removed, or would be, and how many bytes."""
    verb = "would remove" if dry_run else "removed"
    for leftover in leftovers:
        console.print(
            f"{verb} {escape(str(leftover.path))} ({size_text(leftover.size_bytes)}): {escape(leftover.reason)}"
        )
    size_bytes = sum(leftover.size_bytes for leftover in leftovers)
    console.print(f"{verb} {len(leftovers)} leftover(s), {size_bytes} bytes" if leftovers else "nothing to remove")


def _totals(manifests: Sequence[Manifest]) -> tuple[int, int]:
    """Stored bytes and voxels."""
    return sum(m.stored_bytes for m in manifests), sum(m.voxels for m in manifests)


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    for name, text in rows:
        console.print(f"{name + ':':<14}{escape(text)}")
