"""`fastnnunet remote`: images of this machine predicted by a service on another, or on this one."""

from pathlib import Path
from typing import Annotated

import typer

from fastnnunet.cli.connect.ended import terminated_as_interrupted
from fastnnunet.cli.parts import options

app = typer.Typer(
    no_args_is_help=True,
    help="Predict by a service that `fastnnunet serve` started; its token comes from FASTNNUNET_TOKEN.",
)

Url = Annotated[str, options.ask("--url", "Address of the service, such as http://127.0.0.1:8000.")]
Timeout = Annotated[float, options.ask("--timeout", "Seconds that it may be silent.", options.RUN, min=0.1)]
Certificates = Annotated[
    Path | None, options.ask("--ca-file", "Certificates (PEM) to trust instead of the system's.", options.RUN)
]


@app.command("predict")
def predict(
    url: Url,
    model: Annotated[str, options.ask("-m --model", "Id of the model, as `fastnnunet remote models` lists it.")],
    image: Annotated[
        list[Path], options.ask("-i --input", "Image, or folder of DICOM slices; of several channels one for each.")
    ],
    output: Annotated[Path, options.ask("-o --output", "File, or folder.")],
    answer: Annotated[
        list[str] | None, options.ask("--answer", "Format of the result (default: labels); a zip of several.")
    ] = None,
    series: Annotated[str | None, options.ask("--series", "SeriesInstanceUID, where a folder holds several.")] = None,
    overwrite: options.Overwrite = False,
    timeout: Timeout = 60.0,
    ca_file: Certificates = None,
) -> None:
    """Send an image, wait for its prediction, and write it.

    Example:

      fastnnunet remote predict --url http://127.0.0.1:8000 -m liver_r4 -i ct.nii.gz -o liver.nii.gz
    """
    from fastnnunet.api import View
    from fastnnunet.connect.remote.client import service_at
    from fastnnunet.connect.remote.job import predict_remotely

    with terminated_as_interrupted(), View() as view:
        file = predict_remotely(
            service_at(url, timeout_s=timeout, ca_file=ca_file),
            model,
            image,
            output,
            answers=answer or ["labels"],
            series=series,
            overwrite=overwrite,
            progress=view,
        )
    print(f"written: {file}")


@app.command("models")
def models(url: Url, timeout: Timeout = 60.0, ca_file: Certificates = None) -> None:
    """List the models of a service: what they take, and what they segment.

    Example:

      fastnnunet remote models --url http://127.0.0.1:8000
    """
    from fastnnunet.connect.remote.client import service_at

    for model in service_at(url, timeout_s=timeout, ca_file=ca_file).models():
        words = f"{model.id}: {', '.join(model.channels)} -> {', '.join(model.labels)}"
        print(f"{words} (takes {', '.join(model.accepts)}){model.measured and f'; {model.measured}'}")


@app.command("slicer")
def slicer() -> None:
    """Print the folder of the module for 3D Slicer, which Edit > Application Settings > Modules takes.

    Example:

      fastnnunet remote slicer
    """
    import fastnnunet.connect

    print(Path(fastnnunet.connect.__file__).with_name("slicer"))
