"""The `fastnnunet` command: parse, call one library function, print. Errors become one message and exit code 2."""

import sys
from functools import cache
from typing import Any

import typer
from typer.core import TyperGroup

from fastnnunet.cli.benchmark import benchmark
from fastnnunet.cli.cache import app as cache_app
from fastnnunet.cli.connect.dicomweb import dicomweb
from fastnnunet.cli.connect.remote import app as remote_app
from fastnnunet.cli.connect.watch import watch
from fastnnunet.cli.distill import app as distill_app
from fastnnunet.cli.evaluate import evaluate
from fastnnunet.cli.export import app as export_app
from fastnnunet.cli.guard import guarded, leave, refuse_empty
from fastnnunet.cli.parts.quick import convert_simply
from fastnnunet.cli.predict import EXAMPLES as PREDICT_EXAMPLES
from fastnnunet.cli.predict import predict
from fastnnunet.cli.predictions.postprocess import postprocess
from fastnnunet.cli.predictions.report import report
from fastnnunet.cli.serve import EXAMPLES as SERVE_EXAMPLES
from fastnnunet.cli.serve import serve
from fastnnunet.cli.student import app as student_app
from fastnnunet.cli.train import train

app = typer.Typer(
    name="fastnnunet",
    help="Distil a trained nnU-Net v2 ensemble into one small student and predict with it, fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_versions(wanted: bool) -> None:
    if wanted:
        from fastnnunet.specs.provenance import versions

        found = versions()
        print(f"fastnnunet {found.pop('fastnnunet')} ({', '.join(f'{name} {v}' for name, v in found.items())})")
        raise typer.Exit


@app.callback()
def _group(
    version: bool = typer.Option(
        False, "--version", callback=_print_versions, is_eager=True, help="Print the versions that decide results."
    ),
) -> None:
    """Keeps `fastnnunet` a group of commands however many are registered."""


app.command("evaluate")(evaluate)
app.command("benchmark")(benchmark)
app.command("train")(train)
app.command("predict", epilog=PREDICT_EXAMPLES)(predict)
app.command("postprocess")(postprocess)
app.command("report")(report)
app.command("dicomweb")(dicomweb)
app.command("watch")(watch)
app.command("serve", epilog=SERVE_EXAMPLES)(serve)
app.add_typer(cache_app, name="cache")
app.add_typer(export_app, name="export")
app.add_typer(student_app, name="student")
app.add_typer(remote_app, name="remote")
app.add_typer(distill_app, name="distill")

# What an option without a value stands for.
BARE_VALUE = {"--keep-largest": "all", "--fill-holes": "each"}


@cache
def command() -> Any:
    """The whole command line, made once: reading all options takes 10 ms."""
    made: Any = typer.main.get_command(app)
    for quick in (made, made.commands["predict"]):
        convert_simply(quick)
    return made


def options_with_several_values(argv: list[str]) -> frozenset[str]:
    """Of the command that `argv` names, the options that may be given more than once."""
    named = command()
    for token in argv:
        if not isinstance(named, TyperGroup) or token not in named.commands:
            break
        named = named.commands[token]
    return frozenset(name for p in named.params if getattr(p, "multiple", False) for name in p.opts)


def spread_multi_values(argv: list[str]) -> list[str]:
    """Rewrite `-f 0 1 2`, nnU-Net's way, as `-f 0 -f 1 -f 2` for options that take several values, and give those in
    BARE_VALUE their value where they stand alone; everything else is left as it is, so that the second value of an
    option with one is refused.
    """
    several = options_with_several_values(argv)
    out: list[str] = []
    option: str | None = None
    taken = 0
    for token, following in zip(argv, [*argv[1:], "-"], strict=True):
        if token.startswith("-") and not token[1:2].isdigit():
            option, taken = (token, 0) if token in several else (None, 0)
            out.append(token)
            if token in BARE_VALUE and following.startswith("-"):
                out.append(BARE_VALUE[token])
            continue
        if option is not None:
            if taken:
                out.append(option)
            taken += 1
        out.append(token)
    return out


def main(argv: list[str] | None = None) -> None:
    """Console entry point. Exit codes: 0 done, 1 some cases failed, 2 wrong input, 130 interrupted."""
    given = sys.argv[1:] if argv is None else argv

    def run() -> None:
        refuse_empty(given)
        command()(spread_multi_values(given))

    try:
        guarded(run)
    except SystemExit as e:
        if argv is None and given[:1] == ["predict"] and isinstance(e.code, int):
            leave(e.code)
        raise


if __name__ == "__main__":
    main()
