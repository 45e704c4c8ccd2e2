"""The endpoints that use the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NotRequired, TypedDict, cast

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from fastgen_jax.api.options import generation_of
from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob
from fastgen_jax.engine.prompts import split_prompts
from fastgen_jax.json_types import JsonFields
from fastgen_jax.scheduling import ContextLengthError
from fastgen_jax.serving.answer_forms import ChatChoice, CompletionChoice
from fastgen_jax.serving.answers import ChatAnswer, CompletionAnswer, finite
from fastgen_jax.serving.chat import chat_prompt, guide_for, headers_of, start_answer, start_chat
from fastgen_jax.serving.errors import context_exceeded
from fastgen_jax.serving.fields import MAX_STOP_CHARACTERS, MAX_STOPS
from fastgen_jax.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from fastgen_jax.serving.sampling_fields import Sampling, StreamOptions
from fastgen_jax.serving.spans import record_span
from fastgen_jax.serving.sse import EventStream, while_connected
from fastgen_jax.serving.state import ServerState
from fastgen_jax.serving.stored_chats import owner_of
from fastgen_jax.serving.work import Backend, Work, start_work

Keep = Callable[[JsonFields], None]  # stores a complete answer


class GeneratedAnswer(TypedDict):
    """The answer of one sample in MII's format."""

    generated_text: str
    token_ids: list[int]
    prompt_length: NotRequired[int]
    generated_length: NotRequired[int]
    finish_reason: NotRequired[str | None]
    cached_length: NotRequired[int]
    weight_versions: NotRequired[Sequence[tuple[int, int]]]
    logprobs: NotRequired[list[TokenLogprob]]
    prompt_logprobs: NotRequired[Sequence[TokenLogprob]]


async def complete(server: ServerState, body: CompletionRequest, request: Request) -> Response:
    """POST /v1/completions."""
    adapter = server.adapter_of(body.model)
    backend = server.ready()
    body = body.model_copy(update={"model": server.name_of(body.model)})
    request.state.names = body.names
    limit = body.max_completion_tokens or body.max_tokens
    params = body.sampling_params(
        backend.intake,
        max_new_tokens=None if limit is None else max(1, limit),
        logprobs=0 if body.selects and body.logprobs is None else body.logprobs,
        prompt_logprobs=body.num_top_of_prompt,
        adapter=adapter,
    )
    guide = await guide_for(body)
    work = await start_answer(
        backend, body, body.prompts, params, guide, add_special_tokens=body.add_special_tokens is not False
    )
    answer = CompletionAnswer(body, work, backend.intake.tokenizer, fingerprint=server.fingerprint)
    return await _answer(server, "text_completion", body, work, answer, request, headers_of(guide))


async def chat(server: ServerState, body: ChatRequest, request: Request) -> Response:
    """POST /v1/chat/completions."""
    request.state.names = body.names
    work, answer = await start_chat(server, body)
    return await _answer(server, "chat", body, work, answer, request, answer.headers)


async def render(server: ServerState, body: ChatRequest) -> dict[str, object]:
    """POST /v1/chat/completions/render and /apply-template: the prompt of a chat, without an answer to it."""
    server.adapter_of(body.model)
    tokenizer = server.ready().intake.need_tokenizer("a chat")
    ids = await chat_prompt(server, tokenizer, body)
    return {"prompt": tokenizer.decode(ids, skip_special_tokens=False), "token_ids": ids, "count": len(ids)}


async def generate(server: ServerState, body: GenerateRequest, request: Request) -> Response:
    """POST /mii/{deployment}: a list with one answer per sample, or server-sent events of (index, output)."""
    backend = server.ready()
    call = generation_of(backend.intake, None, _with_token_ids(body.model_extra or {}))
    params = call.params
    stops = tuple(params.stop)
    if len(stops) > MAX_STOPS or sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        raise ValueError(
            f"stop has {len(stops)} strings with {sum(map(len, stops))} characters in all, but at most {MAX_STOPS} with "
            f"{MAX_STOP_CHARACTERS} are allowed; keep the most likely"
        )
    prompts = split_prompts(body.prompts)
    try:
        work = await start_work(
            backend,
            prompts,
            replace(params, n=1),
            num_samples=params.n,
            priority=body.priority,
            timeout=body.timeout,
            grammar=call.grammar,
            new_tokens=call.new_tokens,
        )
    except ContextLengthError as error:
        raise context_exceeded(error, "prompts") from error
    end = at_end(server, "generate", work, request)
    if body.stream:
        return EventStream(work, _plain_events(work), end)

    async def complete() -> list[GeneratedAnswer]:
        answers: list[GeneratedAnswer] = [{"generated_text": "", "token_ids": []} for _ in work.streams]
        async for index, outputs in work:
            for output in outputs:
                _add_output(answers[index], output)
        for answer, runs in zip(answers, work.versions, strict=True):
            answer["weight_versions"] = runs.runs
        if body.return_full_text:
            for index, answer in enumerate(answers):
                answer["generated_text"] = (
                    _prompt_text(backend, prompts[index // params.n], work.prompts[index // params.n])
                    + answer["generated_text"]
                )
        if body.echo:
            for index, answer in enumerate(answers):
                answer["token_ids"] = [*work.prompts[index // params.n], *answer["token_ids"]]
        return answers

    try:
        return JSONResponse(await while_connected(request.receive, work, complete()))
    finally:
        end()


async def tokenize(server: ServerState, body: TokenizeRequest) -> dict[str, object]:
    """POST /tokenize."""
    server.adapter_of(body.model)
    intake = server.ready().intake
    tokenizer = intake.need_tokenizer("/tokenize")
    if body.messages is not None:
        ids = await chat_prompt(server, tokenizer, body)
    else:
        add = body.add_special_tokens is not False
        ids = await asyncio.to_thread(tokenizer.encode, body.prompt or "", add_special_tokens=add)
    answer: dict[str, object] = {"tokens": list(ids), "count": len(ids), "max_model_len": intake.config.longest_sequence}
    if body.return_token_strs is not None:
        answer["token_strs"] = [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    return answer


async def detokenize(server: ServerState, body: DetokenizeRequest) -> dict[str, str]:
    """POST /detokenize."""
    server.adapter_of(body.model)
    tokenizer = server.ready().intake.need_tokenizer("/detokenize")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


async def _answer(
    server: ServerState,
    operation: str,
    body: Sampling,
    work: Work,
    answer: CompletionAnswer | ChatAnswer,
    request: Request,
    headers: Mapping[str, str],
) -> Response:
    end = at_end(server, operation, work, request)
    keep: Keep | None = None
    if isinstance(body, ChatRequest) and body.store:
        keep = partial(server.chats.add, owner_of(request), messages=body.messages, metadata=body.metadata)
    if body.user is not None:
        request.state.log = {"user": body.user}
    if body.stream:
        events = _events(work, answer, body.stream_options or StreamOptions(), keep)
        return EventStream(work, events, end, headers=headers)

    try:
        result = await while_connected(request.receive, work, answer.collect())
    finally:
        end()
    if keep is not None:
        keep(result)
    timing = work.timing()
    return JSONResponse(
        result,
        headers={
            "x-fastgen-queue-ms": str(timing["queue_ms"]),
            "x-fastgen-first-token-ms": str(timing["first_token_ms"]),
            "x-fastgen-total-ms": str(timing["total_ms"]),
            **headers,
        },
    )


async def _events(
    work: Work, answer: CompletionAnswer | ChatAnswer, options: StreamOptions, keep: Keep | None
) -> AsyncIterator[bytes]:
    encoder = answer.encoder()
    kept: list[CompletionChoice | ChatChoice] = []
    async for index, outputs in work:
        choices = answer.chunk(index, outputs)
        if keep is not None:
            kept += choices
        if _has_content(choices[0]):
            usage = work.usage_so_far() if options.counts_in_each_event else bool(options.include_usage)
            yield encoder.choices(choices, usage=usage)
    if keep is not None and isinstance(answer, ChatAnswer):
        keep(answer.complete(cast("list[ChatChoice]", kept)))
    if options.include_usage or options.include_timing:
        usage = answer.usage() if options.include_usage else None
        yield encoder.usage(usage, work.timing() if options.include_timing else None)


def _has_content(choice: CompletionChoice | ChatChoice) -> bool:
    # A token may add no text yet: part of a character, or the possible start of a stop string.
    is_shown = choice.get("text") or choice.get("delta") or choice["finish_reason"] or choice["logprobs"]
    return bool(is_shown or choice.get("token_ids"))


async def _plain_events(work: Work) -> AsyncIterator[bytes]:
    async for index, outputs in work:
        for output in outputs:
            yield b"data: " + json.dumps({"index": index, **_plain(output)}, ensure_ascii=False).encode() + b"\n\n"


def _plain(output: RequestOutput) -> dict[str, object]:
    plain: dict[str, object] = {
        "text": output.text,
        "token_ids": output.new_token_ids,
        "finish_reason": output.finish_reason,
        "prompt_length": output.num_prompt_tokens,
        "cached_length": output.num_cached_tokens,
        "weight_version": output.weight_version,
    }
    if output.stop_reason is not None:
        plain["stop_reason"] = output.stop_reason
    if output.logprobs is not None:
        plain["logprobs"] = [*map(_finite, output.logprobs)]
    if output.prompt_logprobs is not None:
        plain["prompt_logprobs"] = [*map(_finite, output.prompt_logprobs)]
    return plain


def _finite(entry: TokenLogprob) -> TokenLogprob:
    """An entry for JSON, which has no infinity."""
    if entry.processed_logprob is None:
        return entry
    return entry._replace(processed_logprob=finite(entry.processed_logprob))


def _add_output(answer: GeneratedAnswer, output: RequestOutput) -> None:
    answer["generated_text"] += output.text
    answer["token_ids"] += output.new_token_ids
    answer["prompt_length"] = output.num_prompt_tokens
    answer["generated_length"] = len(answer["token_ids"])
    answer["finish_reason"] = output.finish_reason
    answer["cached_length"] = output.num_cached_tokens
    if output.logprobs is not None:
        answer.setdefault("logprobs", []).extend(map(_finite, output.logprobs))
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [*map(_finite, output.prompt_logprobs)]


def at_end(server: ServerState, operation: str, work: Work, request: Request) -> Callable[[], None]:
    """The function to call when the answer has ended: it counts it, and records a span."""
    work.on_gap = server.metrics.note_gap

    def end() -> None:
        server.metrics.note_end(work)
        record_span(operation, server.model.name, work, request.headers)

    return end


def _with_token_ids(options: JsonFields) -> JsonFields:
    """Converts the keys of `logit_bias` to numbers: JSON objects have strings as keys."""
    bias = options.get("logit_bias")
    if not isinstance(bias, dict):
        return options
    return {
        **options,
        "logit_bias": {int(key) if key.isascii() and key.isdigit() else key: value for key, value in bias.items()},
    }


def _prompt_text(backend: Backend, prompt: object, token_ids: Sequence[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    tokenizer = backend.intake.tokenizer
    return tokenizer.decode(list(token_ids), skip_special_tokens=False) if tokenizer else ""
