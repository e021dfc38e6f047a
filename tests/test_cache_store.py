"""The store: any Zarr v3 reader opens it, equal voxels give equal bytes, and a case is there whole or not at all."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorstore
import zarr

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.codecs import SimplexU8, encode_block
from fastnnunet.cache.find import find_cache
from fastnnunet.cache.store import writer as store
from fastnnunet.cache.store.folder import create_cache, open_cache
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.shard import ShardWriter, array_document, layout_for, layout_of_document
from fastnnunet.cache.verify import verify_cache
from fastnnunet.errors import BuildError, CorruptError, DiskSpaceError, MismatchError, NotFoundError, SpecError
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import sha256_of
from tests.cache_fakes import COMMAND, SHAPES, FakeCases, FakeFactory, digests, make_job


@pytest.fixture
def cache(tmp_path):
    return build_cache(make_job(tmp_path / "root"))


def expected_values(case_id, spec=None):
    """The stored values by way of the codec alone."""
    factory = FakeFactory()
    logits = factory.load(1).logits(FakeCases().image_CZYX(case_id), factory.folds)
    return encode_block(SimplexU8(3), logits, (spec or CacheSpec()).temperature)[0]


@pytest.mark.parametrize("compressor", ["zstd", "lz4"])
@pytest.mark.parametrize("chunk", [(32, 32, 32), (8, 8, 8), (5, 64, 7)])
def test_zarr_python_reads_the_same_values(tmp_path, compressor, chunk):
    spec = CacheSpec(compressor=compressor, chunk_zyx=chunk, level=3)
    cache = build_cache(make_job(tmp_path / "root", spec=spec))
    group = zarr.open_group(str(cache.path), mode="r")
    assert set(group.array_keys()) == set(SHAPES)
    reader = SoftLabelReader(cache.path)
    for case in SHAPES:
        values = group[case][...]
        np.testing.assert_array_equal(values, expected_values(case))
        np.testing.assert_array_equal(reader.read_case(case), values)
        assert group[case].metadata.dimension_names == ("channel", "z", "y", "x")
        assert group[case].attrs["fastnnunet"]["key"] == cache.key
    assert group.attrs["fastnnunet"]["identity"]["soft_labels"]["temperature"] == 1.0


def test_tensorstore_reads_the_same_values(cache):
    for case in SHAPES:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache.case_dir(case))}}
        array = tensorstore.open(spec, open=True).result()
        np.testing.assert_array_equal(array.read().result(), expected_values(case))


def test_empty_chunks_are_absent_and_one_shard_a_case(tmp_path):
    cache = build_cache(make_job(tmp_path / "root", spec=CacheSpec(chunk_zyx=(8, 8, 8), level=3, temperature=0.3)))
    manifest = cache.manifest("large")
    assert manifest.absent_chunks > 0
    files = sorted(p.relative_to(cache.case_dir("large")).as_posix() for p in cache.case_dir("large").rglob("*.*"))
    assert files == ["manifest.json", "zarr.json"]
    assert [p.name for p in cache.case_dir("large").glob("c/0/0/0/*")] == ["0"]


def test_axes_are_cut_into_equal_parts():
    layout = layout_for(CacheSpec(), 2, (35, 51, 300))
    assert layout.chunk == (2, 35, 26, 34)
    assert layout.grid == (1, 1, 2, 9)
    assert layout_for(CacheSpec(), 2, (1, 128, 5)).chunk == (2, 1, 32, 5)


def test_equal_builds_give_equal_bytes(tmp_path, cache):
    other = build_cache(make_job(tmp_path / "elsewhere"))
    assert digests(other) == digests(cache)
    for case in SHAPES:
        for name in ("zarr.json", "c/0/0/0/0"):
            assert (other.case_dir(case) / name).read_bytes() == (cache.case_dir(case) / name).read_bytes()


def test_manifest_states_what_was_measured(cache):
    for case, shape in SHAPES.items():
        manifest = cache.manifest(case)
        probabilities = SoftLabelReader(cache.path).to_probabilities(expected_values(case))
        assert manifest.shape == (2, *shape)
        assert 0 < manifest.max_error < manifest.eps == 1 / 255
        assert manifest.image_sha256 == FakeCases().digest(case)
        assert manifest.stored_bytes == (cache.case_dir(case) / "c/0/0/0/0").stat().st_size
        np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-6)


def test_what_reads_back_differently_is_not_committed(tmp_path, monkeypatch):
    job = make_job(tmp_path / "root")
    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", lambda self, number, stored: add(self, number, np.minimum(stored, 100)))
    with pytest.raises(BuildError, match="gave other values"):
        build_cache(job)
    assert not any(job.path.glob("*/manifest.json"))
    assert not any((tmp_path / "root" / ".partial").iterdir())


def test_a_full_disk_is_one_message_and_resumable(tmp_path, monkeypatch):
    job = make_job(tmp_path / "root")
    written = store.write_synced

    def full(path, data):
        if path.name == "manifest.json" and b'"small"' in data:
            raise OSError(28, "No space left on device")
        written(path, data)

    monkeypatch.setattr(store, "write_synced", full)
    with pytest.raises(DiskSpaceError, match="no room left"):
        build_cache(job)
    assert "small" in job.open().missing_cases()
    assert not any((tmp_path / "root" / ".partial").iterdir())
    monkeypatch.undo()
    assert build_cache(job).missing_cases() == []


def test_a_root_inside_a_cache_and_odd_case_names_are_refused(tmp_path, cache):
    with pytest.raises(SpecError, match="inside a Zarr store"):
        build_cache(make_job(cache.path / "deeper"))
    with pytest.raises(SpecError, match="folder name"):
        build_cache(make_job(tmp_path / "r", cases=FakeCases(shapes={"../x": (4, 4, 4)})))


def test_changed_group_metadata_is_detected(cache):
    file = cache.path / "zarr.json"
    text = file.read_text()
    for changed in (
        text.replace('"temperature": 1.0', '"temperature": 2.0'),
        text.replace(cache.key, "0" * 64),
        text.replace(cache.cases["small"], "f" * 64),
        text[:-20],
        text.replace('"command"', '"commend"'),
    ):
        assert changed != text
        file.write_text(changed)
        with pytest.raises(CorruptError, match="damaged"):
            open_cache(cache.path)
    newer = json.loads(text)
    newer["attributes"]["fastnnunet"]["format_version"] = 2
    file.write_text(json.dumps(newer))
    with pytest.raises(CorruptError, match="update fastnnunet"):
        open_cache(cache.path)
    file.write_text(text)
    renamed = cache.path.rename(cache.path.with_name("0" * 16))
    with pytest.raises(CorruptError, match="disagree"):
        open_cache(renamed)
    with pytest.raises(NotFoundError, match=r"zarr\.json is missing"):
        open_cache(cache.path)


def test_the_same_cache_is_opened_not_created_twice(cache):
    job = make_job(cache.path.parent)
    again = create_cache(job.root, job.identity, CacheSpec(level=9), job.cases, {"command": "another command"})
    assert again == cache  # layout and command are those of the first builder


def test_verify_never_holds_more_than_a_layer_of_chunks(tmp_path, monkeypatch):
    cache = build_cache(make_job(tmp_path, spec=CacheSpec(level=3, chunk_zyx=(8, 16, 16))))
    asked, read_patch = [], SoftLabelReader.read_patch

    def recording(self, case_id, lower_zyx, upper_zyx, out=None):
        asked.append((case_id, lower_zyx, upper_zyx))
        return read_patch(self, case_id, lower_zyx, upper_zyx, out)

    monkeypatch.setattr(SoftLabelReader, "read_patch", recording)
    assert {r.status for r in verify_cache(cache)} == {"ok"}
    for case, (z, y, x) in SHAPES.items():
        chunk_z = zarr.open_array(str(cache.path / case), mode="r").chunks[1]
        layers = [(lower, upper) for name, lower, upper in asked if name == case]
        expected = [((low, 0, 0), (min(low + chunk_z, z), y, x)) for low in range(0, z, chunk_z)]
        assert layers == expected
    assert max(upper[0] - lower[0] for _, lower, upper in asked) == 8 < SHAPES["large"][0]


def test_verify_finds_impossible_values_in_the_last_layer(tmp_path, monkeypatch):
    """Values that no checksum can show to be wrong: the channels of one voxel sum to more than one."""
    cache = build_cache(make_job(tmp_path, spec=CacheSpec(level=3, chunk_zyx=(8, 16, 16))))
    read_patch = SoftLabelReader.read_patch

    def impossible(self, case_id, lower_zyx, upper_zyx, out=None):
        stored = read_patch(self, case_id, lower_zyx, upper_zyx, out)
        if case_id == "large" and upper_zyx[0] == SHAPES["large"][0]:
            stored[:, -1, -1, -1] = 200
        return stored

    monkeypatch.setattr(SoftLabelReader, "read_patch", impossible)
    bad = [r for r in verify_cache(cache) if r.status != "ok"]
    assert [(r.case_id, r.problem) for r in bad] == [
        ("large", "the channels of a voxel sum to 400, expected at most 255")
    ]


class TestFindCache:
    def find(self, job):
        return find_cache(job.root, job.identity, build_command="BUILD IT", case_digests=job.cases)

    def test_the_right_one(self, cache):
        assert self.find(make_job(cache.path.parent)) == cache.path
        # layout is not identity
        job = make_job(cache.path.parent, spec=CacheSpec(compressor="lz4", level=1, chunk_zyx=(16, 16, 16)))
        assert self.find(job) == cache.path

    def test_none_at_all(self, tmp_path):
        with pytest.raises(NotFoundError, match="BUILD IT"):
            self.find(make_job(tmp_path / "empty"))

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"spec": CacheSpec(temperature=2.0)}, "soft_labels.temperature: 1.0 -> 2.0"),
            ({"spec": CacheSpec(mirroring=False)}, "inference.mirroring: true -> false"),
            ({"spec": CacheSpec(step_size=0.75)}, "inference.step_size: 0.5 -> 0.75"),
            ({"spec": CacheSpec(policy="out_of_fold")}, 'policy.name: "ensemble" -> "out_of_fold"'),
            ({"factory": FakeFactory(folds=(0, 1))}, r"policy.folds: \[0, 1, 2\] -> \[0, 1\]"),
            ({"factory": FakeFactory(weights="new")}, 'teacher.checkpoints.0: "abc0" -> "new0"'),
            ({"factory": FakeFactory(num_heads=4)}, "soft_labels.heads: 3 -> 4"),
            ({"cases": FakeCases(seed=1)}, "cases whose preprocessed image changed: flat large small"),
            ({"cases": FakeCases(shapes={"small": (7, 20, 33), "x": (4, 4, 4)})}, "new cases: x"),
        ],
    )
    def test_another_one(self, cache, change, named):
        with pytest.raises(MismatchError, match=named) as error:
            self.find(make_job(cache.path.parent, **change))
        assert "BUILD IT" in str(error.value)
        assert cache.path.name in str(error.value)

    def test_the_nearest_is_named(self, cache):
        near = build_cache(make_job(cache.path.parent, spec=CacheSpec(temperature=2.0, step_size=1.0)))
        with pytest.raises(MismatchError, match=near.path.name) as error:
            self.find(make_job(cache.path.parent, spec=CacheSpec(temperature=2.0, step_size=0.75)))
        assert "temperature" not in str(error.value)

    def test_an_incomplete_one(self, cache):
        (cache.case_dir("small") / "manifest.json").unlink()
        with pytest.raises(NotFoundError, match="1 of 3 cases are missing \\(small\\)"):
            self.find(make_job(cache.path.parent))

    def test_a_damaged_one(self, cache):
        (cache.path / "zarr.json").write_text("{")
        with pytest.raises(CorruptError, match="damaged"):
            self.find(make_job(cache.path.parent))


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


class TestDamage:
    """Everything that can happen to a file of a case is found, the case is named, and its command rebuilds just it."""

    def check(self, cache, case="large"):
        before = digests(build_cache(make_job(cache.path.parent.parent / "fresh")))
        reports = {r.case_id: r for r in verify_cache(cache)}
        assert [c for c, r in reports.items() if r.status != "ok"] == [case]
        build_cache(make_job(cache.path.parent), only=[case])
        assert {r.status for r in verify_cache(cache)} == {"ok"}
        assert digests(cache) == before

    @pytest.mark.parametrize("name", ["zarr.json", "manifest.json", "c/0/0/0/0"])
    def test_flipped_bits(self, cache, name):
        file = cache.case_dir("large") / name
        whole = file.read_bytes()
        rng = np.random.default_rng(3)
        last = len(whole) * 8
        for bit in [0, last - 1, *rng.integers(0, last, 60)]:  # the shard's last bits are its index
            flip(file, int(bit))
            with pytest.raises(CorruptError, match=r"(?s)large.*fastnnunet cache build -d 4 --root \S+ --case large"):
                SoftLabelReader(cache.path).read_case("large")
            assert cache.problem("large", deep=True) is not None
            file.write_bytes(whole)
        assert cache.problem("large", deep=True) is None
        flip(file, last // 2)
        self.check(cache)

    @pytest.mark.parametrize("name", ["zarr.json", "c/0/0/0/0"])
    @pytest.mark.parametrize("how", ["truncate", "empty", "delete", "extend"])
    def test_lost_and_truncated_files(self, cache, name, how):
        file = cache.case_dir("large") / name
        data = file.read_bytes()
        if how == "delete":
            file.unlink()
        else:
            file.write_bytes({"truncate": data[: len(data) // 2], "empty": b"", "extend": data + b"\0"}[how])
        with pytest.raises(CorruptError, match="--case large"):
            SoftLabelReader(cache.path).read_case("large")
        assert cache.missing_cases() == ["large"]
        self.check(cache)

    def test_deleted_manifest(self, cache):
        (cache.case_dir("large") / "manifest.json").unlink()
        with pytest.raises(NotFoundError, match="--case large"):
            SoftLabelReader(cache.path).read_case("large")
        self.check(cache)

    def test_swapped_cases(self, cache):
        shutil.rmtree(cache.case_dir("large"))
        shutil.copytree(cache.case_dir("small"), cache.case_dir("large"))
        with pytest.raises(CorruptError, match="belongs elsewhere"):
            SoftLabelReader(cache.path).read_case("large")
        self.check(cache)

    def test_swapped_shard_of_the_same_shape(self, tmp_path, cache):
        other = build_cache(make_job(tmp_path / "other", factory=FakeFactory(weights="other", folds=(0, 1))))
        shard = cache.case_dir("large") / "c/0/0/0/0"
        data = (other.case_dir("large") / "c/0/0/0/0").read_bytes()
        shard.write_bytes(data)
        with pytest.raises(CorruptError, match="--case large"):
            SoftLabelReader(cache.path).read_case("large")
        self.check(cache)

    def test_edited_attribute(self, cache):
        file = cache.case_dir("large") / "zarr.json"
        file.write_text(file.read_text().replace('"case_id":"large"', '"case_id":"small"'))
        with pytest.raises(CorruptError, match=r"zarr\.json was changed"):
            SoftLabelReader(cache.path).read_case("large")
        self.check(cache)

    def test_the_command_names_all_damaged_cases(self, cache):
        assert cache.rebuild_command("a", "b") == f"{COMMAND} --root {cache.path.parent} --case a b"


class TestForged:
    """Metadata whose digests are right, as whoever changes them can make them."""

    @staticmethod
    def forge(cache, place, value):
        """The cache's folder with another value somewhere in its metadata, under the name that then is its own."""
        raw = json.loads((cache.path / "zarr.json").read_text())
        body = raw["attributes"]["fastnnunet"]
        del body["self_sha256"]
        inner = body
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        if isinstance(body["identity"], dict) and isinstance(body["identity"].get("data"), dict):
            body["identity"]["data"]["sha256"] = sha256_of(body["cases"])
        body["key"] = sha256_of(body["identity"])
        body["self_sha256"] = sha256_of({k: v for k, v in body.items() if k != "self_sha256"})
        folder = cache.path.with_name(body["key"][:16])
        if folder != cache.path:
            shutil.copytree(cache.path, folder)
        (folder / "zarr.json").write_text(json.dumps(raw))
        return folder

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("cases", "../../elsewhere"), "0" * 64),
            (("cases", "a\nb"), "0" * 64),
            (("cases",), ["large"]),
            (("cases", "large"), 3),
            (("identity",), []),
            (("identity", "data"), 3),
            (("identity", "soft_labels"), {}),
            (("identity", "soft_labels", "heads"), 10**9),
            (("identity", "soft_labels", "heads"), True),
            (("identity", "soft_labels", "temperature"), "x"),
            (("identity", "soft_labels", "encoding"), "other"),
            (("identity", "soft_labels", "levels"), 0),
            (("spec", "chunk_zyx"), [10**9] * 2),
            (("provenance",), 3),
            (("provenance", "command"), "\x1b[2J"),
            (("format_version",), "1"),
        ],
    )
    def test_metadata(self, cache, place, value):
        folder = self.forge(cache, place, value)
        with pytest.raises(CorruptError, match="damaged"):
            open_cache(folder)

    def test_chunks_that_no_memory_holds(self, cache):
        document = json.loads((cache.case_dir("large") / "zarr.json").read_text())
        layout = layout_of_document(document)
        for chunk in ((2**16,) * 4, (1, 32.0, 32, 32)):
            forged = array_document(dataclasses.replace(layout, chunk=chunk), document["attributes"])
            with pytest.raises(CorruptError, match="does not write"):
                layout_of_document(forged)

    @pytest.mark.parametrize("text", ["[" * 10**5, '{"a": ' * 200 + "1" + "}" * 200, "9" * 5000, '{"a": NaN}'])
    def test_documents_that_are_no_metadata(self, cache, text):
        (cache.case_dir("large") / "manifest.json").write_text(text)
        with pytest.raises(CorruptError, match="--case large"):
            SoftLabelReader(cache.path).read_case("large")
        (cache.path / "zarr.json").write_text(text)
        with pytest.raises(CorruptError, match="damaged"):
            open_cache(cache.path)
