"""Clients of a deployment: `serve` starts one and returns its client, `client` finds one by name."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastgen_jax.api.deployment import Deployment, default_name, deployments, find_deployment, start_server, stop_server
from fastgen_jax.api.pipeline import Response
from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob
from fastgen_jax.engine.prompts import PlainPrompt, Prompt, plain_prompt, split_prompts
from fastgen_jax.json_types import JsonObject

if TYPE_CHECKING:
    import httpx

START_SECONDS = 1800.0  # loading and compiling a large model for the first time
STOP_SECONDS = 120.0
CONNECT_SECONDS = 30.0  # a server listens before it loads its model
KEY_VARIABLE = "FASTGEN_API_KEY"


class ServerError(Exception):
    """The server refused or failed; `status` is the HTTP status, `retry_after` is in seconds, if the server sent it."""

    def __init__(self, message: str, *, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class NoAnswerError(ServerError):
    """No complete answer: the server has ended, is a different one, or took too long. `status` is 503."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503)


def http_settings(deployment: Deployment, *, api_key: str | None = None, timeout: float | None = None) -> dict[str, Any]:
    """Arguments for the httpx client of a deployment; `timeout` is in seconds, for each answer or part of a stream."""
    import httpx

    key = api_key or os.environ.get(KEY_VARIABLE)
    return {
        "base_url": deployment.url,
        "timeout": httpx.Timeout(timeout, connect=CONNECT_SECONDS),
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        "verify": not deployment.url.startswith("https://127."),  # its certificate is for another host
    }


def explain(deployment: Deployment) -> str:
    """Why a deployment does not answer, if that can be found out, and what to do."""
    subject = f"deployment {deployment.name!r}"
    if deployment.is_alive:
        return (
            f"the process of {subject} ({deployment.pid}) is alive but does not answer at {deployment.url}: it may be "
            f"shutting down or hanging{_log_of(deployment)}; end it with `fastgen deployments --stop {deployment.name}`"
        )
    now = next((d for d in deployments() if d.name == deployment.name), None)
    if now is not None:
        return (
            f"{subject} was started again, as process {now.pid} at {now.url}; make a new client: "
            f"fastgen_jax.client({deployment.name!r})"
        )
    return (
        f"{subject} has ended (process {deployment.pid}, {deployment.url}){_log_of(deployment)}; start it again with "
        f"`fastgen serve {deployment.model} --deployment-name {deployment.name}`"
    )


def _log_of(deployment: Deployment) -> str:
    return f"; its log is {deployment.log}" if deployment.log else ""


@contextlib.contextmanager
def explained_errors(deployment: Deployment) -> Iterator[None]:
    """Context that turns connection errors of httpx into NoAnswerError."""
    import httpx

    try:
        yield
    except httpx.TimeoutException as error:
        if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
            raise NoAnswerError(f"no connection to {deployment.url}: {explain(deployment)}") from error
        raise NoAnswerError(
            f"deployment {deployment.name!r} sent nothing within the timeout of this client; raise "
            f"timeout, or look at its load: fastgen top {deployment.name}"
        ) from error
    except httpx.ConnectError as error:
        raise NoAnswerError(f"no connection to {deployment.url} ({error}): {explain(deployment)}") from error
    except httpx.TransportError as error:
        raise NoAnswerError(
            f"the connection broke before the answer was complete ({str(error) or type(error).__name__}): "
            f"{explain(deployment)}"
        ) from error


class _Connection:
    """The common part of both clients: addresses, headers, formats."""

    def __init__(self, deployment: Deployment, *, api_key: str | None, timeout: float | None) -> None:
        self.deployment = deployment
        self._settings = http_settings(deployment, api_key=api_key, timeout=timeout)

    def __repr__(self) -> str:
        there = self.deployment
        state = "" if there.is_alive else ", ended"
        return f"{type(self).__name__}({there.name!r}, {there.model} at {there.url}{state})"

    @property
    def _path(self) -> str:
        return f"/mii/{self.deployment.name}"

    def terminate_server(self, *, timeout: float = STOP_SECONDS) -> None:
        """Ends the deployment when its running requests have finished; it accepts no more. Waits up to `timeout` seconds."""
        stop_server(self.deployment, timeout=timeout)

    @staticmethod
    def _body(prompts: Prompt | Sequence[Prompt], options: Mapping[str, object], **more: object) -> JsonObject:
        return {"prompts": [_json_prompt(plain_prompt(prompt)) for prompt in split_prompts(prompts)], **options, **more}

    @staticmethod
    def _response(answer: JsonObject) -> Response:
        logprobs = {
            name: tuple(_logprob(entry) for entry in answer[name]) if name in answer else None
            for name in ("logprobs", "prompt_logprobs")
        }
        return Response(
            generated_text=answer["generated_text"],
            prompt_length=answer["prompt_length"],
            generated_length=answer["generated_length"],
            finish_reason=answer["finish_reason"],
            token_ids=tuple(answer["token_ids"]),
            cached_length=answer["cached_length"],
            weight_versions=tuple((version, count) for version, count in answer["weight_versions"]),
            **logprobs,
        )


class Client(_Connection):
    """A client of a deployment; its calls block, also in a notebook with a running event loop.

    client = fastgen_jax.client("smollm2-135m-instruct")
    print(client.generate(["DeepSpeed is", "Seattle is"], max_new_tokens=32)[0])
    """

    def __init__(self, deployment: Deployment, *, api_key: str | None = None, timeout: float | None = None) -> None:
        import httpx

        super().__init__(deployment, api_key=api_key, timeout=timeout)
        self._http = httpx.Client(**self._settings)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        streaming_fn: Callable[[list[RequestOutput]], object] | None = None,
        **options: Any,
    ) -> list[Response]:
        """One response per prompt, in order; options are those of the pipeline (`max_new_tokens`, `temperature`, ...).

        With `streaming_fn`, calls it with each new output, in a list of one, and returns an empty list. Raises ServerError,
        or its subclass NoAnswerError if the server is gone.
        """
        if streaming_fn is not None:
            for _, output in self._stream(prompts, options):
                streaming_fn([output])
            return []
        with explained_errors(self.deployment):
            response = self._http.post(self._path, json=self._body(prompts, options))
        return [self._response(answer) for answer in checked(response)]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[RequestOutput]:
        """The outputs for one prompt as they are generated; leaving the loop early ends the request. Raises ServerError."""
        for _, output in self._stream([prompt], options):
            yield output

    def close(self) -> None:
        """Closes the connections; the deployment keeps running."""
        self._http.close()

    def _stream(
        self, prompts: Prompt | Sequence[Prompt], options: Mapping[str, object]
    ) -> Iterator[tuple[int, RequestOutput]]:
        from httpx_sse import EventSource

        body = self._body(prompts, options, stream=True)
        events = _Events()
        with explained_errors(self.deployment), self._http.stream("POST", self._path, json=body) as response:
            if not _is_stream(response):
                response.read()
                checked(response)
            for event in EventSource(response).iter_sse():
                if (item := events.read(event.data)) is not None:
                    yield item
        events.check_end(self.deployment)


class AsyncClient(_Connection):
    """A client of a deployment for asyncio.

    client = fastgen_jax.async_client("smollm2-135m-instruct")
    async for output in client.stream("DeepSpeed is", max_new_tokens=32):
        print(output.text, end="")
    """

    def __init__(self, deployment: Deployment, *, api_key: str | None = None, timeout: float | None = None) -> None:
        import httpx

        super().__init__(deployment, api_key=api_key, timeout=timeout)
        self._http = httpx.AsyncClient(**self._settings)

    async def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Response]:
        """One response per prompt, in order; options are those of the pipeline. Raises ServerError."""
        with explained_errors(self.deployment):
            response = await self._http.post(self._path, json=self._body(prompts, options))
        return [self._response(answer) for answer in checked(response)]

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[RequestOutput]:
        """The outputs for one prompt as they are generated; leaving the loop early ends the request. Raises ServerError."""
        from httpx_sse import EventSource

        body = self._body([prompt], options, stream=True)
        events = _Events()
        with explained_errors(self.deployment):
            async with self._http.stream("POST", self._path, json=body) as response:
                if not _is_stream(response):
                    await response.aread()
                    checked(response)
                async for event in EventSource(response).aiter_sse():
                    if (item := events.read(event.data)) is not None:
                        yield item[1]
        events.check_end(self.deployment)

    async def close(self) -> None:
        """Closes the connections; the deployment keeps running."""
        await self._http.aclose()


def serve(
    model: str | os.PathLike[str],
    *,
    deployment_name: str | None = None,
    replica_num: int = 1,
    tensor_parallel: int | None = None,
    port: int = 0,
    timeout: float = START_SECONDS,
    **options: Any,
) -> Client:
    """Starts a server that outlives this program, waits until it is ready, and returns a client for it.

    Each of the `replica_num` replicas is an engine on `tensor_parallel` devices. `options` are those of `fastgen serve`:
    fields of `ServerConfig` and of `EngineConfig`. `port` 0 selects a free one. Raises ValueError, with the end of the
    server's log, if it does not start, for example because there are too few devices.
    """
    model = os.fspath(model)
    name = deployment_name or default_name(model)
    options = {"replicas": replica_num, "port": port, **options}
    if tensor_parallel is not None:
        options["tensor_parallel"] = tensor_parallel
    key = next(iter(options.get("api_key") or ()), None)
    deployment = start_server(model, deployment_name=name, options=options, timeout=timeout)
    return Client(deployment, api_key=key)


def client(name: str, *, api_key: str | None = None, timeout: float | None = None) -> Client:
    """A client of a deployment on this machine; ValueError if there is none with that name.

    `api_key` is for servers that require one; by default it is read from FASTGEN_API_KEY. `timeout` is in seconds
    for each answer or piece of one.
    """
    return Client(find_deployment(name), api_key=api_key, timeout=timeout)


def async_client(name: str, *, api_key: str | None = None, timeout: float | None = None) -> AsyncClient:
    """`client` for asyncio."""
    return AsyncClient(find_deployment(name), api_key=api_key, timeout=timeout)


def _json_prompt(prompt: PlainPrompt) -> str | list[int] | list[JsonObject]:
    if isinstance(prompt, str):
        return prompt
    return [*prompt] if isinstance(prompt, tuple) else [dict(message) for message in prompt]


def _is_stream(response: httpx.Response) -> bool:
    return response.status_code == 200 and response.headers.get("content-type", "").startswith("text/event-stream")


def checked(response: httpx.Response) -> Any:
    """The JSON of an answer; ServerError if the server refused, NoAnswerError if it is not a fastgen server."""
    try:
        body = response.json()
        message = body["error"]["message"] if response.status_code != 200 else ""
    except (ValueError, KeyError, TypeError):
        raise NoAnswerError(
            f"{response.url} is not served by fastgen: it answers {response.status_code} with "
            f"{response.headers.get('content-type', 'no content-type')} ({response.text[:100]!r}); find the address of the "
            "deployment with `fastgen deployments`"
        ) from None
    if response.status_code == 200:
        return body
    after = response.headers.get("retry-after")
    raise ServerError(message, status=response.status_code, retry_after=float(after) if after else None)


class _Events:
    """Reads the events of a stream."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # tokens of each sample
        self._ended = False

    def read(self, data: str) -> tuple[int, RequestOutput] | None:
        """The output in an event's data; None after the last."""
        self._ended = self._ended or data == "[DONE]"
        return None if self._ended else _parse(data, self._counts)

    def check_end(self, deployment: Deployment) -> None:
        """NoAnswerError if the stream just stopped."""
        if not self._ended:
            raise NoAnswerError(f"the connection was closed before the answer was complete: {explain(deployment)}")


def _parse(data: str, counts: dict[int, int]) -> tuple[int, RequestOutput]:
    """The sample's number and output in an event's data. `counts` keeps the tokens of each sample."""
    event = json.loads(data)
    if "error" in event:
        raise ServerError(event["error"]["message"], status=500)
    index = event["index"]
    counts[index] = counts.get(index, 0) + len(event["token_ids"])
    logprobs, prompt_logprobs = (
        tuple(map(_logprob, event[name])) if name in event else None for name in ("logprobs", "prompt_logprobs")
    )
    return index, RequestOutput(
        request_id=str(index),
        new_token_ids=tuple(event["token_ids"]),
        text=event["text"],
        finished=event["finish_reason"] is not None,
        finish_reason=event["finish_reason"],
        num_prompt_tokens=event["prompt_length"],
        num_cached_tokens=event["cached_length"],
        num_generated_tokens=counts[index],
        weight_version=event["weight_version"],
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logprob(entry: Sequence[Any]) -> TokenLogprob:
    token_id, logprob, rank, top, *processed = entry
    return TokenLogprob(token_id, logprob, rank, {int(key): value for key, value in top.items()}, *processed)
