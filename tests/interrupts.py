"""KeyboardInterrupts at chosen points: at the very places where CPython would raise one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PLACES = ("/fastgen_jax/", "/jax/_src/")
"""Parts of the paths of the code that is interrupted."""


class Points:
    """Counts the points of our code that are passed, and raises KeyboardInterrupt at the one that is chosen.

    A point is the entry into a function, or the return of one written in C: between these, CPython 3.11 and later look for
    signals at most where a loop jumps back.
    """

    def __init__(self) -> None:
        self.left = 0
        self.num_raised = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Counts in this block; once `left` points have passed, the next raises, and nothing is counted any more."""
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return") and any(place in frame.f_code.co_filename for place in PLACES):
            self.left -= 1
            if self.left == 0:
                self.num_raised += 1
                raise KeyboardInterrupt
