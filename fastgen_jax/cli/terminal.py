"""What the terminal supports."""

from __future__ import annotations

import os
import sys


def has_colors() -> bool:
    """Whether standard output is a terminal that understands escape codes and NO_COLOR (no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
