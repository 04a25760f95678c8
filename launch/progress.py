"""Progress of what takes more than two seconds, on stderr: stdout stays for results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is loaded by the commands that show bars
    from rich.progress import Progress, TaskID


class Bars:
    """Bars while `show` is entered, gone after it. A total of 0 or 1 pulses: nothing is known but that it goes on.

    Where stderr is no terminal each thing is said once, in a line.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    @contextmanager
    def show(self, what: str = "") -> Iterator[None]:
        """Show bars; the first one is for `what`, where it is given."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        disable = not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=disable) as self._progress:
            try:
                if what:
                    self.update(what, 0, 0)
                yield
            finally:
                self._progress, self._tasks = None, {}

    def update(self, what: str, done: int, total: int) -> None:
        """How far `what` is; called from any thread, ignored outside of `show`."""
        progress = self._progress
        if progress is None:
            return
        if what not in self._tasks:
            self._tasks[what] = progress.add_task(what, total=None)
            if not self._console.is_terminal:
                self._console.print(f"{what} ...", highlight=False)
        finished = 0 < total <= done
        known = total > 1 or finished
        progress.update(self._tasks[what], completed=done, total=total if known else None)

    def note(self, text: str) -> None:
        """A line that stays, above the bars."""
        self._console.print(text, highlight=False)
