"""Events as progress bars on a terminal, and as plain lines elsewhere. Both go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgebudget.cli.output import only_answers
from edgebudget.events import Advanced, Emit, Event, Finished, Said, Started

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PARTS = 10  # lines per piece of work where there is no terminal


@contextmanager
def listening() -> Iterator[Emit]:
    """A listener for one command's work; stdout stays free for the answer."""
    with only_answers():
        if not sys.stderr.isatty():
            yield Lines()
            return
        with _bars() as progress:
            yield Bars(progress)


@dataclass(slots=True)
class Lines:
    """One line when work begins and ends, and about ten in between."""

    _done: dict[str, tuple[int, int | None]] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        """Write what this event is worth."""
        if isinstance(event, Said):
            self._write(f"{event.level}: {event.text}")
        elif isinstance(event, Started):
            self._done[event.work] = (0, event.total)
            self._write(event.work)
        elif isinstance(event, Finished):
            self._done.pop(event.work, None)
            self._write(f"{event.work}: {event.note or 'done'}")
        else:
            self._advance(event)

    def _advance(self, event: Advanced) -> None:
        before, total = self._done.get(event.work, (0, None))
        now = before + event.steps
        self._done[event.work] = (now, total)
        part = max(1, -(-(total or 0) // _PARTS))
        if total and now < total and now // part > before // part:
            note = f", {event.note}" if event.note else ""
            self._write(f"{event.work}: {now} of {total}{note}")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@dataclass(slots=True)
class Bars:
    """One bar per piece of work."""

    _progress: Progress
    _tasks: dict[str, TaskID] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        """Move the bar of this event's work."""
        if isinstance(event, Said):
            style = "yellow" if event.level == "warning" else None
            self._progress.console.print(event.text, style=style, markup=False, highlight=False)
            return
        if isinstance(event, Started):
            self._end(event.work)
            self._tasks[event.work] = self._progress.add_task(
                event.work, total=event.total, note=""
            )
        elif isinstance(event, Finished):
            self._end(event.work, event.note)
        elif event.work in self._tasks:
            task = self._tasks[event.work]
            self._progress.update(task, advance=event.steps, note=event.note)

    def _end(self, work: str, note: str = "") -> None:
        task = self._tasks.pop(work, None)
        if task is None:
            return
        found = next(t for t in self._progress.tasks if t.id == task)
        # An unknown total becomes what was done, so that the bar stops moving.
        self._progress.update(task, total=found.completed or 1, completed=found.completed or 1)
        self._progress.update(task, note=note)
        self._progress.stop_task(task)


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(file=sys.stderr),
        redirect_stdout=False,
        redirect_stderr=True,
    )
