"""`fastgen run`: from the name of a model to a chat page in the browser."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

from fastgen_jax.cli.browser import can_open, how_to_reach, open_page
from fastgen_jax.cli.parser import Options
from fastgen_jax.flags import DEFAULT_MODEL, MODEL_HELP, add_fields, given_options

if TYPE_CHECKING:
    from fastgen_jax.engine.config import EngineConfig

PORT = 8000
BROWSER_SECONDS = 10  # for the command that opens the page
MAX_NEW_TOKENS = 512  # of an answer in the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    from fastgen_jax.engine.config import EngineConfig

    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: list the models that are on this machine)"
    )
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="answer this in the terminal and exit (default: serve the chat page)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help=f"port of the page (default: {PORT}, or a free one if that is in use)")
    parser.add_argument(
        "--browser",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="open the page when it is ready",
    )
    add_fields(parser.add_argument_group("engine"), EngineConfig)


def run(options: Options) -> int:
    """Runs the command and returns the exit code."""
    if options["model"] is None:
        print("\n".join(models_on_this_machine()))
        return 0
    from fastgen_jax.engine.config import EngineConfig

    engine = EngineConfig.from_options(given_options(options, EngineConfig))
    if options["prompt"]:
        return answer(options["model"], " ".join(options["prompt"]), engine)
    code = serve(options["model"], engine, host=options["host"], port=options["port"], browser=options["browser"])
    sys.stdout.flush()
    # A thread may still be compiling a model that is no longer needed; it must not delay the exit.
    os._exit(code)


def models_on_this_machine() -> list[str]:
    """Lines with the models that run without a download, and what to type."""
    from fastgen_jax.checkpoint.local import local_models

    models = local_models()
    width = max(len(model.name) for model in models)
    return [
        "models:",
        *(f"  {model.name:{width}}  {model.num_bytes / 1e6:8,.0f} MB  {model.where}" for model in models),
        "",
        f"Chat with one:   fastgen run {DEFAULT_MODEL}",
        "Or with another: fastgen run MODEL, where MODEL is a directory, a .gguf file, or ORGANIZATION/NAME on the Hugging",
        "                 Face hub (families: fastgen models)",
    ]


def answer(model: str, prompt: str, engine: EngineConfig) -> int:
    """Prints the answer to one prompt as it is generated; returns the exit code."""
    from fastgen_jax.api.pipeline import pipeline

    with pipeline(model, config=engine) as pipe:
        tokenizer = pipe.engine.tokenizer
        chats = tokenizer is not None and tokenizer.template() is not None
        for output in pipe.stream([{"role": "user", "content": prompt}] if chats else prompt, max_new_tokens=MAX_NEW_TOKENS):
            print(output.text, end="", flush=True)
        print()
    return 0


def serve(model: str, engine: EngineConfig, *, host: str, port: int | None, browser: bool) -> int:
    """Serves the chat page until ^C and returns the exit code; if the model is already served, shows that page."""
    from fastgen_jax.api.deployment import default_name, deployments
    from fastgen_jax.serving.server import run_server
    from fastgen_jax.serving.settings import ServerConfig

    running = next((d for d in deployments() if d.name == default_name(model)), None)
    if running is not None and running.model == model:
        print(f"{model} is already served at {running.url}/ (stop it with `fastgen deployments --stop {running.name}`)")
        thread = show(running.url, browser=browser)
        if thread is not None:
            thread.join(BROWSER_SECONDS)
        return 0
    if port is None:
        port = PORT if is_free(host, PORT) else 0
        if port == 0:
            print(f"port {PORT} is in use; choosing another one")
    print(
        f"starting {model}; the page opens when it is ready (^C stops)" if browser else f"starting {model} (^C stops)",
        flush=True,
    )
    # ^C means now: whoever runs this sits in front of the page.
    config = ServerConfig(host=host, port=port, drain_seconds=0)

    def ready(url: str) -> None:
        print(f"\n{default_name(model)} is ready: {url}/   (^C stops it)", flush=True)
        print(f"for programs: OpenAI's API at {url}/v1, model {default_name(model)!r}", flush=True)
        show(url, browser=browser)

    return run_server(model, config, engine, progress=True, on_ready=ready)


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on this port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def show(url: str, *, browser: bool) -> threading.Thread | None:
    """Opens the page in a thread, which it returns, or says how to reach it from where the user is."""
    if browser and can_open():
        return open_page(f"{url}/")
    print("\n".join(how_to_reach(url)), flush=True)
    return None
