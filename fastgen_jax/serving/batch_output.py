"""The output of a batch: one answer per line. It is also the only record of what is done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypedDict

from fastgen_jax.serving.batch_input import BatchInput

FLUSH_EVERY = 64  # answers between two flushes to the disk
_START = b'{"id": "batch-'  # of every answer
# Not encodable in UTF-8, or taken for the end of a line by some programs.
_NEEDS_ESCAPE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Response(TypedDict):
    """The server's response to a line."""

    status_code: int
    body: object
    request_id: str | None


class Error(TypedDict):
    """Why there is no response to a line."""

    code: str
    message: str


class Answer(TypedDict):
    """A line of the output, in OpenAI's batch format: a response or an error."""

    id: str
    custom_id: str | float
    response: Response | None
    error: Error | None


class Done:
    """The set of input lines that have an answer: one bit per line."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0

    def add(self, line: int) -> None:
        """Adds a line."""
        if line in self:
            return
        index = line >> 3
        if index >= len(self._bits):
            self._bits.extend(bytes(index + 1 - len(self._bits)))
        self._bits[index] |= 1 << (line & 7)
        self.count += 1

    def __contains__(self, line: int) -> bool:
        index = line >> 3
        return index < len(self._bits) and bool(self._bits[index] >> (line & 7) & 1)


def is_error(answer: Answer) -> bool:
    """Whether the answer is an error of the line or of the server."""
    if answer["error"] is not None:
        return True
    if answer["response"] is None:
        raise ValueError(f"{answer['id']} has neither a response nor an error")
    return answer["response"]["status_code"] != 200


class BatchOutput:
    """A file of answers, open for appending; one batch at a time may write to it.

    Opening it cuts off an incomplete last answer and removes answers that are errors, so that their lines are sent again.
    `done` has the lines with the remaining answers. Raises ValueError, and changes nothing, if the file is not the output
    of a batch, answers another input, or is being written by another batch.
    """

    def __init__(self, path: Path, source: BatchInput) -> None:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file; pass a file for the answers")
        if path.exists() and path.samefile(source.path):
            raise ValueError(f"{path} is the input itself; pass another file for the answers")
        if not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} of the output does not exist; create it: mkdir -p {path.parent}")
        self.path = Path(os.path.realpath(path))  # keep a symbolic link
        self.done = Done()
        self._unflushed = 0
        with contextlib.ExitStack() as opened, _as_value_error(path):
            self._file: BinaryIO = opened.enter_context(self.path.open("a+b", buffering=0))
            _lock(self._file, path)
            end, num_errors = self._read(source)
            if num_errors:
                self._file = opened.enter_context(self._without_errors())
            else:
                self._file.truncate(end)
            self._end = os.fstat(self._file.fileno()).st_size
            self._opened = opened.pop_all()

    def write(self, answer: Answer) -> None:
        """Appends an answer completely or not at all; ValueError if the disk is full."""
        text = json.dumps(answer, ensure_ascii=False)
        if _NEEDS_ESCAPE.search(text):
            text = json.dumps(answer)
        data = memoryview(text.encode() + b"\n")
        with _as_value_error(self.path):
            try:
                rest = data
                while rest:
                    rest = rest[self._file.write(rest) :]
                self._unflushed += 1
                if self._unflushed >= FLUSH_EVERY:
                    self.flush()
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
        self._end += len(data)

    def flush(self) -> None:
        """Returns when everything written is on disk."""
        os.fsync(self._file.fileno())
        self._unflushed = 0

    def close(self) -> None:
        """Closes the file, which lets another batch write to it."""
        self._opened.close()

    def _read(self, source: BatchInput) -> tuple[int, int]:
        """Fills `done`; returns the end of the last complete answer and the number of errors."""
        end, num_errors = 0, 0
        for number, (raw, answer) in enumerate(self._answers()):
            if answer is None and raw.endswith(b"\n"):
                raise ValueError(
                    f"{self.path} is not the output of a batch (line {number + 1} is not an answer); choose another "
                    "output file"
                )
            if answer is None:
                if not (raw.startswith(_START) or _START.startswith(raw)):
                    raise ValueError(f"{self.path} is not the output of a batch; choose another output file")
                break  # the last line, cut off
            end += len(raw)
            if is_error(answer):
                num_errors += 1
                continue
            line = _number(answer)
            if not source.could_be(line, answer.get("custom_id")):
                raise ValueError(
                    f"{self.path} has answers to another input: its line {number + 1} answers batch-{line}, "
                    f"custom_id {answer.get('custom_id')!r}, but {source.path} has no such line; choose "
                    "another output file"
                )
            self.done.add(line)
        return end, num_errors

    def _answers(self) -> Iterator[tuple[bytes, Answer | None]]:
        """Each line and its answer; None if it is not a complete answer."""
        with self.path.open("rb") as file:
            for raw in file:
                try:
                    answer: Answer = json.loads(raw)
                    is_error(answer)  # raises if a field is missing
                    _number(answer)
                    complete = raw.endswith(b"\n")
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    complete = False
                yield raw, answer if complete else None

    @contextlib.contextmanager
    def _without_errors(self) -> Iterator[BinaryIO]:
        """Replaces the file by one without errors, atomically."""
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                for raw, answer in self._answers():
                    if answer is not None and not is_error(answer):
                        file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self.path, scratch)
            with scratch.open("ab", buffering=0) as file:
                _lock(file, self.path)
                os.replace(scratch, self.path)
                yield file
        finally:
            scratch.unlink(missing_ok=True)


def _number(answer: Answer) -> int:
    digits = answer["id"].removeprefix("batch-")
    if not digits.isdecimal():
        raise ValueError(f"{answer['id']!r} is not the id of an answer")
    return int(digits)


def _lock(file: BinaryIO, path: Path) -> None:
    """Keeps other batches from writing to the file while it is open; ValueError if one already does.

    The lock is on the output itself, so no lock file stays in the user's folder, as filelock would leave one.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another batch is writing {path}; wait until it ends, or choose another output file") from None
    except OSError:  # a file system without locks
        return


@contextlib.contextmanager
def _as_value_error(path: Path) -> Iterator[None]:
    """Turns an OSError about the output into a ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror or error}; the answers so far are kept: fix the cause "
            "and run the same batch again"
        ) from error
