"""`fastnnunet serve`: bundles behind a local HTTP service."""

from pathlib import Path
from typing import Annotated

import typer

from fastnnunet.cli.parts.fields import Asked, Group, ask, spread
from fastnnunet.cli.parts.options import RUN
from fastnnunet.service.spec import ServiceSpec

EXAMPLES = """Examples:

fastnnunet serve hippocampus_r4 liver_r4

fastnnunet serve hippocampus_r4 --port 9000 --idle 60

FASTNNUNET_TOKEN=... fastnnunet serve hippocampus_r4 --host 0.0.0.0
"""
Limits = Annotated[Asked, Group(ServiceSpec, RUN)]


@spread
def serve(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles of `fastnnunet export`, one or more.")],
    limits: Limits,
    token: Annotated[
        str | None,
        ask(
            "--token",
            "Secret that clients have to send; the variable keeps it out of the list of processes.",
            RUN,
            envvar="FASTNNUNET_TOKEN",
        ),
    ] = None,
) -> None:
    """Serve models over HTTP to programs of this machine: images in, label maps out.

    Nothing leaves the machine. Other machines are let in with --host and a token alone. The guide is
    docs/guides/service.md.
    """
    from fastnnunet.events import Event, Message
    from fastnnunet.service.run import log_to_stderr
    from fastnnunet.service.run import serve as run

    def show(event: Event) -> None:
        if isinstance(event, Message):
            print(event.text, flush=True)

    log_to_stderr()
    run(bundles, ServiceSpec(**limits), token=token, progress=show)
