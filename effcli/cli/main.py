"""The ``effcli`` command and the one place where errors become text and an exit code.

Nothing here imports torch or transformers: ``effcli --help`` must stay as fast as typer and rich themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from effcli.cli import (
    batch,
    compare,
    doctor,
    evaluate,
    export,
    gate,
    models,
    optimize,
    passes,
    plan,
    profile,
    profilers,
    push,
    report,
    verify,
)
from effcli.errors import EXIT_INTERRUPTED, EXIT_OK, explain

app = typer.Typer(
    name="effcli",
    help="Say where a model's time and bytes go on the device you have.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich help doubles the time of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 a bug, or a job of a batch failed, 2 bad input, 3 a gate failed, "
    "4 not enough memory or disk, 130 interrupted.",
)
app.command("profile")(profile.command)
app.command("plan")(plan.command)
app.command("optimize")(optimize.command)
app.command("export")(export.command)
app.command("eval")(evaluate.command)
app.command("batch")(batch.command)
app.command("compare")(compare.command)
app.command("gate")(gate.command)
app.command("report")(report.command)
app.command("verify")(verify.command)
app.command("push")(push.command)
app.command("doctor")(doctor.command)
app.command("models")(models.command)
app.command("profilers")(profilers.command)
app.command("passes")(passes.command)


def _version(show: bool) -> None:
    if show:
        from effcli import __version__

        typer.echo(f"effcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Say where a model's time and bytes go on the device you have."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Defaults to ``sys.argv[1:]``.
    """
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()
        if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into an exit code
            return _say("interrupted; nothing was written", EXIT_INTERRUPTED)
        return code if isinstance(code, int) else EXIT_OK
    except KeyboardInterrupt:
        return _say("interrupted; nothing was written", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our pipe (head, less) went away; point stdout elsewhere so that the exit flush stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:  # noqa: BLE001 - the one place that turns any error into text and an exit code
        if os.environ.get("EFFCLI_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        return _say(*explain(error))


def _say(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)  # noqa: T201 - errors are one line on stderr, never wrapped
    return code
