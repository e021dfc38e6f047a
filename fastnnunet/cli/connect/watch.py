"""`fastnnunet watch`: new images of a folder predicted as they come."""

import signal
import sys
import threading
from typing import Annotated, Any

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.fields import Asked, Group, spread
from fastnnunet.connect.watch.spec import WatchSpec
from fastnnunet.outputs.spec import OutputSpec
from fastnnunet.specs.run.kept import KeptModelSpec


@spread
def watch(
    folders: Annotated[Asked, Group(WatchSpec, options.OUTPUT)],
    outputs: options.Outputs,
    model: Annotated[Asked, Group(KeptModelSpec, options.RUN)],
) -> None:
    """Predict every image that comes into a folder, once, until Ctrl-C or SIGTERM.

    The model stays in memory. What became of each image is in OUTPUT/fastnnunet_watch; started again, it goes on.

    Example:

      fastnnunet watch -i incoming -o segmented -m liver_r4 --statistics
    """
    from fastnnunet.api import View
    from fastnnunet.connect.watch.watcher import watch as run

    spec, written, settings = WatchSpec(**folders), OutputSpec(**outputs), KeptModelSpec(**model)
    stop = threading.Event()

    def end(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[number])  # a second one does not wait

    before: dict[int, Any] = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with View() as view:
            watched = run(settings, spec, written, stop=stop, progress=view)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"{watched.done} image(s) predicted into {spec.output}, {watched.failed} failed")
    if watched.failed and spec.once:
        print("the messages are in the files of fastnnunet_watch there", file=sys.stderr)
        raise typer.Exit(1)
