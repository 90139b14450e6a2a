"""The command line. Heavy libraries load inside the commands that need them, never at start."""

from __future__ import annotations

import atexit
import gc
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from edgebudget.cli import (
    cascading,
    compiling,
    fronting,
    listing,
    looking,
    profiling,
    running,
    simulating,
)
from edgebudget.cli.output import fail
from edgebudget_runtime.errors import EdgeBudgetError, UsageError

__all__ = ["app", "main"]

_INTERRUPTED = 130  # what a shell reports for Ctrl-C
# typer carries a copy of click under a name that changes; this is click's ClickException.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]
# Module -> distribution, for what only the `compile` extra brings.
_EXTRA = {
    "torch": "torch",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "torch_pruning": "torch-pruning",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
}

app = typer.Typer(
    name="edgebudget",
    help="Compile a pretrained model to a budget, proven on the exported file.",
    epilog="Exit codes: 0 every limit is proven, 2 usage, 3 infeasible, 4 missed (the best so far"
    " is saved), 5 bad input, 6 target unavailable, 130 interrupted.",
    add_completion=False,
)
for group in (compiling, cascading, running, profiling, fronting, simulating, looking, listing):
    group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"edgebudget {version('edgebudget')}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback with every error (works anywhere).")
    ] = False,
) -> None:
    """Options of every command; `main` acts on --debug."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Prints one short block for an error: EB100 a command line that cannot be parsed, EB107 a
    missing library, EB900 a defect of edgebudget.
    """
    if argv is None:  # a process of its own: taking it all apart would last longer than `run`
        atexit.register(gc.freeze)
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not debug:
        warnings.simplefilter("ignore")  # the libraries' own, of no use to who compiles
    try:
        code = app(arguments, prog_name="edgebudget", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED  # newer typer returns it, older raises
    except Exception as e:
        if debug:
            traceback.print_exc()
        else:
            fail(str(_explained(e, arguments)))
        return _exit_code(e)
    if code == _INTERRUPTED:
        fail("interrupted; the same command goes on from the last finished step")
    return code if isinstance(code, int) else 0


def _explained(e: Exception, arguments: Sequence[str]) -> Exception | str:
    if isinstance(e, EdgeBudgetError):
        return e
    if isinstance(e, _CommandLineError):
        message = getattr(e, "format_message", lambda: str(e))().strip().splitlines()
        return UsageError(
            "EB100", message[0] if message else type(e).__name__, hint=_usage(arguments)
        )
    if isinstance(e, ModuleNotFoundError) and (e.name or "").partition(".")[0] in _EXTRA:
        missing = _EXTRA[(e.name or "").partition(".")[0]]
        return UsageError(
            "EB107",
            f"this command needs {missing}, which is not installed",
            hint='pip install "edgebudget[compile]"',
        )
    first = (str(e).strip().splitlines() or [""])[0]
    return f"[EB900] internal error: {type(e).__name__}: {first}; run with --debug"


def _usage(arguments: Sequence[str]) -> str:
    known = [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands]
    known += [g.name for g in app.registered_groups if g.name]
    word = next((a for a in arguments if not a.startswith("-")), "")
    return f"`edgebudget {word} --help`" if word in known else "`edgebudget --help`"


def _exit_code(e: Exception) -> int:
    if isinstance(e, EdgeBudgetError):
        return e.exit_code
    if isinstance(e, (_CommandLineError, ModuleNotFoundError)):
        return UsageError.exit_code
    return 1
