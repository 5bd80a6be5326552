"""Puts the commands together, and turns failures into one line and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from stateferry.cli import generate, inspect, roles, talk
from stateferry.core.errors import StateferryError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="stateferry",
    help="Serve Mamba-2 language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (roles, generate, talk, inspect):
    commands.register(app)


def main() -> None:
    """Entry of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; return its exit code. Only bugs raise."""
    try:
        code = app(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        _complain(f"{error.format_message()} (see `stateferry --help`)")
        return error.exit_code
    except StateferryError as error:
        _complain(str(error))
        return EXIT_FAILED
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left, as `head` does. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _complain(text: str) -> None:
    print(f"stateferry: {text}", file=sys.stderr)
