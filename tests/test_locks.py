"""File systems without `flock` (NFS, Lustre, some FUSE and SMB mounts): what is safe goes on, with one warning."""

import errno
import fcntl
import logging
import os
import shutil
import time

import pytest

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.gc import collect_garbage
from fastnnunet.cache.store.durable import fsync_file
from fastnnunet.cache.store.fetch import _alone
from fastnnunet.cache.store.writer import ABANDONED_S, PARTIAL, remove_leftovers
from fastnnunet.system import locks
from fastnnunet.system.locks import has_locks, locked
from tests.cache_fakes import digests, make_job
from tests.test_unlabelled_images import build_unlabelled, image_folder

NO_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]  # NFS without lockd; Lustre, FUSE; SMB and others


@pytest.fixture(params=NO_LOCKS)
def no_locks(request, monkeypatch):
    """As on such a file system; the number of times somebody asked for a lock."""
    asked = []

    def flock(descriptor, operation):
        asked.append(operation)
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_warned", False)
    return asked


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "no file locks" in record.getMessage()]


def test_a_cache_is_built_as_elsewhere(tmp_path, no_locks, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        cache = build_cache(make_job(tmp_path / "without"))
    assert no_locks
    assert len(warnings_of(caplog)) == 1
    monkeypatch.undo()
    assert digests(cache) == digests(build_cache(make_job(tmp_path / "with")))
    assert not list((tmp_path / "without" / PARTIAL).iterdir())


def age(path, seconds):
    then = time.time() - seconds
    for p in (*path.rglob("*"), path):
        os.utime(p, (then, then))


def test_what_may_be_somebodys_work_stays(tmp_path, no_locks):
    """Nobody can tell there whether a builder lives: only what has not changed for a day is left behind."""
    root = tmp_path / "root"
    cache = build_cache(make_job(root))
    young, old = (root / PARTIAL / f"{cache.path.name}.small.1.{name}" for name in ("young", "old"))
    for folder, seconds in ((young, ABANDONED_S - 3600), (old, ABANDONED_S + 3600)):
        shutil.copytree(cache.case_dir("small"), folder)
        age(folder, seconds)
    assert [leftover.path for leftover in collect_garbage(root, dry_run=True)] == [old]
    assert remove_leftovers(cache) == [old.name]
    assert collect_garbage(root) == []
    assert young.is_dir()
    assert not old.exists()


def test_damaged_cases_are_removed(tmp_path, no_locks):
    root = tmp_path / "root"
    cache = build_cache(make_job(root))
    shard = cache.case_dir("small") / "c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[::-1])
    assert [leftover.path for leftover in collect_garbage(root, damaged=True)] == [cache.case_dir("small")]
    assert cache.missing_cases() == ["small"]


def test_shards_are_fetched(tmp_path, no_locks):
    from types import SimpleNamespace

    done = []
    with _alone(tmp_path, SimpleNamespace(shard_sha256="ab12")):
        done.append("fetched")
    assert done == ["fetched"]
    assert len(no_locks) == 1


def test_unlabelled_images_are_preprocessed(world, no_locks, caplog):
    with caplog.at_level(logging.WARNING):
        build_unlabelled(image_folder(world, "tiny_01"))
    assert len(warnings_of(caplog)) == 1


def test_other_errors_are_not_taken_for_it(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass


def test_with_locks(tmp_path):
    """The oracle is `flock` itself, through a descriptor of its own."""
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, file):
        assert has_locks(path)
        with locked(path) as held:
            assert held
            with pytest.raises(BlockingIOError), locked(path):
                pass
            assert has_locks(path)
            descriptor = os.open(path, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    with pytest.raises(FileNotFoundError), locked(tmp_path / "gone"):
        pass


def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch):
    """Some network file systems refuse fsync of folders; of files it must not fail."""

    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    fsync_file(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        fsync_file(tmp_path / "file")
