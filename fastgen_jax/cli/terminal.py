"""What the terminal can show."""

from __future__ import annotations

import os
import sys


def has_colors() -> bool:
    """Whether standard output understands escape codes: a terminal, not a dumb one, and no NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
