"""The page at /, as one document that fetches nothing, and the policy that holds a browser to that."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

_LIBRARY = re.compile(r'<script src="(vendor/[\w.]+)"></script>')


def load_page() -> tuple[str, dict[str, str]]:
    """The HTML, with the libraries that it names put into it, and the headers that go with it.

    What the page shows was written by a model, which may have been told to do harm: only the scripts and styles that are
    part of the page run, only this server is asked, and no image or other thing is loaded from anywhere.
    """
    folder = files("fastgen_jax.serving").joinpath("page")

    def library(found: re.Match[str]) -> str:
        text = folder.joinpath(found[1]).read_text(encoding="utf-8")
        if "</script" in text.lower():
            raise ValueError(f"{found[1]} has the end of a script in it; it cannot be part of a page")
        return f"<script>{text}</script>"

    html = _LIBRARY.sub(library, folder.joinpath("index.html").read_text(encoding="utf-8"))
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script", html),
        "style-src": _hashes("style", html),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html, {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _hashes(tag: str, html: str) -> str:
    """Names every element of that kind by what is in it."""
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
