"""Calling functions that the user wrote, named as `file.py:function`."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebudget_runtime.errors import EdgeBudgetError, UsageError


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function of the user's; its failures come back as one line with file and line."""

    path: Path
    name: str
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call it.

        Raises:
            UsageError: EB163, it raised.
        """
        with _beside(self.path):
            try:
                return self.function(*args)
            except EdgeBudgetError:
                raise
            except (Exception, SystemExit) as e:
                raise UsageError(
                    "EB163",
                    f"{_where(self.path, e)}: {self.name}() raised {_brief(e)}",
                    hint="run the function on its own to see the whole error",
                ) from e

    def where(self) -> str:
        """File and line of the definition, for messages."""
        try:
            line = inspect.getsourcelines(self.function)[1]
        except (OSError, TypeError):
            return str(self.path)
        return f"{self.path}:{line}"


def is_user_code(source: str) -> bool:
    """Whether `source` reads `file.py:function` (or a bare `.py` file, which is a mistake)."""
    return source.endswith(".py") or ".py:" in source


def load_function(source: str, purpose: str) -> UserFunction:
    """Import the function named by `file.py:function`; `purpose` goes into messages.

    Raises:
        UsageError: EB161 the file is missing or does not import, EB162 it has no such function.
    """
    file, _, name = source.rpartition(":") if ".py:" in source else (source, "", "")
    path = Path(file)
    if not path.is_file():
        raise UsageError("EB161", f"no file {file} for the {purpose}", hint="check the path")
    module = _import(path)
    callables = sorted(
        k for k, v in vars(module).items() if callable(v) and v.__module__ == module.__name__
    )
    if not name:
        raise UsageError(
            "EB162",
            f"{file}: which function gives the {purpose}?",
            hint=f"write {file}:{callables[0] if callables else 'function'}",
        )
    function = getattr(module, name, None)
    if not callable(function):
        close = difflib.get_close_matches(name, callables, n=1)
        known = ", ".join(callables[:8]) or "none"
        raise UsageError(
            "EB162",
            f"{file} has no function {name!r} for the {purpose}",
            hint=f"did you mean {file}:{close[0]}?" if close else f"functions there: {known}",
        )
    return UserFunction(path, name, function)


def _import(path: Path) -> Any:
    name = f"_edgebudget_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file always has an import spec"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch look their module up by name
    with _beside(path):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as e:
            del sys.modules[name]
            raise UsageError(
                "EB161", f"{_where(path, e)}: cannot import: {_brief(e)}", hint="mend that line"
            ) from e
    return module


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let user code import the files beside it, as it could when run as a script."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _where(path: Path, e: BaseException) -> str:
    """The deepest line of the user's own file that led to `e`."""
    if isinstance(e, SyntaxError) and e.filename and Path(e.filename).name == path.name:
        return f"{path}:{e.lineno}"
    own = path.resolve()
    lines = [
        f.lineno for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).resolve() == own
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _brief(e: BaseException) -> str:
    text = str(e).strip()
    return f"{type(e).__name__}: {text.splitlines()[0]}" if text else type(e).__name__
