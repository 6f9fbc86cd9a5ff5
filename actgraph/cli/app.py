"""Puts the verbs together and turns exceptions into one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from actgraph.cli import (
    bench,
    bisect,
    build_plugin,
    convert_vector,
    demo,
    diff,
    export,
    export_adapter,
    extract_vector,
    generate,
    inspect,
    options,
    passes,
    run,
    sites,
    verify,
)
from actgraph.errors import ActgraphError

_VERBS = (
    sites,
    passes,
    run,
    inspect,
    diff,
    verify,
    export,
    export_adapter,
    generate,
    bench,
    bisect,
    extract_vector,
    convert_vector,
    build_plugin,
    demo,
)

#: typer carries its own copy of click, or uses the installed one: either way the base class of its usage errors.
_ClickException: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_HELP = """The compiler for neural-network activations: capture a model as a graph, rewrite it by passes, prove what they
did, and ship the result.

MODEL is a Hugging Face directory, an .onnx or .pt2 file, package.module:factory, or stories260k (embedded)."""


def build() -> typer.Typer:
    """The typer application with every verb."""
    app = typer.Typer(
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="`actgraph VERB --help` shows an example of each. Exit codes: 0 done, 1 a check failed, 2 bad usage or input.",
    )
    app.callback()(_top)
    for module in _VERBS:
        command = module.command
        name = command.__name__.replace("_", "-")
        app.command(name, epilog=module.EXAMPLE)(command)
    return app


def _version(value: bool) -> None:
    if value:
        import actgraph

        typer.echo(f"actgraph {actgraph.__version__}")
        raise typer.Exit


def _top(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version and exit."),
) -> None:
    pass


_top.__doc__ = _HELP


def run_app(arguments: list[str]) -> int:
    """Run the command line ``arguments`` and return the exit code; see ``actgraph.cli``."""
    options.state.debug = False
    try:
        result = typer.main.get_command(build()).main(arguments, prog_name="actgraph", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`actgraph sites m | head`): not an error, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    if isinstance(error, _ClickException):
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            return 2
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "actgraph"
        _complain(f"{_usage(error).rstrip('.')} (see `{where} --help`)")
        return int(error.exit_code)
    if options.state.debug:
        raise error
    if isinstance(error, ActgraphError):
        _complain(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        _complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        return 2
    detail = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    _complain(f"unexpected {type(error).__name__}: {detail} (--debug shows where)")
    return 2


def _usage(error: Any) -> str:
    """The message of a usage error, without click's `Invalid value:`, which says nothing."""
    text = str(error.format_message())
    for prefix in ("Invalid value: ", "Invalid value for "):
        text = text.removeprefix(prefix)
    return text.replace(": Input should be ", " should be ")


def _complain(message: str) -> None:
    print("error: " + " ".join(line.strip() for line in message.splitlines() if line.strip()), file=sys.stderr)
