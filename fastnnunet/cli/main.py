"""The `fastnnunet` command: parse, call one library function, print. Errors become one message and exit code 2."""

import sys

import typer

from fastnnunet.cli.benchmark import benchmark
from fastnnunet.cli.cache import app as cache_app
from fastnnunet.cli.distill import app as distill_app
from fastnnunet.cli.evaluate import evaluate
from fastnnunet.cli.export import app as export_app
from fastnnunet.cli.guard import guarded
from fastnnunet.cli.postprocess import postprocess
from fastnnunet.cli.predict import EXAMPLES as PREDICT_EXAMPLES
from fastnnunet.cli.predict import predict
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


@app.callback()
def _group() -> None:
    """Keeps `fastnnunet` a group of commands however many are registered."""


app.command("evaluate")(evaluate)
app.command("benchmark")(benchmark)
app.command("train")(train)
app.command("predict", epilog=PREDICT_EXAMPLES)(predict)
app.command("postprocess")(postprocess)
app.add_typer(cache_app, name="cache")
app.add_typer(export_app, name="export")
app.add_typer(student_app, name="student")
app.add_typer(distill_app, name="distill")

# Options that take several values the nnU-Net way: `-f 0 1 2` becomes `-f 0 -f 1 -f 2`.
MULTI_VALUE = frozenset(
    {"-f", "--fold", "-r", "--reduction", "-tf", "--backend", "--case", "-m", "--model", "--precision", "--arch"}
    | {"--keep-largest", "--fill-holes", "--patch-size"}
)
# ... but not for these commands, where a second value is a mistake
SINGLE_VALUE = {
    "predict": frozenset({"--backend", "-m", "--model", "--precision"}),
    "export": frozenset({"-m", "--model"}),
}
# What an option without a value stands for.
BARE_VALUE = {"--keep-largest": "all", "--fill-holes": "each"}


def spread_multi_values(argv: list[str]) -> list[str]:
    """Rewrite `-f 0 1 2` as `-f 0 -f 1 -f 2` for the options in MULTI_VALUE, and give those in BARE_VALUE their value
    where they stand alone; everything else is left as it is.
    """
    several = MULTI_VALUE - SINGLE_VALUE.get(argv[0] if argv else "", frozenset())
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
    args = spread_multi_values(sys.argv[1:] if argv is None else argv)
    guarded(lambda: app(args))


if __name__ == "__main__":
    main()
