"""Opens a page in the user's browser, and says how to reach it where there is none."""

from __future__ import annotations

import getpass
import os
import sys
import threading
import webbrowser
from urllib.parse import urlsplit


def can_open() -> bool:
    """Whether there is a browser that the user sees: $BROWSER, or that of a desktop on this machine.

    Python's webbrowser would otherwise start a browser for terminals, which blocks the terminal.
    """
    if os.environ.get("BROWSER"):
        return True
    if os.environ.get("COLAB_RELEASE_TAG") or os.environ.get("SSH_CONNECTION"):
        return False
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_page(url: str) -> threading.Thread:
    """Opens a page; returns the thread that waits for the command that does so."""
    thread = threading.Thread(target=webbrowser.open, args=(url,), name="fastgen-browser", daemon=True)
    thread.start()
    return thread


def how_to_reach(url: str) -> list[str]:
    """Lines that say how to reach a page of this machine from the browser in front of the user."""
    port = urlsplit(url).port
    if os.environ.get("COLAB_RELEASE_TAG"):
        return [
            "In Colab, run this command in the terminal or in the background, and show the page with a cell:",
            f"  from google.colab import output; output.serve_kernel_port_as_window({port})",
        ]
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4:  # addresses and ports of the client and of this machine
        return [
            "On your computer, run",
            f"  ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{connection[2]}",
            f"and open {url}/ in its browser.",
        ]
    return [f"Open {url}/ in a browser on this machine."]
