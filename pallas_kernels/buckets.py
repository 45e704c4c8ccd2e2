"""Objects in a bucket of Google Cloud Storage, by the names that follow a URL such as gs://bucket/prefix.

TensorStore sends the requests. It finds credentials as Google's libraries do: GOOGLE_APPLICATION_CREDENTIALS, those of
`gcloud auth application-default login`, or the service account of a machine in Google's cloud.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorstore import KvStore

SCHEME = "gs://"
SECONDS = 60.0  # for all requests of one call
_RETRIES = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}  # TensorStore's 32 would take many minutes
_ATTEMPTS = 10  # of an update, each undone by that of another process


class BucketError(OSError):
    """A bucket cannot be read or written: it does not exist, access is denied, or there is no connection."""


def is_url(name: str) -> bool:
    """Whether `name` is the URL of a bucket and not a path; ValueError for a URL with another scheme."""
    if "://" in name and not name.startswith(SCHEME):
        raise ValueError(f"{name!r} is a URL with an unsupported scheme; use {SCHEME}bucket/prefix, or a folder")
    return name.startswith(SCHEME)


class Bucket:
    """The objects below `url`. Methods raise BucketError, and nothing else, if a request fails."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") + "/"

    def names(self) -> list[str]:
        """The names of all objects, relative to `url`."""
        with self._requests() as (store, deadline):
            store.read("no-such-object").result(deadline=deadline)  # raises if access is denied, where `list` finds nothing
            return [name.decode() for name in store.list().result(deadline=deadline)]

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """Contents by name, read in parallel; objects that do not exist are left out."""
        with self._requests() as (store, deadline):
            futures = {name: store.read(name) for name in names}
            results = {name: future.result(deadline=deadline) for name, future in futures.items()}
        return {name: result.value for name, result in results.items() if result.state == "value"}

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Creates or replaces objects, in parallel. A reader gets either the old or the new contents of an object."""
        with self._requests() as (store, deadline):
            futures = [store.write(name, value) for name, value in contents.items()]
            for future in futures:
                future.result(deadline=deadline)

    def update(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replaces an object by `change(contents)`; its argument is None if there is no object.

        If another process replaces the object in between, `change` is called again with the new contents: no update is
        lost.
        """
        with self._requests() as (store, deadline):
            for _ in range(_ATTEMPTS):
                found = store.read(name).result(deadline=deadline)
                value = change(found.value if found.state == "value" else None)
                written = store.write(name, value, if_equal=found.stamp.generation).result(deadline=deadline)
                if written.generation:  # empty if the object's generation is another
                    return
        raise BucketError(f"{self.url}{name} was replaced by others during each of {_ATTEMPTS} updates")

    @contextlib.contextmanager
    def _requests(self) -> Iterator[tuple[KvStore, float]]:
        """The open store and the time by which all of its requests must be answered."""
        import tensorstore

        deadline = time.time() + SECONDS
        bucket, _, path = self.url.removeprefix(SCHEME).partition("/")
        spec: dict[str, Any] = {"driver": "gcs", "bucket": bucket, "path": path}
        try:
            context = tensorstore.Context({"gcs_request_retries": _RETRIES})
            yield tensorstore.KvStore.open(spec, context=context).result(deadline=deadline), deadline
        except TimeoutError as error:
            raise BucketError(f"no answer from {self.url} within {SECONDS:.0f} seconds") from error
        except Exception as error:  # TensorStore raises ValueError, RuntimeError and others
            raise BucketError(f"{self.url}: {' '.join(str(error).split())[:300]}") from error
