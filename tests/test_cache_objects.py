"""Caches on object stores: the bytes of a local build, the manifest as commit point, one message for what fails."""

import hashlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import zarr

from fastnnunet.cache import gc_objects
from fastnnunet.cache.build import build_cache
from fastnnunet.cache.find import find_cache
from fastnnunet.cache.gc import collect_garbage
from fastnnunet.cache.gc_objects import STALE_OBJECTS_S
from fastnnunet.cache.store import writer as store
from fastnnunet.cache.store.folder import open_cache
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.storage import ObjectPath, place_at
from fastnnunet.cache.verify import verify_cache
from fastnnunet.cli.main import main
from fastnnunet.errors import BuildError, CorruptError, DiskSpaceError, NotFoundError, SpecError, StorageError
from fastnnunet.specs.cache import CacheSpec
from tests.cache_fakes import SHAPES, FakeCases, FakeFactory, digests, make_job
from tests.objects import access_refused, forget_clients, new_bucket, s3_server
from tests.test_cache_build import start_build


@pytest.fixture(scope="module")
def s3():
    with s3_server() as client:
        yield client


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where this machine keeps what belongs to remote caches."""
    folder = tmp_path / "home"
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def memory_root():
    return place_at(f"memory://test-{time.perf_counter_ns()}/caches")


@pytest.fixture
def s3_root(s3):
    return place_at(f"s3://{new_bucket(s3)}/some/caches")


@pytest.fixture(params=["memory", "s3"])
def root(request):
    return request.getfixturevalue(f"{request.param}_root")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same cache on disk, built by one process."""
    return build_cache(make_job(tmp_path_factory.mktemp("local")))


def contents(place):
    """Every object below a place and its digest."""
    return {str(o)[len(str(place)) :]: o.sha256() for o in place.objects()}


def flip_a_bit(place):
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.put(bytes(data))


class TestPlaces:
    def test_names(self):
        place = place_at("s3://bucket/a/b/")
        assert (str(place), place.name, str(place / "c/d")) == ("s3://bucket/a/b", "b", "s3://bucket/a/b/c/d")
        assert [str(p) for p in place.parents] == ["s3://bucket/a", "s3://bucket"]
        assert place.parents[-1].parent == place.parents[-1]

    @pytest.mark.parametrize(("text", "path"), [("a/b", "a/b"), ("file:///a/b", "/a/b"), (Path("x"), "x")])
    def test_folders_are_paths(self, text, path):
        assert place_at(text) == Path(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("nonsense://bucket/a", "(?s)unknown kind of place nonsense://.*expected a folder, or a URL"),
            ("s3://", "names no bucket"),
            ("sftp://me:secret@host/a", "(?s)password does not belong.*environment"),
        ],
    )
    def test_bad_urls(self, text, message):
        with pytest.raises(SpecError, match=message) as error:
            place_at(text)
        assert "secret" not in str(error.value)

    def test_operations(self, root):
        assert not root.exists()
        assert not root.is_dir()
        assert root.names() == root.objects() == []
        (root / "a/b").put(b"12345")
        (root / "c").put(b"1")
        assert root.is_dir()
        assert (root / "c").exists()
        assert not (root / "d").exists()
        assert root.names() == ["a", "c"]
        assert root.objects() == [root / "a/b", root / "c"]
        assert (root / "a/b").size_bytes() == 5
        assert (root / "a/b").sha256() == hashlib.sha256(b"12345").hexdigest()
        assert abs(datetime.now(UTC) - (root / "c").modified()) < timedelta(minutes=5)
        (root / "c").delete()
        (root / "c").delete()
        assert root.names() == ["a"]
        for missing in (lambda p: p.read_bytes(), lambda p: p.size_bytes(), lambda p: p.sha256()):
            with pytest.raises(FileNotFoundError):
                missing(root / "c")


class TestBuild:
    def test_the_same_bytes_as_on_disk(self, root, local, home):
        job = make_job(root)
        cache = build_cache(job, only=["flat"])
        assert cache.missing_cases() == ["large", "small"]
        rebuilt = []
        build_cache(job, progress=lambda event: rebuilt.append(event.case_id))
        assert rebuilt == ["large", "small"]
        assert digests(cache) == digests(local)
        for case in SHAPES:
            for name in ("zarr.json", "c/0/0/0/0"):
                assert (cache.case_dir(case) / name).read_bytes() == (local.path / case / name).read_bytes()
        assert {(r.case_id, r.status) for r in verify_cache(cache)} == {(case, "ok") for case in SHAPES}
        assert list((home / ".partial").iterdir()) == []
        assert not (home / "shards").exists()  # verify keeps nothing
        assert not (root / ".partial").is_dir()
        assert find_cache(root, job.identity, build_command="BUILD") == cache.path
        assert build_cache(job, progress=lambda event: pytest.fail("built again")) == cache

    def test_zarr_python_reads_it_over_s3(self, s3_root, local):
        cache = build_cache(make_job(s3_root))
        array = zarr.open_array(f"{cache.path}/large", mode="r")
        np.testing.assert_array_equal(array[...], zarr.open_array(str(local.path / "large"), mode="r")[...])

    def test_the_manifest_is_put_last(self, memory_root, monkeypatch):
        """Cut off after every write in turn: until the last of a case it does not exist, and a rerun completes it."""
        put, upload, writes = ObjectPath.put, ObjectPath.upload, []

        def cut_off(self, limit):
            writes.append(str(self)[len(str(memory_root)) :])
            if len(writes) > limit:
                raise StorageError("the connection is lost")

        for limit in range(20):
            writes.clear()
            job = make_job(memory_root / str(limit))
            with monkeypatch.context() as patch:
                patch.setattr(ObjectPath, "put", lambda s, d, n=limit: (cut_off(s, n), put(s, d)))
                patch.setattr(ObjectPath, "upload", lambda s, f, n=limit: (cut_off(s, n), upload(s, f)))
                try:
                    build_cache(job, only=["flat"])
                except StorageError as e:
                    assert "connection is lost" in str(e)  # noqa: PT017
                else:
                    break
            if (cache := job.open()) is not None:
                assert cache.missing_cases() == sorted(SHAPES)
            assert build_cache(job, only=["flat"]).problem("flat", deep=True) is None
        names = [name.split("/", 3)[-1] for name in writes]
        assert names == ["probe", "zarr.json", "flat/c/0/0/0/0", "flat/zarr.json", "flat/manifest.json"]
        assert limit == len(names)

    def test_what_arrives_changed_is_not_committed(self, memory_root, monkeypatch):
        upload = ObjectPath.upload

        def damaging(self, file):
            upload(self, file)
            flip_a_bit(self)

        monkeypatch.setattr(ObjectPath, "upload", damaging)
        with pytest.raises(BuildError, match=r"(?s)reads back other bytes.*got.*expected"):
            build_cache(make_job(memory_root), only=["flat"])
        monkeypatch.undo()
        assert make_job(memory_root).open().missing_cases() == sorted(SHAPES)

    def test_two_builders_at_once(self, root, local):
        jobs = [make_job(root, factory=FakeFactory(delay_s=0.05)) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            caches = list(pool.map(build_cache, jobs))
        assert [digests(cache) for cache in caches] == [digests(local)] * 2
        assert {r.status for r in verify_cache(caches[0])} == {"ok"}

    def test_an_object_is_never_seen_half_written(self, memory_root, tmp_path):
        shard, new = memory_root / "shard", tmp_path / "shard"
        new.write_bytes(bytes(1 << 20))
        shard.put(b"old")
        with ThreadPoolExecutor(1) as pool:
            uploads = pool.submit(lambda: [shard.upload(new) for _ in range(200)])
            seen = set()
            while not uploads.done():
                seen.add(shard.size_bytes())
            uploads.result()
        assert seen <= {3, 1 << 20}

    def test_damage_is_found_and_mended(self, root, local):
        cache = build_cache(make_job(root))
        flip_a_bit(cache.case_dir("large") / "c/0/0/0/0")
        flip_a_bit(cache.case_dir("small") / "manifest.json")
        (cache.case_dir("flat") / "c/0/0/0/0").delete()
        assert {r.status for r in verify_cache(cache)} == {"damaged"}
        assert cache.missing_cases() == ["flat", "small"]
        with pytest.raises(CorruptError, match=r"(?s)large.*got sha256.*--case large"):
            SoftLabelReader(cache.path).read_case("large")
        build_cache(make_job(root), only=list(SHAPES))
        assert {r.status for r in verify_cache(cache)} == {"ok"}
        assert digests(cache) == digests(local)

    def test_room_on_this_machine(self, memory_root, monkeypatch, home):
        monkeypatch.setattr("fastnnunet.cache.plan.free_bytes", lambda folder: 1000 if folder == home else 1 << 40)
        with pytest.raises(DiskSpaceError, match=r"(?s)not enough disk space.*FASTNNUNET_CACHE_HOME"):
            build_cache(make_job(memory_root))
        assert not memory_root.is_dir()

    def test_memory_is_not_shared_with_workers(self, memory_root):
        for where in ({"workers": 1}, {"scheduler": "tcp://127.0.0.1:1"}):
            with pytest.raises(SpecError, match=r"(?s)memory of this process.*--workers 0"):
                build_cache(make_job(memory_root), **where)
        assert not memory_root.is_dir()

    @pytest.mark.timeout(300)
    def test_two_dask_workers(self, s3_root, local):
        cache = build_cache(make_job(s3_root), workers=2)
        assert digests(cache) == digests(local)
        assert {r.status for r in verify_cache(cache)} == {"ok"}

    @pytest.mark.timeout(300)
    def test_sigkill_at_any_moment(self, tmp_path, s3_root, home, local):
        job = make_job(s3_root, factory=FakeFactory(delay_s=0.05))
        for attempt in range(6):
            process = start_build(tmp_path, job)
            time.sleep(0.1 + 0.25 * attempt)
            process.kill()
            process.communicate()
            if (cache := job.open()) is not None:
                stored = [case for case in cache.cases if (cache.case_dir(case) / "manifest.json").exists()]
                assert not {case: problem for case in stored if (problem := cache.problem(case, deep=True))}
        cache = build_cache(job)
        assert digests(cache) == digests(local)
        assert {r.status for r in verify_cache(cache)} == {"ok"}
        assert list((home / ".partial").iterdir()) == []


def read_in_another_process(reader):
    return os.getpid(), reader.read_case("large")


class TestReader:
    def test_a_shard_is_fetched_once(self, root, local, home, monkeypatch):
        cache = build_cache(make_job(root))
        fetched, download = [], ObjectPath.download
        monkeypatch.setattr(ObjectPath, "download", lambda self, file: (fetched.append(self.url), download(self, file)))
        expected = SoftLabelReader(local.path).read_case("large")
        for _ in range(2):
            np.testing.assert_array_equal(SoftLabelReader(cache.path).read_case("large"), expected)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: SoftLabelReader(str(cache.path)).read_case("small"), range(4)):
                np.testing.assert_array_equal(got, SoftLabelReader(local.path).read_case("small"))
        assert sorted(fetched) == [f"{cache.path}/{case}/c/0/0/0/0" for case in ("large", "small")]
        kept = {p.name for p in (home / "shards").iterdir() if not p.name.startswith(".lock")}
        assert kept == {cache.manifest(case).shard_sha256 for case in ("large", "small")}

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_loader_workers(self, s3_root, local, home, method):
        cache = build_cache(make_job(s3_root))
        reader = SoftLabelReader(cache.path)
        reader.read_case("flat")  # a client is connected before the fork
        expected = SoftLabelReader(local.path).read_case("large")
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
            for process, got in pool.map(read_in_another_process, [reader] * 4):
                assert process != os.getpid()
                np.testing.assert_array_equal(got, expected)
        assert (home / "shards" / cache.manifest("large").shard_sha256).is_file()

    def test_a_damaged_local_copy(self, memory_root, home):
        cache = build_cache(make_job(memory_root))
        expected = SoftLabelReader(cache.path).read_case("large")
        copy = home / "shards" / cache.manifest("large").shard_sha256
        data = bytearray(copy.read_bytes())
        data[100] ^= 1
        copy.write_bytes(data)
        reader = SoftLabelReader(cache.path)
        with pytest.raises(CorruptError, match=r"(?s)large.*local copy .* was damaged; it was removed"):
            reader.read_case("large")
        np.testing.assert_array_equal(reader.read_case("large"), expected)
        copy.write_bytes(data[:-1])  # cut short: noticed before it is used
        np.testing.assert_array_equal(SoftLabelReader(cache.path).read_case("large"), expected)

    def test_a_home_that_cannot_be_written(self, memory_root, home, monkeypatch):
        cache = build_cache(make_job(memory_root))
        (home / "file").touch()
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(home / "file"))
        with pytest.raises(BuildError, match=r"(?s)cannot write .*FASTNNUNET_CACHE_HOME"):
            SoftLabelReader(cache.path).read_case("large")

    def test_missing_cases(self, root):
        cache = build_cache(make_job(root), only=["flat"])
        with pytest.raises(NotFoundError, match=r"(?s)case small is not built.*--case small"):
            SoftLabelReader(cache.path).read_case("small")
        with pytest.raises(NotFoundError, match=r"zarr\.json is missing"):
            SoftLabelReader(root / "nothing")


class TestGarbage:
    @pytest.fixture
    def later(self, monkeypatch):
        """A day and an hour have passed."""

        class Clock:
            @staticmethod
            def now(zone):
                return datetime.now(zone) + timedelta(seconds=STALE_OBJECTS_S + 3600)

        return lambda: monkeypatch.setattr(gc_objects, "datetime", Clock)

    def test_only_old_unfinished_cases_go(self, root, later, local):
        cache = build_cache(make_job(root))
        (cache.case_dir("flat") / "manifest.json").delete()
        (cache.path / "notes/mine").put(b"mine")
        (root / "other").put(b"mine")
        before = contents(root)
        assert collect_garbage(root) == []  # a builder may be at it
        later()
        size = sum((local.path / "flat" / name).stat().st_size for name in ("zarr.json", "c/0/0/0/0"))
        planned = collect_garbage(root, dry_run=True)
        assert [(x.path, x.size_bytes) for x in planned] == [(cache.case_dir("flat"), size)]
        assert "no manifest.json" in planned[0].reason
        assert contents(root) == before
        assert collect_garbage(root) == planned
        assert contents(root) == {name: digest for name, digest in before.items() if "/flat/" not in name}
        assert collect_garbage(root) == []
        assert digests(build_cache(make_job(root))) == digests(local)

    def test_a_probe_whose_builder_died(self, memory_root, later):
        (memory_root / ".partial/probe").put(b"")
        assert collect_garbage(memory_root) == []
        later()
        assert [str(x.path) for x in collect_garbage(memory_root)] == [f"{memory_root}/.partial/probe"]
        assert not memory_root.is_dir()

    def test_damaged_cases_go_only_when_asked_for(self, memory_root, later):
        cache = build_cache(make_job(memory_root))
        flip_a_bit(cache.case_dir("large") / "c/0/0/0/0")
        assert collect_garbage(memory_root, damaged=True) == []
        later()
        assert collect_garbage(memory_root) == []
        assert [x.path.name for x in collect_garbage(memory_root, damaged=True)] == ["large"]
        assert cache.missing_cases() == ["large"]

    def test_a_case_renewed_in_the_meantime_stays(self, memory_root, later, monkeypatch):
        cache = build_cache(make_job(memory_root))
        (cache.case_dir("flat") / "manifest.json").delete()
        later()
        judged, are_stale = [], gc_objects._are_stale
        monkeypatch.setattr(gc_objects, "_are_stale", lambda o: are_stale(o) and not judged and not judged.append(o))
        before = contents(memory_root)
        assert collect_garbage(memory_root) == []
        assert contents(memory_root) == before

    def test_unfinished_cases_on_this_machine(self, memory_root, home):
        cache = build_cache(make_job(memory_root))
        dead = home / ".partial" / f"{cache.path.name}.small.1.abc"
        dead.mkdir()
        with store._partial_folder(cache, "large") as living:
            assert [x.path for x in collect_garbage(memory_root)] == [dead]
            assert living.is_dir()
        assert not dead.exists()


@pytest.fixture
def monkeypatch(monkeypatch):
    """What a test changed of the environment or of s3fs is forgotten with it."""
    yield monkeypatch
    monkeypatch.undo()
    forget_clients()


@pytest.fixture
def cli(capsys):
    """Runs the command; returns (exit code, what it printed)."""

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main(["cache", *map(str, args)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return stop.value.code or 0, captured.out + captured.err

    return run


class TestCommands:
    def test_list_info_verify_diff_gc(self, root, cli):
        cache = build_cache(make_job(root))
        other = make_job(root, spec=CacheSpec(temperature=2.0, level=3)).create({})
        code, text = cli("list", "--root", root)
        assert code == 0
        assert f"{root}:" in text
        assert cache.path.name in text
        assert "3/3" in text
        code, text = cli("info", cache.path)
        assert code == 0
        assert f"folder:       {cache.path}" in text
        code, text = cli("verify", cache.path.name[:8], "--root", root)
        assert (code, text) == (0, "3 cases ok, 0 damaged, 0 missing\n")
        code, text = cli("diff", cache.path, other.path)
        assert code == 1
        assert "soft_labels.temperature: 1.0 -> 2.0" in text
        assert cli("gc", "--root", root) == (0, "nothing to remove\n")

    @pytest.mark.parametrize("command", ["list", "info", "verify", "gc"])
    def test_wrong_bucket(self, s3, cli, command):
        code, text = cli(command, "--root", "s3://no-such-bucket/caches")
        assert code == 2
        assert text.startswith("error: --root s3://no-such-bucket/caches: nothing is stored there, or there is no such")

    @pytest.mark.parametrize(
        ("root", "message"),
        [
            ("nonsense://bucket/x", "unknown kind of place nonsense://"),
            ("s3://", "s3:// names no bucket"),
            ("s3://no-such-bucket/caches", "cannot write s3://no-such-bucket/caches/.partial/probe"),
        ],
    )
    def test_build_says_so_before_the_teacher_is_loaded(self, s3, world, cli, monkeypatch, root, message):
        from fastnnunet.teachers.nnunet import NnUNetTeacher

        monkeypatch.setattr(NnUNetTeacher, "load", lambda *_: pytest.fail("the teacher was loaded"))
        code, text = cli("build", "-d", "998", "-f", "0", "1", "--workers", "0", "--root", root)
        assert code == 2
        assert f"error: {message}" in text
        assert "expected" in text

    def test_missing_package(self, s3_root, cli, monkeypatch):
        import importlib

        registry = importlib.import_module("fsspec.registry")  # the package has a variable of this name
        forget_clients()
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(registry._registry, "s3")
        code, text = cli("list", "--root", s3_root)
        assert code == 2
        assert "s3:// needs the package s3fs" in text
        assert "pip install 'fastnnunet[s3]'" in text

    def test_lost_connection(self, s3_root, cli, monkeypatch):
        build_cache(make_job(s3_root))
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        forget_clients()
        code, text = cli("verify", "--root", s3_root)
        assert code == 2
        assert "error: cannot list s3://" in text
        assert "Could not connect to the endpoint" in text

    @pytest.mark.parametrize("command", ["list", "verify", "gc"])
    def test_no_permission(self, s3_root, cli, command):
        build_cache(make_job(s3_root))
        with access_refused():
            code, text = cli(command, "--root", s3_root)
            assert code == 2
            assert f"error: cannot list {s3_root} (PermissionError: " in text
            assert "permission to list, read, write and delete" in text
            with pytest.raises(StorageError, match=r"cannot read .*PermissionError"):
                SoftLabelReader(s3_root / make_job(s3_root).path.name)
            with pytest.raises(StorageError, match="PermissionError"):
                build_cache(make_job(s3_root, FakeCases(seed=1)))
        assert {r.status for r in verify_cache(make_job(s3_root).open())} == {"ok"}

    def test_train_and_build(self, s3, world, cli, s3_root, capsys):
        """From nnU-Net's cases to a student with nothing of the cache on this machine but fetched shards."""
        base = ["-d", "998", "-c", "3d_fullres"]
        code, text = cli("build", *base, "-f", "0", "1", "--workers", "0", "--root", s3_root)
        assert code == 0, text
        code, text = cli("plan", *base, "-f", "0", "1", "--no-time", "--root", s3_root)
        assert code == 0
        assert "object store" in text
        assert (
            f"cache build -d 998 -c 3d_fullres -f 0 1 --root {s3_root}" in open_cache(only_cache(s3_root)).build_command
        )
        short = ["-e", "1", "--iterations", "1", "--val-iterations", "1", "-device", "cpu", "--no-validate"]
        args = ["train", *base, "-f", "0", "-r", "2", "-tf", "0", "-tf", "1", *short]
        with pytest.raises(SystemExit) as stop:
            main([*args, "--root", str(s3_root)])
        assert not stop.value.code, capsys.readouterr().err


def only_cache(root):
    (name,) = root.names()
    return root / name
