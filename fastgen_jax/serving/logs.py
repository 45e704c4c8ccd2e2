"""Log entries as text or as JSON. Nothing that a client sends can start another entry or control a terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from logging.handlers import WatchedFileHandler
from types import TracebackType
from typing import Literal

from pythonjsonlogger.json import JsonFormatter as BaseJsonFormatter

from fastgen_jax.json_types import JsonObject

_ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
# Characters that terminals interpret, or that programs take for the end of a line.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class TextFormatter(logging.Formatter):
    """Time, level, logger and message on one line; exceptions follow, indented."""

    def __init__(self, source: str | None = None) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {source + ' ' if source else ''}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (overrides logging's method)
        """Returns one line, with control characters escaped so that request data cannot start another entry."""
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().formatMessage(record))

    def formatException(self, ei: _ExceptionInfo) -> str:  # noqa: N802 (overrides logging's method)
        """Returns the traceback, indented so that none of its lines looks like an entry."""
        return "\n".join("    " + line for line in super().formatException(ei).splitlines())


class JsonFormatter(BaseJsonFormatter):
    """One JSON object per line: time, level, source, logger, message, the record's extra fields, and the exception."""

    converter = time.gmtime
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, source: str | None = None) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger", "exc_info": "exception"},
            static_fields={"source": source} if source else {},
            json_default=str,
            json_ensure_ascii=False,
        )

    def process_log_record(self, log_data: JsonObject) -> JsonObject:
        """Writes the level in lower case, as most log collectors expect."""
        return {**log_data, "level": log_data["level"].lower()}

    def serialize_log_record(self, log_data: JsonObject) -> str:
        """Escapes what JSON allows inside a string but terminals and line readers interpret."""
        text = super().serialize_log_record(log_data)
        return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def set_up_logging(form: Literal["text", "json"], *, file: str | None = None, source: str | None = None) -> None:
    """Sends the log to standard error in this form, and also to `file` if one is given.

    `source` names the writing process in each entry, because several processes may share a file. Raises ValueError if
    the file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        try:
            # Reopens the file when logrotate moves it away.
            handler = WatchedFileHandler(file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ValueError(
                f"log_file {file!r} cannot be written ({error.strerror}); choose a file in an existing, writable folder"
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
    """Whether standard error already goes to this file, as in a deployment started in the background."""
    try:
        return os.path.samestat(os.fstat(sys.stderr.fileno()), os.stat(file))
    except (OSError, ValueError):
        return False
