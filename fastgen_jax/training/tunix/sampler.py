"""An engine as a sampler of tunix' distributed learners: answers, and weight updates in phases."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastgen_jax.api.async_engine import AsyncEngine
from fastgen_jax.scheduling import SamplingParams
from fastgen_jax.training.tunix.model import params_from_state
from fastgen_jax.training.tunix.rollout import Answer

_ORDER = {"idle": 0, "prepared": 1, "h2d_done": 2, "committed": 3, "aborted": 3}
"""The phases of an update, by the names with which tunix' coordinator asks for them."""


class Sampler:
    """The methods of `tunix.experimental.rollout.sampler.Sampler`, and of a destination of weights, over `engine`.

    An update has a key, `(req_id, uuid)` in `extra_config` of its requests. `pre_weight_sync` pauses the engine,
    `weight_sync` takes the new weights without using them, and `post_weight_sync` exchanges them and resumes;
    `abort_weight_sync` resumes with the old ones. Each may be repeated, and requests of earlier updates are refused with a
    ValueError. The weights are arrays in this process, or a checkpoint that it can read: `extra_config["params"]` or
    `extra_config["path"]`.
    """

    def __init__(self, engine: AsyncEngine, *, server_id: str = "fastgen") -> None:
        self.server_id = server_id
        self._engine = engine
        self._lock = asyncio.Lock()
        self._round: dict[str, Any] = {"req_id": None, "uuid": -1, "phase": "idle", "policy_version": -1}
        self._pending: Any = None

    def initialize(self) -> None:
        """Nothing: the engine was made before."""

    async def start(self, **kwargs: Any) -> bool:
        """Nothing: the engine takes requests as soon as they come."""
        return True

    async def stop(self, **kwargs: Any) -> bool:
        """Ends the engine's thread after the requests that run."""
        await self._engine.close()
        return True

    async def pause(self, **kwargs: Any) -> bool:
        """Keeps all requests and stops between two steps."""
        await self._engine.pause("keep")
        return True

    async def resume(self, **kwargs: Any) -> bool:
        """Continues after a pause."""
        await self._engine.resume()
        return True

    async def get_mesh(self, **kwargs: Any) -> None:
        """None: arrays are put where the engine needs them."""
        return

    async def sample(self, sampling_requests: Any, **kwargs: Any) -> Any:
        """A `SamplingResponse` to a request, or a list of them to a list, all generated at the same time.

        A prompt is text, token ids or chat messages. `logprobs`, if requested, are over the whole vocabulary at the
        temperature of the request. `route_key`, by which tunix keeps the turns of a conversation together, has no effect
        within one engine: its prefix cache finds them. ValueError for a setting that the engine does not have.
        """
        kwargs.pop("route_key", None)
        if kwargs:
            raise ValueError(f"sample got {sorted(kwargs)}, which this sampler does not support; remove them")
        is_list = isinstance(sampling_requests, list | tuple)
        requests = sampling_requests if is_list else [sampling_requests]
        answers = await asyncio.gather(*map(self._answer, requests))
        return list(answers) if is_list else answers[0]

    async def _answer(self, request: Any) -> Any:
        from tunix.experimental.rollout.sampler import SamplingResponse  # pyright: ignore[reportMissingImports]

        wanted = getattr(request, "sampling_params", None)
        params = SamplingParams(max_new_tokens=64, logprobs=0) if wanted is None else sampling_params(wanted)
        ids = await asyncio.to_thread(self._engine.intake.encode, getattr(request, "prompt", request))
        answer, text = Answer(is_greedy=params.greedy), ""
        async for output in self._engine.generate(ids, params):
            answer.extend(output)
            text += output.text
        return SamplingResponse(
            request_id=getattr(request, "request_id", ""),
            text=text,
            prompt_token_ids=np.array(ids, np.int32),
            token_ids=np.array(answer.token_ids, np.int32),
            logprobs=answer.logprobs if wanted is not None and wanted.return_logprobs else None,
            finish_reason=answer.finish_reason or "stop",
        )

    async def get_load_info(self, **kwargs: Any) -> Any:
        """The load of the engine as tunix' `LoadInfo`."""
        from tunix.experimental.rollout.sampler import LoadInfo  # pyright: ignore[reportMissingImports]

        load = self._engine.load
        used = 1.0 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0
        return LoadInfo(
            num_requests_waiting=load.num_waiting, num_requests_running=load.num_running, kv_cache_usage_perc=used
        )

    async def bind_weight_sync(self, **kwargs: Any) -> None:
        """Nothing: weights come with the request."""
        return

    async def get_weight_sync_metadata(self, **kwargs: Any) -> Sequence[Any]:
        """Nothing to connect to."""
        return ()

    async def pre_weight_sync(self, sync_request: Any = None, **kwargs: Any) -> Mapping[str, Any]:
        """Begins an update: running requests are kept, and stop between two steps."""
        async with self._lock:
            if self._enter(sync_request, "prepared"):
                await self._engine.pause("keep")
                self._round["phase"] = "prepared"
            return dict(self._round)

    async def weight_sync(self, sync_request: Any = None, **kwargs: Any) -> Mapping[str, Any]:
        """Takes the new weights; the engine keeps the old ones until `post_weight_sync`."""
        async with self._lock:
            if self._enter(sync_request, "h2d_done"):
                extra = sync_request.extra_config
                if ("params" in extra) == ("path" in extra):
                    raise ValueError("extra_config needs either 'params', a state or pytree, or 'path', a checkpoint")
                self._pending = extra["path"] if "path" in extra else self._in_form(extra["params"])
                self._round["phase"] = "h2d_done"
            return dict(self._round)

    async def post_weight_sync(self, sync_request: Any = None, **kwargs: Any) -> Mapping[str, Any]:
        """Exchanges the weights and continues; requests that ran continue with the new ones."""
        async with self._lock:
            if self._enter(sync_request, "committed"):
                if self._round["phase"] != "h2d_done":
                    raise ValueError(f"the update is {self._round['phase']!r}: call weight_sync before post_weight_sync")
                await self._engine.update_params(self._pending, version=self._round["policy_version"])
                await self._engine.resume()
                self._pending, self._round["phase"] = None, "committed"
            return dict(self._round)

    async def abort_weight_sync(self, sync_request: Any = None, **kwargs: Any) -> Mapping[str, Any]:
        """Forgets the new weights and continues with the old ones; nothing after `post_weight_sync`."""
        async with self._lock:
            if self._enter(sync_request, "aborted"):
                self._pending, self._round["phase"] = None, "aborted"
                await self._engine.resume()
            return dict(self._round)

    async def get_weight_sync_status(self, **kwargs: Any) -> Mapping[str, Any]:
        """The key of the last update, its phase and its version."""
        return dict(self._round)

    def _in_form(self, params: Any) -> Any:
        is_plain = isinstance(params, Mapping) and "layers" in params and "embed" in params
        return params if is_plain else params_from_state(params, self._engine.intake.model)

    def _enter(self, request: Any, phase: str) -> bool:
        """Whether `phase` of the update of this request is still to do; ValueError if it must not be done."""
        extra = getattr(request, "extra_config", None) or {}
        req_id, uuid = extra.get("req_id", ""), int(extra.get("uuid", 0))
        now = self._round
        if uuid < now["uuid"] or (uuid == now["uuid"] and req_id != now["req_id"]):
            raise ValueError(
                f"the update {req_id!r} ({uuid}) is older than {now['req_id']!r} ({now['uuid']}); begin a new one with a "
                "larger uuid"
            )
        if uuid > now["uuid"]:
            if phase not in ("prepared", "aborted"):
                raise ValueError(f"the update {req_id!r} ({uuid}) has not begun; call pre_weight_sync first")
            version = int(getattr(request, "policy_version", 0))
            self._round = now = {"req_id": req_id, "uuid": uuid, "phase": "idle", "policy_version": version}
            self._pending = None
        if phase == "committed" and now["phase"] == "aborted":
            raise ValueError(f"the update {req_id!r} ({uuid}) was aborted; begin a new one with a larger uuid")
        return _ORDER[phase] > _ORDER[now["phase"]]


def sampling_params(wanted: Any) -> SamplingParams:
    """Parameters for tunix' `SamplingParams`; ValueError for beams and logits."""
    if wanted.return_logits or wanted.beam_size:
        raise ValueError("return_logits and beam_size are not supported by this sampler; leave them unset")
    is_greedy = wanted.temperature == 0
    return SamplingParams(
        max_new_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        top_p=None if is_greedy else wanted.top_p,
        top_k=None if is_greedy else wanted.top_k,
        seed=wanted.seed,
        logprobs=0,
    )
