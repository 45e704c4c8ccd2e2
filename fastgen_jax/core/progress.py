"""Progress of a long task: a bar for users at a terminal, log lines otherwise."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

LOG_SECONDS = 5.0  # between two lines of one task


@contextlib.contextmanager
def shown(log: logging.Logger, task: str, *, total: int, unit: str, bar: bool) -> Iterator[Callable[[], object]]:
    """Context whose value must be called after each of the `total` units.

    With `bar`, shows a bar if stderr is interactive. Otherwise logs lines of level INFO: one at the start, one every few
    seconds, one at the end.
    """
    if bar and is_interactive():
        from tqdm import tqdm

        with tqdm(total=total, desc=task, unit=unit) as shown_bar:
            yield shown_bar.update
        return
    start = last = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last >= LOG_SECONDS and done < total:
            last = now
            log.info("%s: %d of %d %ss after %.1f s", task, done, total, unit, now - start)

    log.info("%s: %d %ss", task, total, unit)
    yield advance
    log.info("%s: done in %.1f s", task, time.monotonic() - start)


def is_interactive() -> bool:
    """Whether standard error goes to a terminal or a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return (shell is not None and "IPKernelApp" in shell.config) or (sys.stderr is not None and sys.stderr.isatty())
