"""`cache gc`: what is left behind goes, what is valid, alive or somebody else's stays."""

import os
import shutil
import time

import pytest

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.gc import STALE_S, collect_garbage
from fastnnunet.cache.store.writer import PARTIAL, _partial_folder
from fastnnunet.cli.main import main
from tests.cache_fakes import digests, make_job


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def cache(root):
    return build_cache(make_job(root))


def age(path):
    """Make everything in `path` old."""
    then = time.time() - STALE_S - 60
    for p in (*path.rglob("*"), path):
        os.utime(p, (then, then))


def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def leave_everything(root, cache):
    """One leftover of each kind; returns their paths."""
    partial = root / PARTIAL / f"{cache.path.name}.small.1.abc"
    shutil.copytree(cache.case_dir("small"), partial)
    replaced = partial.with_name(partial.name + "-replaced")
    shutil.copytree(cache.case_dir("flat"), replaced)
    (cache.case_dir("flat") / "manifest.json").unlink()
    temporary = cache.path / ".zarr.json.0123456789ab"
    temporary.write_bytes(b"12345")
    empty = root / ("0" * 16)
    empty.mkdir()
    age(root)
    return [partial, replaced, temporary, empty, cache.case_dir("flat")]


def test_a_clean_root_stays_as_it_is(root, cache):
    age(root)
    before = files(root)
    assert collect_garbage(root) == collect_garbage(root, damaged=True) == []
    assert files(root) == before


def test_every_kind_of_leftover_goes_and_the_rest_stays(root, cache):
    before = digests(cache)
    others = [root / "notes", root / PARTIAL / "notes", cache.path / "notes"]
    for folder in others:
        folder.mkdir()
        (folder / "a").write_text("mine")
    left = leave_everything(root, cache)
    sizes = {
        p: p.stat().st_size if p.is_file() else sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in left
    }
    everything = files(root)
    planned = collect_garbage(root, dry_run=True)
    assert files(root) == everything
    assert {leftover.path: leftover.size_bytes for leftover in planned} == sizes
    assert collect_garbage(root) == planned
    assert not any(p.exists() for p in left)
    assert not [p for p in (root / PARTIAL).iterdir() if p.name != "notes"]
    assert all((folder / "a").read_text() == "mine" for folder in others)
    assert cache.missing_cases() == ["flat"]
    assert collect_garbage(root) == []
    assert digests(build_cache(make_job(root))) == before


def test_what_changed_a_moment_ago_and_has_no_lock_stays(root, cache):
    (cache.case_dir("flat") / "manifest.json").unlink()  # such as a copy that is under way
    (cache.path / ".zarr.json.0123456789ab").touch()
    (root / ("0" * 16)).mkdir()
    before = files(root)
    assert collect_garbage(root) == []
    assert files(root) == before


def test_a_living_builder_keeps_its_folder(root, cache):
    with _partial_folder(cache, "large") as living:
        (living / "shard").write_bytes(b"123")
        age(living)
        assert collect_garbage(root, damaged=True) == []
        assert (living / "shard").read_bytes() == b"123"


def test_a_builder_whose_folder_is_taken_before_the_lock_takes_another(root, cache, monkeypatch):
    from fastnnunet.cache.store import writer as store

    locked, taken = store.locked, []

    def too_late(folder):
        if not taken:
            taken.append(folder)
            collect_garbage(root)
        return locked(folder)

    monkeypatch.setattr(store, "locked", too_late)
    with _partial_folder(cache, "large") as folder:
        assert folder.is_dir()
        assert folder != taken[0]
        assert not taken[0].exists()


def test_damaged_cases_go_only_when_asked_for(root, cache):
    before = digests(cache)
    shard = cache.case_dir("large") / "c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (cache.case_dir("small") / "manifest.json").write_text("{")
    age(root)
    assert collect_garbage(root) == []
    removed = collect_garbage(root, damaged=True)
    assert {leftover.path.name for leftover in removed} == {"large", "small"}
    assert all(leftover.reason.startswith("damaged: ") for leftover in removed)
    assert cache.missing_cases() == ["large", "small"]
    assert digests(build_cache(make_job(root))) == before


def test_a_case_replaced_in_the_meantime_stays(root, cache, tmp_path, monkeypatch):
    """A builder puts a good case in place between the check and the removal."""
    good = tmp_path / "good"
    shutil.copytree(cache.case_dir("small"), good)
    shard = cache.case_dir("small") / "c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    original = type(cache).problem
    calls = []

    def problem(self, case_id, *, deep=False):
        answer = original(self, case_id, deep=deep)
        calls.append(case_id)
        if calls.count("small") == 2:  # the check under the lock
            shutil.rmtree(self.case_dir("small"))
            good.rename(self.case_dir("small"))
        return answer

    monkeypatch.setattr(type(cache), "problem", problem)
    assert collect_garbage(root, damaged=True) == []
    monkeypatch.undo()
    assert cache.missing_cases() == []


def test_a_damaged_cache_is_left_alone(root, cache):
    (cache.path / "zarr.json").write_text("{")
    age(root)
    before = files(root)
    assert collect_garbage(root, damaged=True) == []
    assert files(root) == before


def test_command(root, cache, capsys):
    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main(["cache", "gc", "--root", str(root), *args])
        return stop.value.code or 0, capsys.readouterr().out

    assert run() == (0, "nothing to remove\n")
    left = leave_everything(root, cache)
    code, text = run("--dry-run")
    assert code == 0
    assert "would remove 5 leftover(s)" in text
    assert all(p.exists() for p in left)
    code, text = run()
    assert code == 0
    assert f"removed {left[2]} (5 B): unfinished metadata" in text
    assert "removed 5 leftover(s), " in text
    assert not any(p.exists() for p in left)
