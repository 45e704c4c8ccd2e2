"""Log lines as text or as JSON, one entry a line, whatever was in what is logged."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from logging.handlers import WatchedFileHandler
from typing import Any, Literal

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# What terminals obey, or programs take for the end of a line.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class TextFormatter(logging.Formatter):
    """Time, level, logger, message in a line; what belongs to an entry and is not in its line is indented."""

    def __init__(self, source: str | None = None) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {source + ' ' if source else ''}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """One line: text that came with a request cannot begin another entry."""
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Lines that no entry could be."""
        return "\n".join("    " + line for line in super().formatException(ei).splitlines())


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message and whatever else the record was given."""

    def __init__(self, source: str | None = None) -> None:
        super().__init__()
        self._source = {"source": source} if source else {}

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._source,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        text = json.dumps(entry, default=str, ensure_ascii=False)
        return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def set_up_logging(form: Literal["text", "json"], *, file: str | None = None, source: str | None = None) -> None:
    """Sends the log to standard error in this form, and to `file` as well if there is one.

    `source` says in each entry which process wrote it: several may share a file. ValueError if the file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        try:
            # Opened anew when somebody moves it away, as logrotate does.
            handler = WatchedFileHandler(file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ValueError(
                f"log_file {file!r} cannot be written ({error.strerror}); choose another, in a folder that exists"
            ) from None
        if _is_standard_error(file):
            handler.close()
        else:
            handlers.append(handler)
    for handler in handlers:
        handler.setFormatter((JsonFormatter if form == "json" else TextFormatter)(source))
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.getLogger("fastgen_jax").setLevel(logging.INFO)


def _is_standard_error(file: str) -> bool:
    """Whether standard error goes to this file, as it does where a deployment was started in the background."""
    try:
        return os.path.samestat(os.fstat(sys.stderr.fileno()), os.stat(file))
    except (OSError, ValueError):
        return False
