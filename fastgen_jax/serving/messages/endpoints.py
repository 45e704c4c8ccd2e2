"""The endpoints of the Messages API."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fastgen_jax.serving.chat import chat_prompt, start_chat
from fastgen_jax.serving.endpoints import at_end
from fastgen_jax.serving.errors import ApiError, ErrorResponses
from fastgen_jax.serving.messages.answer import MessageAnswer
from fastgen_jax.serving.messages.request import CountRequest, MessagesRequest, chat_of, renamed
from fastgen_jax.serving.sse import EventStream, while_connected
from fastgen_jax.serving.state import ServerState
from fastgen_jax.text.chat import variables_of

PATH = "/v1/messages"


def add_messages(app: FastAPI, server: ServerState, errors: ErrorResponses) -> None:
    """Adds the endpoints. Errors of paths that start with `PATH` are in Anthropic's format."""

    def switches(body: CountRequest) -> frozenset[str]:
        server.adapter_of(body.model)
        template = server.ready().intake.need_tokenizer("a chat").template(with_tools=bool(body.tools))
        return frozenset() if template is None else variables_of(template)

    @app.post(PATH, responses=errors)
    async def create(body: MessagesRequest, request: Request) -> Response:
        try:
            work, chat = await start_chat(server, chat_of(body, switches=switches(body)))
        except ApiError as error:
            raise renamed(error) from error
        end = at_end(server, "messages", work, request)
        answer = MessageAnswer(body, work, chat)
        if body.stream:
            return EventStream(work, answer.events(), end, headers=chat.headers, done=b"", error=answer.error)
        try:
            return JSONResponse(await while_connected(request.receive, work, answer.collect()), headers=chat.headers)
        finally:
            end()

    @app.post(f"{PATH}/count_tokens", responses=errors)
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        chat = chat_of(body, switches=switches(body))
        tokenizer = server.ready().intake.need_tokenizer("a chat")
        return {"input_tokens": len(await chat_prompt(server, tokenizer, chat))}
