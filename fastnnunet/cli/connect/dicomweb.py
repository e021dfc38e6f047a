"""`fastnnunet dicomweb`: a series of an archive predicted, its segmentation stored there."""

from typing import Annotated

from fastnnunet.cli.connect.ended import terminated_as_interrupted
from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.fields import Asked, Group, spread
from fastnnunet.connect.dicomweb.spec import DicomWebSpec
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.specs.run.kept import KeptModelSpec

ARCHIVE = "Archive"


@spread
def dicomweb(
    model: Annotated[Asked, Group(KeptModelSpec, options.RUN)],
    archive: Annotated[Asked, Group(DicomWebSpec, ARCHIVE)],
    written: Annotated[Asked, Group(OutputSpec, options.OUTPUT, only=("label_codes", "segmentation_type"))],
) -> None:
    """Fetch a series by DICOMweb, predict it, and store the segmentation in its study.

    Running it again stores nothing a second time. Credentials come from the environment: FASTNNUNET_DICOMWEB_TOKEN, or
    FASTNNUNET_DICOMWEB_USER and FASTNNUNET_DICOMWEB_PASSWORD.

    Example:

      fastnnunet dicomweb --url https://pacs.example/dicom-web --study 1.2.3 --modality CT -m liver_r4
    """
    from fastnnunet.api import View
    from fastnnunet.connect.dicomweb.job import predict_study

    spec, settings = DicomWebSpec(**archive), KeptModelSpec(**model)
    with terminated_as_interrupted(), View() as view:
        stored = predict_study(settings, spec, **written, progress=view)
    for one in stored:
        what = "stored" if one.is_new else "there already, nothing stored:"
        print(f"{what} {one.kind} {one.identity.instance_uid} in series {one.identity.series_uid}")
