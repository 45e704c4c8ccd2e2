"""What a GPU's host starts in a step, read from the listing of the operations that XLA's runtime executes."""

from __future__ import annotations

import re
from pathlib import Path

_ENTRY = re.compile(r"^\d+: k(\w+)", re.MULTILINE)  # those within another entry are indented


def started_by_host(listing: str) -> int:
    """How many things the host starts itself; 1 if the whole program is one CUDA graph.

    What a loop outside of a graph starts in each turn is not counted.
    """
    return len(_ENTRY.findall(listing))


def is_one_graph(listing: str) -> bool:
    """Whether the whole program is one CUDA graph (XLA calls it a command buffer)."""
    return _ENTRY.findall(listing) == ["CommandBuffer"]


def find_listing(dump: Path) -> str:
    """The listing of the largest program in a folder that XLA wrote with `xla_dump_to`; "" if there is none."""
    after = "thunk_sequence_after_thunk_passes"  # written only if the passes change something
    found: dict[str, Path] = {}
    for path in sorted(dump.glob("*.thunk_sequence*.txt")):
        found[path.name.partition(".thunk_sequence")[0]] = path if after in path.name else found.get(path.name, path)
    return max((path.read_text() for path in found.values()), key=len, default="")
