"""`fastnnunet distill`: students from scans without labels; the smallest student that is good enough."""

import typer

from fastnnunet.cli.distill.auto import auto
from fastnnunet.cli.distill.images import images

app = typer.Typer(no_args_is_help=True, help="Find the student to deploy; students from scans without labels.")
app.command("images")(images)
app.command("auto")(auto)
