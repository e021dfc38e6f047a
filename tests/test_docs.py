"""README.md and docs/: commands that work, links that lead somewhere, figures that are the records'."""

import argparse
import importlib
import json
import os
import posixpath
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml

from tests.dicom_files import write_series
from tests.tiny import CONFIGURATION, DATASET

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "pipelines" / "results"
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    *sorted((ROOT / "docs" / "design").glob("*.md")),
]
OURS = ("fastnnunet ", "nnUNetv2_distillation_", "nnUNetv2_resenc_", "nnUNetv2_primus_", "torchrun ")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def code(text: str) -> Iterator[tuple[str, bool]]:
    """(code, whether it stands in a block): lines of indented and fenced blocks, and what stands in backticks."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip(), True
        else:
            yield from ((inline, False) for inline in re.findall(r"`([^`]+)`", line))


def commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """Our commands among the code, as (words, whether all that is required must be there): a name alone is no call."""
    for line, in_block in code(text):
        if line.startswith(OURS):
            words = shlex.split(line, comments=True)
            if words[0] == "torchrun":
                words = words[words.index("-m") + 1 :]
            is_call = in_block and "..." not in words and any(word.startswith("-") for word in words)
            yield [word for word in words if word != "..."], is_call


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def block(text: str, start: str = "fastnnunet") -> list[str]:
    """The lines of code that begin with `start`."""
    return [line for line, in_block in code(text) if in_block and line.startswith(start)]


# commands


def parse(words: list[str], complete: bool) -> None:
    """Let the command line read the words, without running anything. Raises what it raises for a wrong option."""
    from fastnnunet.cli.main import command, spread_multi_values

    leaf: Any = command()
    arguments = spread_multi_values(words)
    while hasattr(leaf, "commands") and arguments and not arguments[0].startswith("-"):
        leaf, arguments = leaf.commands[arguments[0]], arguments[1:]
    if "--help" in arguments or "--version" in arguments or (hasattr(leaf, "commands") and not arguments):
        return
    if not complete:
        required = [p for p in leaf.params if p.required]
        missing = [p.opts[0] for p in required if p.param_type_name == "option" and not set(p.opts) & set(arguments)]
        positional = [] if arguments else [p for p in required if p.param_type_name == "argument"]
        arguments += ["1" for _ in positional] + [word for option in missing for word in (option, "1")]
    leaf.make_context(leaf.name, arguments)


def nnunet_style() -> dict[str, str]:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return {name: target for name, target in scripts.items() if name.startswith("nnUNetv2_")}


class ParsedError(Exception):
    """The nnU-Net-style command has read its options: stop before it acts."""


@each_page
def test_commands_exist_and_take_these_options(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnnunet.cli import aliases

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments: Any) -> None:
        parse_args(*arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for words, complete in commands(page.read_text()):
        if words[0] == "fastnnunet":
            parse(words[1:], complete)
        else:
            function = nnunet_style()[words[0]].split(":")[1]
            if len(words) > 1:
                with pytest.raises(ParsedError):
                    getattr(aliases, function)(words[1:])


def test_a_wrong_command_would_be_noticed() -> None:
    text = "`fastnnunet train ... --nothing`\n\n    fastnnunet predict -i images  # no -o\n\n`fastnnunet destroy`\n"
    found = list(commands(text))
    assert len(found) == 3
    for (words, complete), problem in zip(found, ("--nothing", "output", "destroy"), strict=True):
        with pytest.raises(Exception, match=problem):
            parse(words[1:], complete)


@each_page
def test_options_targets_extras_and_modules_exist(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    options = {name for _, leaf in leaves() for p in leaf.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    for line, _ in code(page.read_text()):
        if option := re.match(r"--[a-z][\w-]*", line):
            assert option[0] in options, line
        if made := re.match(r"make ((?:[a-z]+ ?)+)", line):
            assert set(made[1].split()) <= set(targets), line
        for extras in re.findall(r"'(?:\.|fastnnunet)\[([\w,-]+)\]'", line):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), line
        for module in re.findall(r"-m (pipelines(?:\.\w+)+)", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), line


def leaves() -> Any:
    from fastnnunet.cli.main import command

    return reference().leaves(command())


def reference() -> Any:
    """docs/reference.py, which makes the command reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        return importlib.import_module("reference")


def run(words: list[str]) -> None:
    from fastnnunet.cli.main import main

    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code, words


def test_the_three_doors_are_open(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of README.md's doors, in order, on a tiny data set with training cut short; the Python example."""
    text = (ROOT / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # `train` sets it: here for this test alone
    raw = world / "raw" / DATASET
    for name in ("imagesTs", "labelsTs"):
        (tmp_path / name).symlink_to(raw / name)
    model_folder = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    in_here = ["--workers", "0", "--threads", "1"]  # no processes that load torch again

    def follow(line: str) -> None:
        own = line.replace("-d 4", "-d 998").replace("MODEL_FOLDER", str(model_folder))
        words = shlex.split(own, comments=True)[1:]
        run([*words, *{"train": ["-e", "1", "--iterations", "2", "--no-validate"], "cache": in_here}.get(words[0], [])])

    five = block(section(text, "I trained an nnU-Net"))[:5]
    assert [line.split()[1] for line in five] == ["cache", "train", "export", "predict", "evaluate"]
    for line in five:
        follow(line)
    assert len(json.loads((tmp_path / "scores.json").read_text())["cases"]) == 2

    example = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "guides" / "python.md").read_text(), re.DOTALL)
    assert example is not None
    image = sitk.ReadImage(str(raw / "imagesTs" / "tiny_10_0000.nii.gz"))
    names: dict[str, Any] = {
        "image_CZYX": sitk.GetArrayFromImage(image)[None],
        "spacing_zyx_mm": image.GetSpacing()[::-1],
    }
    exec(example[1], names)
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "predictions" / "tiny_10.nii.gz")))
    np.testing.assert_array_equal(names["segmentation"], written)

    deploy = block(section(text, "I must deploy"))
    assert [line.split()[1] for line in deploy] == ["export", "predict"]
    for line in deploy:
        follow(line)

    write_series(tmp_path / "CT_SERIES", np.random.default_rng(0).normal(0, 50, (20, 24, 22)).astype(np.int16))

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (hospital,) = block(section(text, "I work in a hospital"))
    follow(hospital)
    assert (tmp_path / "out" / "CT_SERIES.dcm").is_file()


# links


def targets(page: Path) -> Iterator[tuple[str, str]]:
    """(path in the checkout, anchor) of every link that stays in it."""
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        here = page.relative_to(ROOT).as_posix()
        yield posixpath.normpath(posixpath.join(posixpath.dirname(here), target)) if target else here, anchor


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and Python-Markdown make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in targets(page):
        assert (ROOT / target).is_file(), target
        assert not anchor or anchor in anchors(ROOT / target), f"{target}#{anchor}"


@each_page
def test_files_named_exist(page: Path) -> None:
    for name, _ in code(page.read_text()):
        if "NAME" not in name and re.fullmatch(
            r"(fastnnunet|tests|pipelines|cache_specs|docs)/[\w./-]+\.(py|json|yaml|md|pyi)", name
        ):
            assert (ROOT / name).is_file(), name


def test_every_record_is_told_of() -> None:
    records = {path.relative_to(ROOT).as_posix() for path in RESULTS.glob("*.json")}
    assert records == {target for target, _ in targets(ROOT / "docs" / "measured.md") if target.endswith(".json")}


# figures


def tables(text: str) -> list[list[list[str]]]:
    """Tables -> rows -> cells, without the line below the header."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "---" not in line]
        for table in found
    ]


def record(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def is_shown(text: str, *values: float) -> None:
    """The numbers in `text` are the values, rounded as they are written."""
    numbers = re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))
    shown = [float(number) for number in numbers]
    decimals = [len(number.partition(".")[2]) for number in numbers]
    assert shown == [round(value, places) for value, places in zip(values, decimals, strict=True)], text


def gain(rows: list[dict], base: list[dict], name: str) -> str:
    """In points, mean of the seeds, paired over the cases; with its bootstrap interval."""
    pairs = zip(sorted(rows, key=lambda r: r["seed"]), sorted(base, key=lambda r: r["seed"]), strict=True)
    cases = 100 * np.mean(
        [[mean(new["cases"][c][name]) - mean(old["cases"][c][name]) for c in old["cases"]] for new, old in pairs], 0
    )
    draws = cases[np.random.default_rng(0).integers(0, len(cases), (10000, len(cases)))].mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{cases.mean():+.2f} ({low:.2f} to {high:.2f})"


OASIS_WITHOUT_LABELS = (("2026-11-30", ""), ("2026-12-01", "_mirrored"))  # labelled without mirrors, and with
EVERY = "kl_dice T=1 every resolution"
DEFAULT = f"{EVERY} not mirrored"  # `train` as it is, labels of the ensemble without mirrors


def test_the_table_of_the_readme() -> None:
    header, ensemble, fold, fp32, bf16, control = tables((ROOT / "README.md").read_text())[1]
    assert header[1:] == ["mean Dice", "seconds a case", "times faster", "model file"]
    benchmark = record("2026-11-28_hippocampus_benchmark.json")["arms"]
    students = record("2026-12-01_student_table.json")
    arms = ("nnunetv2 ensemble", "nnunetv2 one fold", "hippocampus_r4 openvino", "hippocampus_r4 openvino bf16")
    common = benchmark[arms[0]]["per_case_s"].keys()
    for row, arm in zip((ensemble, fold, fp32, bf16), arms, strict=True):
        measured = benchmark[arm]
        is_shown(row[2], median(measured["per_case_s"][case] for case in common))
        is_shown(row[3], measured["times_faster_than_ensemble"])
        is_shown(row[4], measured["size_bytes"] / 1e6)
    is_shown(ensemble[1], students["ensemble"]["mean_dice"])
    earlier = record("2026-11-23_hippocampus_benchmark.json")["arms"]["nnunetv2 one fold"]
    is_shown(fold[1], earlier["metrics"]["foreground_mean"]["dice"])
    distilled, alone = (
        students["table"][f"r4_lite {loss} 5 fold(s) from teacher, 2000 x 2"] for loss in (DEFAULT, "none")
    )
    for row in (fp32, bf16):
        is_shown(row[1], distilled["mean_dice"])
    is_shown(control[1], alone["mean_dice"])
    assert distilled["parameters"] == alone["parameters"] == benchmark[arms[2]]["parameters"]


def test_students_of_a_stronger_teacher() -> None:
    text = section((ROOT / "docs" / "measured.md").read_text(), "A stronger teacher")
    measured = record("2026-11-30_strong_students.json")
    teacher = record("2026-11-30_strong_teacher.json")
    assert f"Dice {teacher['judged']['dice']:.4f}" in text
    assert measured["teacher"]["dice"] == pytest.approx(teacher["judged"]["dice"], abs=5e-5)
    (table,) = tables(text)
    for r, seeds, *values in table[1:]:
        arms = [
            [row for row in measured["rows"] if 2 * row["r"] == int(r) and row["arm"] == a] for a in ("none", "half")
        ]
        assert [[row["seed"] for row in rows] for rows in arms] == [list(map(int, seeds.split()))] * 2
        near = [[row["calibration"] for row in rows] for rows in arms]
        expected = [[mean(row[name] for row in rows) for rows in arms] for name in ("dice", "fidelity")]
        expected.append([mean(c["labels_border"]["nll"] for c in rows) for rows in near])
        expected.append([mean(c["teacher_border"]["kl"] for c in rows) for rows in near])
        for value, pair in zip(values, expected, strict=True):
            is_shown(value, *pair)
        gains = [100 * (half["dice"] - none["dice"]) for none, half in zip(*arms, strict=True)]
        assert f"r={r} " + ", ".join(f"{gain:+.1f}" for gain in gains) in " ".join(text.split())
        for row in measured["rows"]:
            if row["arm"] == "annealed" and 2 * row["r"] == int(r):
                told = f"r={r}, seed {row['seed']}, Dice is {row['dice']:.4f} and fidelity {row['fidelity']:.4f}"
                assert told in " ".join(text.split())
        none, half = arms
        assert f"r={r} {gain(half, none, 'dice')}" in " ".join(text.split())
    assert sum(row["arm"] != "annealed" for row in measured["rows"]) == 2 * sum(
        len(row[1].split()) for row in table[1:]
    )


def test_longer_trainings_of_a_stronger_teacher() -> None:
    text = " ".join(section((ROOT / "docs" / "measured.md").read_text(), "A stronger teacher").split())
    measured = record("2026-12-01_strong_students_2000.json")
    assert measured["teacher"]["dice"] == record("2026-11-30_strong_students.json")["teacher"]["dice"]
    rows = {(row["seed"], row["arm"]): row for row in measured["rows"]}
    for seed in {seed for seed, _ in rows}:
        none, half = rows[seed, "none"], rows[seed, "half"]
        assert {(row["r"], row["steps"]) for row in (none, half)} == {(2, 2000)}
        pairs = [f"{none[name]:.4f} / {half[name]:.4f}" for name in ("dice", "fidelity")]
        kl = " / ".join(f"{row['calibration']['teacher_border']['kl']:.3f}" for row in (none, half))
        assert f"seed {seed} Dice {pairs[0]}, fidelity {pairs[1]}, KL to the teacher {kl}" in text


def test_a_stronger_teacher_online_at_the_end() -> None:
    text = " ".join(section((ROOT / "docs" / "measured.md").read_text(), "A stronger teacher").split())
    rows = record("2026-12-01_strong_online.json")["rows"]
    assert {(row["r"], row["steps"], row["distill"]["online_teacher"]) for row in rows} == {(2, 1000, 0.1)}
    cached = [r for r in record("2026-11-30_strong_students.json")["rows"] if (r["r"], r["arm"]) == (2, "half")]
    assert [row["seed"] for row in rows] == [row["seed"] for row in cached] == [0, 1, 2]
    dice, fidelity = (mean(row[name] for row in rows) for name in ("dice", "fidelity"))
    assert f"Dice is {dice:.4f} and fidelity {fidelity:.4f}" in text
    points = gain(rows, cached, "dice").replace(" (", " points (")
    assert f"Dice {points}, fidelity {gain(rows, cached, 'fidelity')}" in text


def test_oasis_without_labels() -> None:
    text = " ".join(section((ROOT / "docs" / "measured.md").read_text(), "Several tiles: OASIS").split())
    students = [record(f"{day}_oasis_nolabels{kind}.json") for day, kind in OASIS_WITHOUT_LABELS]
    for measured in students:
        (row,) = measured["rows"]
        one_pass = row["one_pass"]["1"]["dice"]
        assert f"{row['dice']:.4f} in the window, fidelity {row['fidelity']:.4f}, {one_pass:.4f} in one pass" in text
        assert f"{100 * (measured['teacher']['dice'] - row['dice']):.1f} points below its teacher mirrored" in text
    teacher, mirrored_teacher, student, mirrored = (
        row["dice"] for row in record("2026-12-01_oasis_mirrors.json")["rows"]
    )
    assert student == pytest.approx(row["dice"], abs=5e-5)
    assert mirrored_teacher == pytest.approx(measured["teacher"]["dice"], abs=5e-5)
    shown = "{:.4f} and the teacher {:.4f}, {:.1f} points; both mirrored {:.4f} and {:.4f}, **{:.1f} points**"
    below = 100 * (teacher - student), 100 * (mirrored_teacher - mirrored)
    assert shown.format(student, teacher, below[0], mirrored, mirrored_teacher, below[1]) in text


def test_few_labels_and_more_scans() -> None:
    text = section((ROOT / "docs" / "measured.md").read_text(), "Few labels, more scans")
    rows = record("2026-12-01_unlabelled_share.json")["rows"]
    assert {(row["r"], row["steps"], row["labelled"]) for row in rows} == {(2, 1000, 25)}
    (table,) = tables(text)
    arms = {
        arm: [row for row in rows if row["arm"] == arm] for arm in ("none", "half", "soft_half", "mixed_half", "all")
    }
    assert sum(map(len, arms.values())) == len(rows)
    for (_, seeds, *values), of_arm in zip(table[1:], arms.values(), strict=True):
        assert [row["seed"] for row in of_arm] == [int(seed) for seed in seeds.split()]
        is_shown(values[0], *(row["dice"] for row in of_arm))
        is_shown(values[1], *(row["fidelity"] for row in of_arm))
        is_shown(values[2], *(row["calibration"]["labels_border"]["nll"] for row in of_arm))
        is_shown(values[3], *(row["calibration"]["teacher_border"]["kl"] for row in of_arm))
    points = gain(arms["all"], arms["half"], "dice").replace(" (", " points (")
    assert f"Dice {points}, fidelity {gain(arms['all'], arms['half'], 'fidelity')}" in " ".join(text.split())


def test_scans_that_a_stronger_teacher_labelled() -> None:
    text = section((ROOT / "docs" / "measured.md").read_text(), "Scans without labels")
    measured = record("2026-12-01_strong_nolabels_curve.json")
    assert measured["teacher"]["dice"] == record("2026-11-30_strong_students.json")["teacher"]["dice"]
    assert {(row["r"], row["steps"]) for row in measured["rows"]} == {(2, 1000)}
    of: dict[str, dict[str, list[dict]]] = {}
    for row in measured["rows"]:
        of.setdefault(str(row["scans"]), {"hard": [], "half": []})[row["arm"]].append(row)
    table = tables(text)[4]
    assert [row[0] for row in table[1:]] == list(of)
    for (scans, seeds, *values), arms in zip(table[1:], of.values(), strict=True):
        assert all([str(row["seed"]) for row in rows] == seeds.split() for rows in arms.values())
        for number, name in enumerate(("dice", "fidelity")):
            is_shown(values[number], *(mean(row[name] for row in rows) for rows in arms.values()))
        near = [[row["calibration"] for row in rows] for rows in arms.values()]
        is_shown(values[2], *(mean(c["labels_border"]["nll"] for c in of_arm) for of_arm in near))
        is_shown(values[3], *(mean(c["teacher_border"]["kl"] for c in of_arm) for of_arm in near))
        assert f"{scans} scans {gain(arms['half'], arms['hard'], 'dice')}" in " ".join(text.split())
    ten = [row["dice"] for row in of["10"]["hard"] if row["seed"] == 0]
    labelled = [
        next(
            row["dice"]
            for row in record("2026-12-01_unlabelled_share.json")["rows"]
            if (row["arm"], row["seed"]) == (arm, 0)
        )
        for arm in ("none", "half")
    ]
    assert "{:.4f} against {:.4f} and {:.4f} of the same seed".format(*ten, *labelled) in " ".join(text.split())


def test_the_tables_of_scans_without_labels() -> None:
    measured = record("2026-11-29_soft_or_hard.json")
    arms = {name: [row for row in measured["rows"] if row["arm"] == name] for name in ("hard", "half", "soft")}
    assert all(sorted(row["seed"] for row in rows) == [0, 1, 2] for rows in arms.values())
    _, teacher, student = tables((ROOT / "README.md").read_text())[0]
    is_shown(teacher[1], measured["teacher"]["dice"])
    longer = record("2026-11-29_soft_or_hard_4000.json")["rows"]
    r4 = {name: [row for row in longer if row["arm"] == name and row["r"] == 4] for name in ("hard", "half")}
    assert [len(rows) for rows in r4.values()] == [1, 3]
    is_shown(student[1], mean(row["dice"] for row in r4["half"]))
    is_shown(student[2], mean(row["fidelity"] for row in r4["half"]))
    three, twice, variants, scans, _ = tables(
        section((ROOT / "docs" / "measured.md").read_text(), "Scans without labels")
    )
    for shown, rows in zip(three[1:], arms.values(), strict=True):
        for text, name in zip(shown[1:3], ("dice", "fidelity"), strict=True):
            values = [row[name] for row in rows]
            is_shown(text, mean(values), stdev(values))
        is_shown(shown[3], mean(row["calibration"]["labels_border"]["nll"] for row in rows))
        is_shown(shown[4], mean(row["calibration"]["teacher_border"]["kl"] for row in rows))
    r6 = [row for row in longer if row["r"] == 6]
    for shown, rows in zip(twice[1:], [*r4.values(), r6], strict=True):
        for text, name in zip(shown[2:4], ("dice", "fidelity"), strict=True):
            values = [row[name] for row in rows]
            is_shown(text, mean(values), *([stdev(values)] if len(values) > 1 else []))
        is_shown(shown[4], mean(row["calibration"]["labels_border"]["nll"] for row in rows))
        is_shown(shown[5], mean(row["calibration"]["teacher_border"]["kl"] for row in rows))
    for shown, row in zip(variants[1:], record("2026-11-29_soft_loss_ablation.json")["rows"], strict=True):
        near = row["calibration"]
        values = [row["dice"], row["fidelity"], near["labels_border"]["nll"], near["teacher_border"]["kl"]]
        for text, value in zip(shown[1:], values, strict=True):
            is_shown(text, value)
    curve = {(str(row["scans"]), row["arm"]): row for row in record("2026-11-30_scans_curve.json")["rows"]}
    for number, *values in scans[1:]:
        rows = curve[number, "hard"], curve[number, "half"]
        near = [row["calibration"] for row in rows]
        expected = [[row[name] for row in rows] for name in ("dice", "fidelity")]
        expected += [[c["labels_border"]["nll"] for c in near], [c["teacher_border"]["kl"] for c in near]]
        for text, pair in zip(values, expected, strict=True):
            for part, value in zip(text.split(" / "), pair, strict=True):
                is_shown(part, value)


def test_the_command_for_scans_as_a_whole() -> None:
    measured = record("2026-12-01_distil_images.json")
    (run,), (student,) = measured["runs"], measured["students"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    text = " ".join(section((ROOT / "docs" / "measured.md").read_text(), "Scans without labels").split())
    took = "{} min {} s".format(*divmod(run["seconds"], 60))
    assert took in readme
    assert took in text
    fidelity = student["fidelity"]
    assert "fidelity {mean:.3f} ({low:.3f} to {high:.3f})".format(**fidelity) in text
    assert (
        f"{student['seconds']:.2f} s a case against the teacher's {measured['teacher_seconds_per_case']:.2f} s" in text
    )
    labelling, training = (divmod(round(run["stages"][name]), 60) for name in ("labelling", "training r4"))
    assert "labelling took {} min {} s and training {} min {} s".format(*labelling, *training) in text


def test_the_table_of_oasis() -> None:
    measured = record("2026-11-29_oasis.json")
    text = section((ROOT / "docs" / "measured.md").read_text(), "Several tiles: OASIS")
    assert f"has {measured['teacher']['dice']:.4f}" in text
    (table,) = tables(text)
    longer = record("2026-11-30_oasis_2500.json")
    assert longer["teacher"]["dice"] == pytest.approx(measured["teacher"]["dice"], abs=5e-5)
    for shown, row in zip(table[1:], [*measured["rows"], *longer["rows"]], strict=True):
        passes = [row["one_pass"][n]["dice"] for n in ("1", "2", "4")] if "one_pass" in row else []
        assert shown[1] == str(row["steps"])
        for value, expected in zip([v for v in shown[2:] if v], [row["dice"], row["fidelity"], *passes], strict=True):
            is_shown(value, expected)


def test_ways_to_answer_the_same_wherever_strides_begin() -> None:
    text = " ".join(section((ROOT / "docs" / "measured.md").read_text(), "Several tiles: OASIS").split())
    for name, between in (
        ("plain", " in the window and "),
        ("filtered_strides", " in the window, "),
        ("moved_patches", " and "),
    ):
        (row,) = record(f"2026-11-30_oasis_{name}.json")["rows"]
        assert f"{row['dice']:.4f}{between}{row['one_pass']['1']['dice']:.4f}" in text


def test_cold_starts_of_the_engine() -> None:
    measured = record("2026-11-30_engine.json")["cold"]
    assert all(arm["labels_equal"] for arm in measured.values())
    by = {(name, side): arm[side] for name, arm in measured.items() for side in ("engine", "python")}
    seconds = [f"{arm['median_s']:.2f}" for arm in by.values()]
    words = (
        "OpenVINO {} s, Python {} s; ONNX Runtime {} s and {} s; with OpenVINO {:.0f} MB at the most, Python {:.0f} MB"
    )
    expected = words.format(*seconds, *(by["openvino", side]["peak_bytes"] / 1e6 for side in ("engine", "python")))
    assert expected in " ".join((ROOT / "docs" / "guides" / "engine.md").read_text().split())


def test_a_large_ct_in_the_engine() -> None:
    volume = record("2026-11-30_engine_ct.json")["volume"]
    assert volume["labels_equal"]
    by = [volume[side][value] for side in ("engine", "python") for value in ("median_s", "peak_bytes")]
    expected = "{:.1f} s and {:.2f} GB, Python {:.1f} s and {:.2f} GB, labels equal"
    shown = expected.format(*(value if value < 1e6 else value / 1e9 for value in by))
    assert shown in " ".join((ROOT / "docs" / "guides" / "engine.md").read_text().split())


def test_batch_norm_on_hippocampus() -> None:
    (table,) = tables(section((ROOT / "docs" / "measured.md").read_text(), "One tile: batch norm on hippocampus"))
    measured = record("2026-11-30_hippocampus_norms.json")["rows"]
    for shown, arm in zip(table[1:], ("in", "bn", "bn_last"), strict=True):
        rows = sorted((row for row in measured if row["arm"] == arm), key=lambda row: row["seed"])
        assert [row["seed"] for row in rows] == list(range(int(shown[1])))
        passes = [[row["one_pass"][n]["dice"] for row in rows] for n in "124"] if arm != "in" else []
        for cell, dice in zip([c for c in shown[2:] if c], [[row["dice"] for row in rows], *passes], strict=True):
            assert cell == (f"{mean(dice):.4f} ± {stdev(dice):.4f}" if len(dice) > 1 else f"{dice[0]:.4f}")


def test_the_table_of_one_pass() -> None:
    measured = record("2026-11-30_one_pass.json")
    text = section((ROOT / "docs" / "measured.md").read_text(), "A large CT")
    table = tables(text)[-1]
    for shown, arm in zip(table[1:], measured["arms"].values(), strict=True):
        is_shown(shown[1], arm["seconds"])
        is_shown(shown[2], arm["stages_s"]["infer"])
        is_shown(shown[3], arm["peak_gib"])
        for value, than in zip(shown[4:], ("window", "single_fold", "ensemble"), strict=True):
            is_shown(value, arm[f"times_faster_than_{than}"])
    assert f"over a patch took {measured['nnunetv2']['pass_s']:.1f} s" in text
    assert 1 - measured["arms"]["one pass, batch norm, fp32"]["agreement_with_whole"] < 1e-6


def test_the_table_of_a_locator() -> None:
    measured = record("2026-11-30_locate.json")
    text = section((ROOT / "docs" / "measured.md").read_text(), "Locate, then look")
    (table,) = tables(text)
    rows = [(backend, way) for backend in measured["arms"] for way in ("everywhere", "located")]
    for shown, (backend, way) in zip(table[1:], rows, strict=True):
        arm = measured["arms"][backend]
        is_shown(shown[1], arm["dice"][way])
        is_shown(shown[2], arm["seconds"][way]["total"])
        is_shown(shown[3], arm["seconds"][way]["infer"])
        shares = arm["share_of_voxels_predicted"].values()
        is_shown(shown[4], 100 * mean(shares) if way == "located" else 100)
    margin = measured["locator"]["margin"]
    assert f"margin of {margin['margin_mm']:g} mm, of which {margin['needed_mm']:g} were needed" in text


def test_the_figures_of_the_doors() -> None:
    text = (ROOT / "README.md").read_text()
    deploy = {row[0]: row[1] for row in tables(section(text, "I must deploy"))[0]}
    arms = record("2026-11-28_hippocampus_benchmark.json")["arms"]
    ensemble, fp32, bf16 = (
        arms[f"{n}"] for n in ("nnunetv2 ensemble", "hippocampus_r4 openvino", "hippocampus_r4 openvino bf16")
    )
    cold = record("2026-11-29_file_to_file_quiet.json")["cold"]
    expected = {
        "base install": (record("2026-11-24_slim_install.json")["size_bytes"] / 1e6,),
        "bundle": (fp32["size_bytes"] / 1e6, ensemble["size_bytes"] / 1e6),
        "peak memory": (fp32["peak_memory_bytes"] / 1e6, ensemble["peak_memory_bytes"] / 1e6),
        "cold start": (cold["openvino bf16"]["median_s"], ensemble["cold"]["median_s"]),
        "labels equal": (100 * record("2026-11-28_agreement.json")["least_agreement"],),
    }
    for start, values in expected.items():
        (shown,) = [value for what, value in deploy.items() if what.startswith(start)]
        is_shown(shown, *values)
    times = re.search(r"one unmirrored fold the student is (\d+) times", text)
    assert times is not None
    is_shown(times[1], bf16["times_faster_than_single_fold"])


def test_speed_as_measured() -> None:
    text = (ROOT / "docs" / "measured.md").read_text()
    arms = record("2026-11-28_hippocampus_benchmark.json")["arms"]
    names = ("nnunetv2 ensemble", "nnunetv2 one fold", "hippocampus_r4 openvino", "hippocampus_r4 openvino bf16")
    common = arms[names[0]]["per_case_s"].keys()
    rows = {what: cells for what, *cells in tables(section(text, "Hippocampus, image file to label file"))[0]}
    for column, arm in enumerate(arms[name] for name in names):
        scale = 1e3 if column else 1  # students and the single fold: milliseconds
        seconds = median(arm["per_case_s"][case] for case in common)
        is_shown(rows["median of the 3 cases that all predicted"][column], scale * seconds)
        if arm["kind"] == "bundle":
            is_shown(rows["median of 20 cases"][column], 1e3 * arm["median_s"])
        is_shown(rows["times faster than the ensemble, same cases"][column], arm["times_faster_than_ensemble"])
        is_shown(rows["times faster than one fold, same cases"][column], arm["times_faster_than_single_fold"])
        is_shown(rows["cold, process start to file written"][column], arm["cold"]["median_s"])
        is_shown(rows["peak memory of the process"][column], arm["peak_memory_bytes"] / 1e6)
        is_shown(rows["Dice of these 3 cases"][column], arm["dice_on_common_cases"])
        is_shown(rows["model file"][column], arm["size_bytes"] / 1e6)

    ct = record("2026-11-28_large_volume.json")
    _, ensemble, fold, *students = tables(section(text, "A large CT"))[0]
    assert round(ct["nnunetv2"]["ensemble_s"], -2) == float(ensemble[1].split()[0].replace(",", ""))
    is_shown(fold[1], ct["nnunetv2"]["single_fold_s"])
    is_shown(fold[3], ct["nnunetv2"]["ensemble_s"] / ct["nnunetv2"]["single_fold_s"])
    for row, precision in zip(students, ("fp32", "bf16"), strict=True):
        of = ct["fastnnunet"][f"openvino {precision}"]
        is_shown(row[1], of["seconds"])
        is_shown(row[2], of["times_faster_than_single_fold"])
        is_shown(row[3], of["times_faster_than_ensemble"])
        is_shown(row[4], 100 * of["agreement_with_nnunetv2"])


def test_students_as_measured() -> None:
    measured = record("2026-12-01_student_table.json")["table"]
    losses = {
        "no soft labels": "none",
        "the default: half soft, KL and Dice semimetric at every resolution, T = 1": DEFAULT,
        "the default, `--anneal`": f"{EVERY} annealed not mirrored",
        "the default, `policy: out_of_fold`": f"{EVERY} not mirrored out of fold",
        "KL": "kl",
        "KL, `--anneal`": "kl annealed",
        "KL, T = 1, `--anneal`": "kl T=1 annealed",
        "KL, `--anneal`, 4000 steps": "kl annealed",
    }
    rows = tables(section((ROOT / "docs" / "measured.md").read_text(), "Families, sizes and losses"))[0]
    seen = set()
    for what, *cells in rows[1:-2]:
        family, loss = what.split(", ", 1)
        steps = 4000 if "4000" in loss else 2000
        for r, cell in zip((2, 4, 6), cells, strict=True):
            if cell:
                key = f"r{r}_{family} {losses[loss]} 5 fold(s) from teacher, {steps} x 2"
                of, dice = measured[key], cell.split(" (")[0]
                seen.add(key)
                is_shown(dice, *((of["mean_dice"], of["stdev"]) if len(of["seeds"]) > 1 else (of["mean_dice"],)))
                assert ("seed" in cell) == (len(of["seeds"]) < 3)
    assert seen == {key for key in measured if key.endswith(("2000 x 2", "4000 x 2"))}
    for r, ms, parameters in zip((2, 4, 6), rows[-2][1:], rows[-1][1:], strict=True):
        lite, width = (measured[f"r{r}_{family} kl 5 fold(s) from teacher, 2000 x 2"] for family in ("lite", "width"))
        is_shown(ms, lite["ms_per_patch"]["bf16"], width["ms_per_patch"]["bf16"])
        is_shown(parameters, lite["parameters"] / 1e6, width["parameters"] / 1e6)


def test_recipes_and_precisions_as_measured() -> None:
    text = (ROOT / "docs" / "measured.md").read_text()
    caches = record("2026-11-24_cache_recipes.json")["caches"]
    for row in tables(section(text, "The cache"))[0][1:]:
        recipe = re.search(r"`(\w+)\.yaml`", row[0])
        assert recipe is not None
        asked = yaml.safe_load((ROOT / "cache_specs" / f"{recipe[1]}.yaml").read_text())
        (cache,) = [
            c
            for c in caches
            if c["soft_labels"]["encoding"] == asked["encoding"]
            and c["soft_labels"].get("levels", 255) == asked.get("levels", 255)
        ]
        is_shown(row[1], cache["bytes_per_voxel"])
        is_shown(row[2], cache["max_error"])
        is_shown(row[3], cache["eps"])

    bundles = record("2026-11-24_precisions.json")["bundles"]
    for what, *cells in tables(section(text, "bf16 and int8"))[0][1:-1]:
        backend, precision = what.replace("ONNX Runtime", "onnxruntime").replace("OpenVINO", "openvino").split()
        for cell, bundle in zip(cells, bundles, strict=True):
            of = [c for c in bundle["comparisons"] if c["backend"] == backend]
            dice = {c["precision"]: c["dice"] for c in of} | {"fp32": of[0]["dice_fp32"]}
            is_shown(cell.replace(", ", " "), dice[precision], bundle["cpu_ms_per_patch"][f"{precision} {backend}"])


# the pages and the files beside them


def test_every_command_has_a_page_in_the_menu() -> None:
    pages = reference().pages()
    menu = (ROOT / "docs" / "mkdocs.yml").read_text()
    assert {name for name in pages if f"{name}\n" not in menu} == set()
    for words, leaf in leaves():
        page = pages[f"reference/{words[0]}.md"]
        for parameter in leaf.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert all(f"`{name}`" in page for name in parameter.opts), parameter.name
    for name in nnunet_style():
        assert f"## {name}\n" in pages["reference/nnunet_style.md"]


def test_the_documentation_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the tools of the documentation are not installed: make docs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(tmp_path / "site")]
    done = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "site" / "index.html").read_text()
    assert "records/2026-11-28_hippocampus_benchmark.png" in front
    assert "predict_single_npy_array" in (tmp_path / "site" / "reference" / "api.html").read_text()


def test_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (project["version"], project["license"]["text"])
    assert citation["references"][0]["doi"] == "10.1038/s41592-020-01008-z"  # nnU-Net


def test_hooks_before_a_commit_need_no_network() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    for hook in repos[0]["hooks"]:
        assert hook["language"] == "system"
        assert f"$(BIN)/{hook['entry']}" in lint
