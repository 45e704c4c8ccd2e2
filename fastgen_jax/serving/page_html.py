"""The page at /: a single document that loads nothing else, and the security policy that enforces this."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

_LIBRARY = re.compile(r'<script src="(vendor/[\w.]+)"></script>')


def load_page() -> tuple[str, dict[str, str]]:
    """Returns the HTML, with its libraries inlined, and its response headers.

    The page shows text written by a model, which may be malicious. The policy therefore allows only the page's own scripts
    and styles, connections to this server, and no images or other resources from elsewhere.
    """
    folder = files("fastgen_jax.serving").joinpath("page")

    def library(found: re.Match[str]) -> str:
        text = folder.joinpath(found[1]).read_text(encoding="utf-8")
        if "</script" in text.lower():
            raise ValueError(f"{found[1]} contains '</script', so it cannot be inlined; escape it")
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
    """Identifies every element with this tag by the hash of its content."""
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
