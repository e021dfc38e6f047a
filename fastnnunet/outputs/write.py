"""A case in every format: which files there are of it, what is refused beforehand, and the writing itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fastnnunet.errors import ImageError, SpecError
from fastnnunet.images.dicom.series import DicomSeries
from fastnnunet.images.io import ImageIO
from fastnnunet.images.output import sibling
from fastnnunet.outputs.dicom.codes import BUNDLE_FILE, LabelCodes, label_codes
from fastnnunet.outputs.labelled import LabelledImage, Structure, grid_of, structures_of
from fastnnunet.outputs.mesh.files import ENDING as MESH_ENDING
from fastnnunet.outputs.mesh.files import stl_files, write_mesh
from fastnnunet.outputs.preview import preview
from fastnnunet.outputs.scan import ENDING as SCAN_ENDING
from fastnnunet.outputs.scan import write_scan
from fastnnunet.outputs.spec import Kind, OutputSpec, SegmentationType
from fastnnunet.outputs.statistics import ENDING as STATISTICS_ENDING
from fastnnunet.outputs.statistics import (
    TABLE_ENDING,
    TABLE_FILE,
    gather,
    read_statistics,
    statistics,
    write_statistics,
    write_table,
)
from fastnnunet.system.files import atomic_output, make_folder

PREVIEW_ENDING = "_preview.png"
_ENDINGS: Mapping[Kind, str] = {
    "nifti": ".nii.gz",
    "dicom-seg": ".dcm",
    "rtstruct": ".rtstruct.dcm",
    "mesh": MESH_ENDING,
}
_WORDS: Mapping[str, str] = {"dicom-seg": "a DICOM SEG", "rtstruct": "an RTSTRUCT"}


def ending_of(kind: Kind, file_ending: str) -> str:
    """The file ending of a format; `file_ending`: the model's, of images."""
    return _ENDINGS.get(kind, file_ending)


def write_output(
    labelled: LabelledImage,
    kind: Kind,
    file: Path,
    *,
    codes: LabelCodes | None = None,
    segmentation_type: SegmentationType = "binary",
) -> None:
    """Write one format of a case; a file is whole or not there.

    `kind`: `image` or `nifti` (any ending that ITK writes), `dicom-seg` and `rtstruct` (which refer to
    `labelled.series`), `mesh` (`file` is a .glb; a folder of STL files is made beside it).
    `codes`: of the structures, for DICOM; those of `label_codes` unless given.
    Raises SpecError for a `kind` that cannot be, ImageError, MismatchError and FastnnUNetError where it cannot be
    written, ModuleNotFoundError without the extra `dicom`.
    """
    OutputSpec(formats=(kind,), segmentation_type=segmentation_type)  # refuses others
    _write(labelled, kind, file, codes, segmentation_type, checked=False)


def _write(
    labelled: LabelledImage,
    kind: Kind,
    file: Path,
    codes: LabelCodes | None,
    segmentation_type: SegmentationType,
    checked: bool,
) -> None:
    """`checked`: the series was, and what of its headers is mended is told already."""
    make_folder(file.parent)
    if kind in ("image", "nifti"):
        _write_image(labelled, file)
    elif kind == "mesh":
        write_mesh(labelled, file)
    else:
        check_series(kind, labelled.case, labelled.series)
        if kind == "rtstruct":
            from fastnnunet.outputs.dicom.rtstruct import write_rtstruct

            write_rtstruct(labelled, file, codes=codes, checked=checked)
            return
        from fastnnunet.outputs.dicom.seg import write_dicom_seg

        write_dicom_seg(labelled, file, codes=codes, segmentation_type=segmentation_type, checked=checked)


def check_series(kind: str, case: str, series: DicomSeries | None) -> DicomSeries:
    """The series that an output refers to. Raises ImageError where there is none."""
    if series is None:
        raise ImageError(
            f"{case} is no DICOM series, which {_WORDS[kind]} has to refer to\n"
            f"give the folder of its DICOM slices as the image, or another format than {kind}: nifti, mesh"
        )
    return series


def _write_image(labelled: LabelledImage, file: Path) -> None:
    from fastnnunet.images.sitk import SimpleITKIO

    affine = labelled.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    geometry = {
        "spacing": tuple(map(float, spacing)),
        "origin": tuple(map(float, affine[:3, 3])),
        "direction": tuple(map(float, (affine[:3, :3] / spacing).ravel())),
    }
    try:
        SimpleITKIO().write(labelled.labels_ZYX, file, {"sitk_stuff": geometry})
    except RuntimeError as e:  # of ITK, for axes that are not perpendicular
        raise ImageError(
            f"{labelled.case}: cannot write {file.name}: {str(e).strip().splitlines()[-1]}\n"
            "expected perpendicular axes; resample the image first"
        ) from e


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputWriter:
    """What a run writes of each of its cases."""

    spec: OutputSpec
    file_ending: str  # of images: the model's
    structures: tuple[Structure, ...]
    channel_names: tuple[str, ...] = ()
    model: str = ""
    codes: LabelCodes | None = None

    @property
    def ending(self) -> str:
        """Of the file that says whether a case is done."""
        return ending_of(self.spec.formats[0], self.file_ending)

    @property
    def needs_image(self) -> bool:
        """The image has to be kept until the label map is there."""
        return self.spec.needs_image

    def beside(self, output: Path) -> dict[str, Path]:
        """What is written beside `output`, which is of the first format: what it is -> its file."""
        wanted = {kind: ending_of(kind, self.file_ending) for kind in self.spec.formats[1:]}
        found = {str(kind): sibling(output, self.ending, ending) for kind, ending in wanted.items()}
        if self.spec.statistics:
            found["statistics"] = sibling(output, self.ending, STATISTICS_ENDING)
        if self.spec.preview:
            found["preview"] = sibling(output, self.ending, PREVIEW_ENDING)
        if self.spec.scan:
            found["scan"] = sibling(output, self.ending, SCAN_ENDING)
        return found

    def files(self, output: Path) -> list[Path]:
        """All files of a case but those of its images and probabilities, which only the reader knows."""
        files = list(self.beside(output).values())
        if "mesh" in self.spec.formats:
            glb = {"mesh": output, **self.beside(output)}["mesh"]  # the first format is `output` itself
            files += stl_files(self.structures, glb).values()
        return files

    def check(self, case: str, series: DicomSeries | None) -> None:
        """Find out before any work what cannot be written for a case. Raises ImageError saying why."""
        for kind in self.spec.of_series:
            found = check_series(kind, case, series)
            codes = self.codes or label_codes(self.structures)
            if kind == "rtstruct":
                from fastnnunet.outputs.dicom.rtstruct import check_rtstruct

                check_rtstruct(found, structures=self.structures, model=self.model, codes=codes)
                continue
            from fastnnunet.outputs.dicom.seg import check_dicom_seg

            check_dicom_seg(
                found,
                structures=self.structures,
                model=self.model,
                codes=codes,
                segmentation_type=self.spec.segmentation_type,
            )

    def labelled(
        self,
        case: str,
        labels_ZYX: npt.NDArray[Any],
        properties: Mapping[str, Any],
        *,
        image_CZYX: npt.NDArray[np.float32] | None = None,
        series: DicomSeries | None = None,
    ) -> LabelledImage:
        """A label map of this model on the grid that a reader's `properties` tell of."""
        affine, in_patient = grid_of(properties)
        return LabelledImage(
            case=case,
            labels_ZYX=labels_ZYX,
            affine=affine,
            structures=self.structures,
            in_patient=in_patient,
            image_CZYX=image_CZYX,
            channel_names=self.channel_names,
            series=series,
            model=self.model,
        )

    def write(self, labelled: LabelledImage, output: Path, io: ImageIO, properties: dict[str, Any]) -> None:
        """Everything beside `output`, then `output` itself: where it is, all is.

        `io`: the reader of the model, with the `properties` that it gave of the image.
        """
        for what, file in [*self.beside(output).items(), (self.spec.formats[0], output)]:
            if what == "statistics":
                write_statistics(statistics(labelled), file)
            elif what == "preview":
                picture = preview(labelled)
                with atomic_output(file) as partial:
                    partial.write_bytes(picture)
            elif what == "scan":
                write_scan(labelled, file, io, properties, self.file_ending)
            elif what == "image" or (what == "nifti" and labelled.in_patient):
                io.write(labelled.labels_ZYX, file, properties)
            else:
                _write(labelled, cast(Kind, what), file, self.codes, self.spec.segmentation_type, checked=True)

    def write_table(self, output: Path) -> None:
        """The statistics of all cases in the folder `output`, those of earlier runs included, or of one output file."""
        if output.is_dir():
            write_table(gather(output), output / TABLE_FILE)
            return
        found = read_statistics(self.beside(output)["statistics"])
        write_table([found], sibling(output, self.ending, TABLE_ENDING))


def output_writer(
    outputs: OutputSpec,
    *,
    labels: Mapping[str, Any],
    file_ending: str,
    channel_names: Sequence[str] = (),
    model: str = "",
    bundle: Path | None = None,
) -> OutputWriter:
    """The writer of a run of a model; `labels` as in its dataset.json, `bundle`: where it may have codes of its own.

    Raises SpecError for outputs that cannot be, ModuleNotFoundError without the extra `dicom` where it is needed.
    """
    structures = structures_of(labels)
    endings = [ending_of(kind, file_ending) for kind in outputs.formats]
    if len(set(endings)) < len(endings):
        raise SpecError(
            f"--output-format: image and nifti are one file, since this model writes {file_ending} files; leave one out"
        )
    codes = None
    if outputs.of_series:
        import_module("highdicom")  # what is not installed is said before anything is predicted
        of_bundle = None if bundle is None else bundle / BUNDLE_FILE
        codes = label_codes(
            structures, outputs.label_codes or (of_bundle if of_bundle is not None and of_bundle.is_file() else None)
        )
    elif outputs.label_codes is not None:
        raise SpecError("--label-codes: codes are written into DICOM alone; add --output-format dicom-seg or rtstruct")
    if "dicom-seg" in outputs.formats:
        from fastnnunet.outputs.dicom.seg import check_segmentation_type

        check_segmentation_type(outputs.segmentation_type, structures)
    elif outputs.segmentation_type != "binary":
        raise SpecError("--segmentation-type is one of DICOM SEG; add --output-format dicom-seg")
    return OutputWriter(
        spec=outputs,
        file_ending=file_ending,
        structures=structures,
        channel_names=tuple(channel_names),
        model=model,
        codes=codes,
    )
