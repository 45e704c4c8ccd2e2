"""Clients of a deployment: `serve` starts one and gives its client, `client` finds one by name."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastgen_jax.api.deployment import Deployment, default_name, find_deployment, start_server, stop_server
from fastgen_jax.api.pipeline import Response
from fastgen_jax.api.prompts import as_prompts
from fastgen_jax.engine.intake import Prompt
from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob

if TYPE_CHECKING:
    import httpx

START_SECONDS = 1800.0  # loading and compiling a large model for the first time
STOP_SECONDS = 120.0
KEY_VARIABLE = "FASTGEN_API_KEY"


class ServerError(Exception):
    """The server refused or failed; `status` is the HTTP status, `retry_after` seconds if it named a time."""

    def __init__(self, message: str, *, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class _Connection:
    """What both clients share: addresses, headers, shapes."""

    def __init__(self, deployment: Deployment, *, api_key: str | None, timeout: float | None) -> None:
        self.deployment = deployment
        key = api_key or os.environ.get(KEY_VARIABLE)
        self._settings: dict[str, Any] = {
            "base_url": deployment.url,
            "timeout": timeout,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "verify": not deployment.url.startswith("https://127."),  # its certificate names another host
        }

    @property
    def _path(self) -> str:
        return f"/mii/{self.deployment.name}"

    def terminate_server(self, *, timeout: float = STOP_SECONDS) -> None:
        """Ends the deployment: it finishes what runs and takes no more. Waits up to `timeout` seconds for its end."""
        stop_server(self.deployment, timeout=timeout)

    @staticmethod
    def _body(prompts: Prompt | Sequence[Prompt], options: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return {"prompts": [_plain_prompt(p) for p in as_prompts(prompts)], **options, **more}

    @staticmethod
    def _response(answer: dict[str, Any]) -> Response:
        logprobs = {name: tuple(_logprob(entry) for entry in answer[name]) if name in answer else None
                    for name in ("logprobs", "prompt_logprobs")}
        return Response(
            generated_text=answer["generated_text"], prompt_length=answer["prompt_length"],
            generated_length=answer["generated_length"], finish_reason=answer["finish_reason"],
            token_ids=tuple(answer["token_ids"]), cached_length=answer["cached_length"], **logprobs,
        )


class Client(_Connection):
    """Talks to a deployment; blocks, also inside a notebook whose event loop runs.

        client = fastgen_jax.client("smollm2-135m-instruct")
        print(client.generate(["DeepSpeed is", "Seattle is"], max_new_tokens=32)[0])
    """

    def __init__(self, deployment: Deployment, *, api_key: str | None = None, timeout: float | None = None) -> None:
        import httpx

        super().__init__(deployment, api_key=api_key, timeout=timeout)
        self._http = httpx.Client(**self._settings)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, streaming_fn: Callable[[list[RequestOutput]], object] | None = None,
        **options: Any,
    ) -> list[Response]:
        """One response a prompt, in order; options are those of the pipeline (`max_new_tokens`, `temperature`, ...).

        `streaming_fn` gets each output as it comes, in a list of one, and the result is then empty. Raises ServerError.
        """
        if streaming_fn is not None:
            for _, output in self._stream(prompts, options):
                streaming_fn([output])
            return []
        response = self._http.post(self._path, json=self._body(prompts, options))
        _check(response)
        return [self._response(answer) for answer in response.json()]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[RequestOutput]:
        """The outputs for one prompt as they come; leaving the loop early ends the request. Raises ServerError."""
        for _, output in self._stream([prompt], options):
            yield output

    def close(self) -> None:
        """Closes the connections; the deployment goes on."""
        self._http.close()

    def _stream(self, prompts: Prompt | Sequence[Prompt], options: Mapping[str, Any]) -> Iterator[tuple[int, RequestOutput]]:
        body = self._body(prompts, options, stream=True)
        counts: dict[int, int] = {}
        with self._http.stream("POST", self._path, json=body) as response:
            if response.status_code != 200:
                response.read()
            _check(response)
            for line in response.iter_lines():
                if (item := _parse(line, counts)) is not None:
                    yield item


class AsyncClient(_Connection):
    """Talks to a deployment from asyncio.

        client = fastgen_jax.async_client("smollm2-135m-instruct")
        async for output in client.stream("DeepSpeed is", max_new_tokens=32):
            print(output.text, end="")
    """

    def __init__(self, deployment: Deployment, *, api_key: str | None = None, timeout: float | None = None) -> None:
        import httpx

        super().__init__(deployment, api_key=api_key, timeout=timeout)
        self._http = httpx.AsyncClient(**self._settings)

    async def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Response]:
        """One response a prompt, in order; options are those of the pipeline. Raises ServerError."""
        response = await self._http.post(self._path, json=self._body(prompts, options))
        _check(response)
        return [self._response(answer) for answer in response.json()]

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[RequestOutput]:
        """The outputs for one prompt as they come; leaving the loop early ends the request. Raises ServerError."""
        body = self._body([prompt], options, stream=True)
        counts: dict[int, int] = {}
        async with self._http.stream("POST", self._path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
            _check(response)
            async for line in response.aiter_lines():
                if (item := _parse(line, counts)) is not None:
                    yield item[1]

    async def close(self) -> None:
        """Closes the connections; the deployment goes on."""
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
    """Starts a server that outlives this program, waits until it can answer, and gives its client.

    Each of the `replica_num` replicas is an engine on `tensor_parallel` devices. `options` are those of `fastgen serve`:
    fields of `ServerConfig` and of `EngineConfig`. `port` 0 takes a free one. Raises ValueError, with the end of the
    server's log, if it does not start, as where there are too few devices.
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
    """The client of a deployment on this machine; ValueError if none of that name runs.

    `api_key` is needed if the server asks for one; by default it is read from FASTGEN_API_KEY. `timeout` is in seconds
    for each answer or piece of one.
    """
    return Client(find_deployment(name), api_key=api_key, timeout=timeout)


def async_client(name: str, *, api_key: str | None = None, timeout: float | None = None) -> AsyncClient:
    """`client` for asyncio."""
    return AsyncClient(find_deployment(name), api_key=api_key, timeout=timeout)


def _plain_prompt(prompt: Prompt) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [dict(item) if isinstance(item, Mapping) else int(item) for item in prompt]


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    after = response.headers.get("retry-after")
    raise ServerError(message, status=response.status_code, retry_after=float(after) if after else None)


def _parse(line: str, counts: dict[int, int]) -> tuple[int, RequestOutput] | None:
    """An event of a stream; None for lines that carry none. `counts` keeps the tokens of each sample."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise ServerError(event["error"]["message"], status=500)
    index = event["index"]
    counts[index] = counts.get(index, 0) + len(event["token_ids"])
    logprobs, prompt_logprobs = (tuple(map(_logprob, event[name])) if name in event else None
                                 for name in ("logprobs", "prompt_logprobs"))
    return index, RequestOutput(
        request_id=str(index), new_token_ids=tuple(event["token_ids"]), text=event["text"],
        finished=event["finish_reason"] is not None, finish_reason=event["finish_reason"],
        num_prompt_tokens=event["prompt_length"], num_cached_tokens=event["cached_length"],
        num_generated_tokens=counts[index], logprobs=logprobs, prompt_logprobs=prompt_logprobs,
    )


def _logprob(entry: Sequence[Any]) -> TokenLogprob:
    token_id, logprob, rank, top = entry
    return TokenLogprob(token_id, logprob, rank, {int(key): value for key, value in top.items()})
