"""The endpoints of the Responses API."""

from __future__ import annotations

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from fastgen_jax.json_types import JsonObject
from fastgen_jax.serving.chat import chat_prompt, start_chat
from fastgen_jax.serving.endpoints import at_end
from fastgen_jax.serving.errors import ApiError, ErrorResponses
from fastgen_jax.serving.protocol import ChatRequest
from fastgen_jax.serving.responses.answer import ResponseAnswer
from fastgen_jax.serving.responses.items import input_items
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
        return chat_of(body, conversation, model=body.model or server.model.name)

    @app.post("/v1/responses", responses=errors)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        items = input_items(body.input or "")
        try:
            work, chat, _ = await start_chat(server, chat_to_start(body, items))
        except ApiError as error:
            raise renamed(error) from error
        end = at_end(server, "responses", work, request)
        answer = ResponseAnswer(body, work, chat, model=body.model or server.model.name)

        def stored_at_end() -> None:
            end()
            if body.store is not False and answer.response["usage"] is not None:
                store.add(answer.response, items)

        if body.stream:
            return EventStream(work, answer.events(), stored_at_end, done=b"", error=answer.error)
        try:
            return JSONResponse(await while_connected(request.receive, work, answer.collect()))
        finally:
            stored_at_end()

    @app.post("/v1/responses/input_tokens", responses=errors)
    async def count_tokens(body: ConversationRequest) -> JsonObject:
        chat = chat_to_start(body, input_items(body.input or ""))
        tokenizer = server.ready().intake.need_tokenizer("a chat")
        return {"object": "response.input_tokens", "input_tokens": len(await chat_prompt(server, tokenizer, chat))}

    @app.get("/v1/responses/{response_id}", responses=errors)
    async def retrieve(response_id: str, stream: bool = False) -> JsonObject:
        if stream:
            raise ApiError("stream=true is not supported for stored responses; remove it", param="stream")
        return store.get(response_id).response

    @app.delete("/v1/responses/{response_id}", responses=errors)
    async def delete(response_id: str) -> JsonObject:
        store.remove(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @app.post("/v1/responses/{response_id}/cancel", responses=errors)
    async def cancel(response_id: str) -> JsonObject:
        store.get(response_id)
        raise ApiError("only responses in the background can be cancelled, and this one was not", param="response_id")

    @app.get("/v1/responses/{response_id}/input_items", responses=errors)
    async def list_input(
        response_id: str, after: str | None = None, limit: int = Query(20, ge=1, le=100), order: str = "desc"
    ) -> JsonObject:
        items = store.get(response_id).items
        items = items if order == "asc" else items[::-1]
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise ApiError(f"after is {after!r}, which is no item of this response", param="after")
        start = 0 if after is None else ids.index(after) + 1
        page = items[start : start + limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": start + limit < len(items),
        }
