"""A cache in a bucket, used through a local copy: what a start needs is fetched before it, what is new is sent after it.

Each model on each kind of machine has a folder of its own there, so that a start fetches only what it can use, all at once.
Compiled programs have names that determine their contents. The small JSON files are replaced as a whole, and the last writer
wins: each holds a choice that is valid for any start with the same name.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pallas_kernels.buckets import Bucket, BucketError
from pallas_kernels.folders import replace_file

log = logging.getLogger(__name__)

_KEPT = re.compile(r"[\w./-]+(-cache|\.executable|\.json)")  # not locks or incomplete files
_CHANGING = ".json"  # a file with another name never changes
_Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


@dataclass(kw_only=True)
class Mirror:
    """A local folder with the same files as a bucket."""

    bucket: Bucket
    folder: Path
    is_whole: Callable[[Path, bytes], bool]
    """Whether a file is complete: others may be writing while files are sent."""
    _shared: dict[str, _Stamp] = field(default_factory=dict)
    """The local files that the bucket has too, as they were when they were fetched or sent."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _usable: bool = True

    def fetch(self) -> None:
        """Brings all files that are missing here; logs a warning if the bucket cannot be read, and never sends then."""
        with self._lock:
            try:
                names = [name for name in self.bucket.names() if _KEPT.fullmatch(name) and ".." not in name.split("/")]
                missing = [name for name in names if name.endswith(_CHANGING) or not (self.folder / name).exists()]
                contents = self.bucket.read(missing)
            except BucketError as error:
                self._usable = False
                log.warning("the cache in the bucket is not used (%s); its local copy is %s", error, self.folder)
                return
            for name, content in contents.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, content)
            self._shared = {name: stamp for name, stamp in self._files().items() if name in set(names)}
            size = sum(map(len, contents.values()))
            log.info("%d files (%.1f MB) fetched from %s", len(contents), size / 1e6, self.bucket.url)

    def send(self) -> None:
        """Sends all files that are new or changed here; logs a warning if the bucket cannot be written."""
        with self._lock:
            if not self._usable:
                return
            new = {name: stamp for name, stamp in self._files().items() if self._shared.get(name) != stamp}
            try:
                contents = {name: (self.folder / name).read_bytes() for name in new}
                contents = {name: c for name, c in contents.items() if self.is_whole(self.folder / name, c)}
                self.bucket.write(contents)
            except OSError as error:  # BucketError is one
                self._usable = False
                log.warning("nothing more is added to the cache in the bucket (%s)", error)
                return
            self._shared |= {name: new[name] for name in contents}
            size = sum(map(len, contents.values()))
            log.info("%d files (%.1f MB) sent to %s", len(contents), size / 1e6, self.bucket.url)

    def _files(self) -> dict[str, _Stamp]:
        found: dict[str, _Stamp] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if _KEPT.fullmatch(name) and path.is_file():
                status = path.stat()
                found[name] = (status.st_size, status.st_mtime_ns)
        return found
