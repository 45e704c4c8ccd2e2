"""The endpoints of the Responses API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from fastgen_jax.json_types import JsonObject
from fastgen_jax.serving.chat import chat_prompt, start_chat
from fastgen_jax.serving.endpoints import at_end
from fastgen_jax.serving.errors import ApiError, ErrorResponses
from fastgen_jax.serving.kept import Order, page_of
from fastgen_jax.serving.protocol import ChatRequest
from fastgen_jax.serving.responses.answer import ResponseAnswer
from fastgen_jax.serving.responses.background import BackgroundResponse, Follower
from fastgen_jax.serving.responses.compact import CompactRequest, compacted, summary_of
from fastgen_jax.serving.responses.items import input_items, listed
from fastgen_jax.serving.responses.replay import replayed
from fastgen_jax.serving.responses.request import ConversationRequest, ResponsesRequest, chat_of, renamed
from fastgen_jax.serving.responses.store import ResponseStore
from fastgen_jax.serving.sse import EventStream, while_connected
from fastgen_jax.serving.state import ServerState


def add_responses(app: FastAPI, server: ServerState, errors: ErrorResponses) -> None:
    """Adds the endpoints; the responses are stored in the memory of this process."""
    store = ResponseStore()

    def chat_to_start(body: ConversationRequest, items: list[JsonObject]) -> ChatRequest:
        server.adapter_of(body.model)
        conversation = [*store.conversation(body.previous_response_id), *items]
        if not conversation and not body.instructions:
            raise ApiError("input is empty; pass a string or a list of items", param="input")
        return chat_of(body, conversation, model=server.name_of(body.model))

    @app.post("/v1/responses", responses=errors)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        items = input_items(body.input or "")
        chat_request = chat_to_start(body, items)
        longest = server.ready().intake.config.longest_sequence
        max_tokens = min(body.max_output_tokens or longest, longest)
        if body.background:
            store.check_room(max_tokens)
        try:
            work, chat = await start_chat(server, chat_request)
        except ApiError as error:
            raise renamed(error) from error
        end = at_end(server, "responses", work, request)
        answer = ResponseAnswer(body, work, chat, model=server.name_of(body.model))
        if body.background:
            running = BackgroundResponse(answer, work, max_tokens=max_tokens)
            store.start(running, items, end)
            if body.stream:
                return _stream(running.follow(0), chat.headers)
            return JSONResponse(answer.response, headers=chat.headers)

        def stored_at_end() -> None:
            end()
            if body.store is not False and work.is_complete and answer.response["usage"] is not None:
                store.add(answer.response, items)

        if body.stream:
            return EventStream(work, answer.events(), stored_at_end, headers=chat.headers, done=b"", error=answer.error)
        try:
            response = await while_connected(request.receive, work, answer.collect())
            return JSONResponse(response, headers=chat.headers)
        finally:
            stored_at_end()

    @app.post("/v1/responses/compact", responses=errors)
    async def compact(body: CompactRequest, request: Request) -> JsonObject:
        items = [*store.conversation(body.previous_response_id), *input_items(body.input or "")]
        if not items:
            raise ApiError("input is empty; there is nothing to compact", param="input")
        server.adapter_of(body.model)
        try:
            work, chat = await start_chat(server, summary_of(body, items, model=server.name_of(body.model)))
        except ApiError as error:
            raise renamed(error) from error
        end = at_end(server, "responses", work, request)
        try:
            return compacted(items, await while_connected(request.receive, work, chat.collect()), chat)
        finally:
            end()

    @app.post("/v1/responses/input_tokens", responses=errors)
    async def count_tokens(body: ConversationRequest) -> JsonObject:
        if not (body.input or body.instructions or body.previous_response_id):
            return {"object": "response.input_tokens", "input_tokens": 0}
        chat = chat_to_start(body, input_items(body.input or ""))
        tokenizer = server.ready().intake.need_tokenizer("a chat")
        return {"object": "response.input_tokens", "input_tokens": len(await chat_prompt(server, tokenizer, chat))}

    @app.get("/v1/responses/{response_id}", responses=errors)
    async def retrieve(
        response_id: str, stream: bool = False, starting_after: Annotated[int | None, Query(ge=0)] = None
    ) -> Response:
        first = 0 if starting_after is None else starting_after + 1
        if (running := store.running(response_id)) is not None:
            return _stream(running.follow(first)) if stream else JSONResponse(running.response)
        stored = store.get(response_id)
        if not stream:
            return JSONResponse(stored.response)
        return _stream(_listed((stored.events or replayed(stored.response))[first:]))

    @app.delete("/v1/responses/{response_id}", responses=errors)
    async def delete(response_id: str) -> JsonObject:
        store.remove(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @app.post("/v1/responses/{response_id}/cancel", responses=errors)
    async def cancel(response_id: str) -> JsonObject:
        if (running := store.running(response_id)) is not None:
            running.close()
            await running.wait()
            return running.response
        response = store.get(response_id).response
        if not response["background"]:
            raise ApiError("only responses in the background can be cancelled, and this one was not", param="response_id")
        return response

    @app.get("/v1/responses/{response_id}/input_items", responses=errors)
    async def list_input(
        response_id: str, after: str | None = None, limit: int = Query(20, ge=0, le=100), order: Order = "desc"
    ) -> JsonObject:
        items = [listed(item) for item in store.input_of(response_id)]
        return page_of(items, after=after, limit=limit, order=order)


def _stream(events: AsyncIterator[bytes], headers: Mapping[str, str] | None = None) -> EventStream:
    """The stream of a client without which the response continues."""
    return EventStream(Follower(), events, lambda: None, headers=headers, done=b"")


async def _listed(events: Sequence[bytes]) -> AsyncIterator[bytes]:
    yield b"".join(events)
