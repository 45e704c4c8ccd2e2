"""What a long task is doing, how far it is and how long it will take: one line at a terminal, log lines otherwise."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

LOG_SECONDS = 5.0  # between two lines of one phase
REFRESH_SECONDS = 0.5  # of the line at a terminal, so that the elapsed time advances


class Phases:
    """The display of a task with several phases, one after another; a context manager.

        with Phases(log, names=["loading", "compiling"], expected={"loading": 2.0}, bar=True) as phases:
            with phases.phase("loading", total=30, unit="weight") as advance: ...
            with phases.phase("compiling"): ...

    With `bar`, shows one line if stderr is interactive: which phase of how many, its progress, and the time left if
    `expected` has the usual seconds of the phases. Otherwise logs lines of level INFO: one at the start of a phase, one
    every few seconds, one at its end.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        bar: bool,
        names: Sequence[str] = (),
        expected: Mapping[str, float] | None = None,
    ) -> None:
        self.seconds: dict[str, float] = {}
        """How long each phase took, in order."""
        self.expected = dict(expected or {})
        self._log = log
        self.names = list(names)
        """All phases, in order."""
        self._bar: Any = None
        self._interactive = bar and is_interactive()
        self._over = threading.Event()
        self._clock: threading.Thread | None = None
        self._current, self._began = "", 0.0

    def __enter__(self) -> Phases:
        if self._interactive:
            self._clock = threading.Thread(target=self._refresh, daemon=True, name="fastgen-progress")
            self._clock.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._clock is not None:
            self._clock.join()

    @contextlib.contextmanager
    def phase(self, name: str, *, total: int | None = None, unit: str = "step") -> Iterator[Callable[[], object]]:
        """Context of one phase; its value must be called after each of the `total` units, if there is a total."""
        self._current, self._began = name, time.monotonic()
        shown = self._shown(name, total, unit) if self._interactive else self._logged(name, total, unit)
        with shown as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - self._began

    def say(self, text: str) -> None:
        """One line that stays: at the terminal if the display is there, else in the log."""
        if self._interactive:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            self._log.info("%s", text)

    def left(self, name: str) -> float | None:
        """Seconds until the last phase is usually over, while `name` runs; None if nothing is known about them."""
        later = self.names[self.names.index(name) + 1 :] if name in self.names else []
        if name not in self.expected:
            return None
        elapsed = time.monotonic() - self._began
        return max(0.0, self.expected[name] - elapsed) + sum(self.expected.get(other, 0.0) for other in later)

    @contextlib.contextmanager
    def _shown(self, name: str, total: int | None, unit: str) -> Iterator[Callable[[], object]]:
        from tqdm import tqdm

        place = f"[{self.names.index(name) + 1}/{len(self.names)}] " if name in self.names else ""
        with tqdm(
            total=total,
            desc=place + name,
            unit=unit,
            leave=not self.names,
            bar_format=None if total else "{desc} {elapsed}{postfix}",
        ) as bar:
            self._bar = bar
            self._tell_time(name)
            bar.refresh()
            try:
                yield bar.update
            finally:
                self._bar = None

    def _tell_time(self, name: str) -> None:
        left, bar = self.left(name), self._bar
        if left is not None and bar is not None:
            bar.set_postfix_str(f"ready in about {left:.0f} s", refresh=False)

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_SECONDS):
            bar = self._bar
            if bar is not None:
                self._tell_time(self._current)
                bar.refresh()

    @contextlib.contextmanager
    def _logged(self, name: str, total: int | None, unit: str) -> Iterator[Callable[[], object]]:
        start = last = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, last
            done += 1
            now = time.monotonic()
            if total is not None and now - last >= LOG_SECONDS and done < total:
                last = now
                self._log.info("%s: %d of %d %ss after %.1f s", name, done, total, unit, now - start)

        left = self.left(name)
        usual = "" if left is None else f", ready in about {left:.0f} s"
        self._log.info("%s%s%s", name, "" if total is None else f": {total} {unit}{'s' if total > 1 else ''}", usual)
        yield advance
        self._log.info("%s: done in %.1f s", name, time.monotonic() - start)


@contextlib.contextmanager
def shown(log: logging.Logger, task: str, *, total: int, unit: str, bar: bool | Phases) -> Iterator[Callable[[], object]]:
    """`Phases.phase` of the display `bar`, or of one for this task alone, which `bar=True` shows at a terminal."""
    with contextlib.ExitStack() as stack:
        phases = bar if isinstance(bar, Phases) else stack.enter_context(Phases(log, bar=bar))
        yield stack.enter_context(phases.phase(task, total=total, unit=unit))


def is_interactive() -> bool:
    """Whether standard error goes to a terminal or a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return (shell is not None and "IPKernelApp" in shell.config) or (sys.stderr is not None and sys.stderr.isatty())
