"""Text of strangers in lines of our own."""

from __future__ import annotations


def escape(text: str) -> str:
    r"""`text` on one line: what is not printable, such as a line end or a terminal's escape code, is spelled as `\n`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
