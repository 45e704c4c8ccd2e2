"""A server with OpenAI's streaming completions API and no model, to measure the client itself and for tests.

    python -m fastgen_jax.bench.null_server --first 0.1 --gap 0.02

Prints its port once it listens. Standard library only.
"""

from __future__ import annotations

import argparse
import asyncio
import json

from fastgen_jax.json_types import JsonObject

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, args: argparse.Namespace) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            body = await reader.readexactly(int(fields.get("content-length", "0")))
            await _stream(json.loads(body), writer, args)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the client has closed its connection
    finally:
        writer.close()


async def _stream(request: JsonObject, writer: asyncio.StreamWriter, args: argparse.Namespace) -> None:
    prompt = len(request["prompt"]) if isinstance(request["prompt"], list) else len(request["prompt"].split())
    if args.max_prompt and prompt > args.max_prompt:
        error = json.dumps({"error": {"message": f"the prompt has {prompt} tokens"}}).encode()
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(error), error))
        await writer.drain()
        return
    writer.write(_HEAD)
    for i in range(request["max_tokens"]):
        if args.first or args.gap:
            await asyncio.sleep(args.gap if i else args.first)
        _event(writer, {"object": "text_completion", "choices": [{"index": 0, "text": " a", "finish_reason": None}]})
        await writer.drain()
    usage = {"prompt_tokens": prompt, "completion_tokens": request["max_tokens"]}
    _event(writer, {"object": "text_completion", "choices": [], "usage": usage})
    data = b"data: [DONE]\n\n"
    writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
    await writer.drain()


def _event(writer: asyncio.StreamWriter, event: JsonObject) -> None:
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


async def _serve(args: argparse.Namespace) -> None:
    server = await asyncio.start_server(lambda r, w: _answer(r, w, args), "127.0.0.1", args.port)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Serves until killed."""
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server without a model.")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free port")
    parser.add_argument("--first", type=float, default=0.0, help="seconds until the first token")
    parser.add_argument("--gap", type=float, default=0.0, help="seconds between tokens")
    parser.add_argument("--max-prompt", type=int, default=0, help="refuse longer prompts; 0 refuses none")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
