"""How Ray Serve chooses a replica: the one that will finish a prompt first, as `Router` does on one machine.

This module requires Ray; `ray_app.build` names it, and Ray imports it in the process of the ingress.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any  # of Ray, an optional package

from fastgen_jax.scheduling import Request
from fastgen_jax.serving.remote import PrefixMemory, expected_work, prefix_pieces

_RequestRouter: Any = importlib.import_module("ray.serve.request_router").RequestRouter


class PrefixRouter(_RequestRouter):
    """Ranks replicas by the tokens of work until a request would be done there, without those that are probably cached."""

    def initialize_state(self) -> None:
        """Called by Ray after `__init__`."""
        self._memories: dict[Any, PrefixMemory] = {}
        self._work: dict[Any, int] = {}  # tokens; changed with the lock
        self._lock = threading.Lock()

    async def choose_replicas(self, candidate_replicas: Sequence[Any], pending_request: Any = None) -> list[list[Any]]:
        """Returns the replicas in the order in which Ray tries them. Calls other than `generate` may go to any."""
        request = _request_of(pending_request)
        if request is None:
            return [list(candidate_replicas)]
        pieces = prefix_pieces(request.prompt_token_ids, salt=request.cache_salt)

        def cost(replica: Any) -> int:
            memory = self._memories.get(replica.replica_id)
            cached = memory.num_cached_tokens(pieces) if memory is not None else 0
            return self._work.get(replica.replica_id, 0) - cached

        return [[replica] for replica in sorted(candidate_replicas, key=cost)]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Called by Ray when a replica has accepted a request: notes what it caches, and its work until the end."""
        request = _request_of(pending_request)
        if request is None:
            return
        known, work = {replica_id, *self.curr_replicas}, expected_work(request)
        self._memories = {id: memory for id, memory in self._memories.items() if id in known}
        memory = self._memories.setdefault(replica_id, PrefixMemory())
        memory.add(prefix_pieces(request.prompt_token_ids, salt=request.cache_salt))
        with self._lock:
            self._work = {id: work for id, work in self._work.items() if id in known}
            self._work[replica_id] = self._work.get(replica_id, 0) + work

        def ended(*_: object) -> None:  # Ray calls it in another thread
            with self._lock:
                if replica_id in self._work:
                    self._work[replica_id] -= work

        result.add_done_callback(ended)


def _request_of(pending_request: Any) -> Request | None:
    args = getattr(pending_request, "args", None) or (None,)
    return args[0] if isinstance(args[0], Request) else None
