"""Measures llama.cpp's server: starts it, sends token ids to /completion, reads the streams. See `protocol`.

Options: server (path of llama-server), model (a GGUF), threads, slots, context_per_slot, extra (further arguments).
Standard library only.
"""

from __future__ import annotations

import atexit
import http.client
import json
import socket
import subprocess
import sys
import threading
import time

from protocol import JsonObject, Request, Run, Timeline, serve

START_SECONDS = 120  # a server that is not healthy after this has failed to load
HOST = "127.0.0.1"
UNKNOWN_ID = -1  # equals no token id, so a comparison of outputs counts it as different


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with code {process.returncode} before it was ready")
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"llama-server was not ready after {START_SECONDS} s")


def complete(port: int, request: Request, begin: float, timeline: Timeline, failures: list[str]) -> None:
    """Runs one request to its end; adds an error to `failures`."""
    body = {
        "prompt": request["prompt_token_ids"],
        "n_predict": request["max_new_tokens"],
        "ignore_eos": True,
        "temperature": 0.0,
        "samplers": ["temperature"],  # the others do not change greedy sampling and cost time
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
    }
    try:
        connection = http.client.HTTPConnection(HOST, port)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
        arrived = 0
        for line in response:
            if line.startswith(b"data: "):
                now = time.perf_counter() - begin
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                # A token that ends inside a character is counted but never sent: its id stays unknown.
                tokens = event.get("tokens", [])
                unknown = event["tokens_predicted"] - arrived - len(tokens)
                timeline.add(request["request_id"], now, [UNKNOWN_ID] * unknown + tokens)
                arrived = event["tokens_predicted"]
    except Exception as error:  # the run reports the failures of its threads
        failures.append(f"{request['request_id']}: {error!r}")


def load(options: JsonObject) -> tuple[JsonObject, Run]:
    port = free_port()
    slots = options["slots"]
    command = [
        options["server"],
        "-m",
        options["model"],
        "--host",
        HOST,
        "--port",
        str(port),
        "-t",
        str(options["threads"]),
        "-tb",
        str(options["threads"]),
        "-np",
        str(slots),
        "-c",
        str(slots * options["context_per_slot"]),
        "--no-kv-unified",
        "--cache-ram",
        "0",
        *options["extra"],
    ]
    process = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    atexit.register(process.terminate)
    wait_until_healthy(process, port)

    def run(requests: list[Request]) -> JsonObject:
        timeline = Timeline(requests)
        failures: list[str] = []
        begin = time.perf_counter()
        threads = [
            threading.Thread(target=complete, args=(port, request, begin, timeline, failures)) for request in requests
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise RuntimeError("; ".join(failures))
        return timeline.result()

    version = subprocess.run([options["server"], "--version"], capture_output=True, text=True, check=True)
    line = (version.stdout + version.stderr).strip().splitlines()[0]
    return {"engine": "llama.cpp", "version": line, "options": options}, run


if __name__ == "__main__":
    serve(load)
