"""`fastnnunet dicomweb` against Orthanc, where it is installed: what it holds then is told by its own interface."""

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.filebase import DicomBytesIO

from fastnnunet.cli.main import main
from tests.bundles import Toy, make_toy_model
from tests.dicom_files import write_series
from tests.orthanc import PASSWORD, USER, asked, orthanc

SHAPE = (9, 22, 26)


def test_a_series_is_fetched_and_its_segmentation_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with orthanc(tmp_path) as url:
        bundle = make_toy_model(Toy(), tmp_path / "toy").bundle
        stored = np.random.default_rng(3).integers(0, 1500, SHAPE)
        files = write_series(tmp_path / "ct", stored, spacing_zyx=(1, 1, 1), compressed=True, AccessionNumber="A7")
        source = [pydicom.dcmread(file) for file in files]
        scout = write_series(
            tmp_path / "scout",
            stored[:1],
            StudyInstanceUID=source[0].StudyInstanceUID,
            SeriesDescription="scout",
            AccessionNumber="A7",
        )
        for file in (*files, *scout):
            asked(f"{url}/instances", file.read_bytes())
        words = ["dicomweb", "--url", f"{url}/dicom-web", "-m", str(bundle), "--backend", "onnxruntime"]
        words += ["--accession", "A7"]
        for name in ("TOKEN", "USER", "PASSWORD"):
            monkeypatch.delenv(f"FASTNNUNET_DICOMWEB_{name}", raising=False)
        for given, message in (({}, "401"), ({"USER": USER, "PASSWORD": PASSWORD}, "2 series of the study fit")):
            for name, value in given.items():
                monkeypatch.setenv(f"FASTNNUNET_DICOMWEB_{name}", value)
            with pytest.raises(SystemExit):
                main(words)
            said = capfd.readouterr().err
            assert message in said
            assert PASSWORD not in said
        series = source[0].SeriesInstanceUID
        for _ in range(2):
            with pytest.raises(SystemExit) as caught:
                main([*words, "--series", series, "--store", "dicom-seg", "rtstruct"])
            assert caught.value.code == 0
        said = capfd.readouterr().out
        assert said.count("\n") == 4
        assert said.count("there already") == 2

        found = {}
        for instance in json.loads(asked(f"{url}/instances")):
            data = pydicom.dcmread(DicomBytesIO(asked(f"{url}/instances/{instance}/file")))
            found.setdefault(data.Modality, []).append(data)
        assert len(found["CT"]) == SHAPE[0] + 1
        (segmentation,) = found["SEG"]
        assert segmentation.SOPInstanceUID in said
        assert segmentation.StudyInstanceUID == source[0].StudyInstanceUID
        assert segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID == series
        assert segmentation.pixel_array.any()
        (structures,) = found["RTSTRUCT"]
        assert structures.SOPInstanceUID in said
        assert structures.SeriesInstanceUID != segmentation.SeriesInstanceUID
