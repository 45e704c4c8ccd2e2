"""A worker without an engine: it generates known tokens at known times, and fails, computes or waits as its options say.

Options: fail ("load" or "run"), missing (tokens left out of each request), spin (CPU seconds per run), until (a FIFO; a run
ends once another process has opened it for writing).
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "fastgen_jax" / "bench" / "workers"))
from protocol import Timeline, serve


def load(options):
    print("output of an engine on standard output")
    if options.get("fail") == "load":
        raise RuntimeError("no weights here")

    def run(requests):
        if options.get("fail") == "run":
            os._exit(3)
        end = time.process_time() + options.get("spin", 0)
        while time.process_time() < end:
            pass
        if "until" in options:
            open(options["until"]).close()
        timeline = Timeline(requests)
        for request in requests:
            for i in range(request["max_new_tokens"] - options.get("missing", 0)):
                timeline.add(request["request_id"], 0.25 * (i + 1), [request["prompt_token_ids"][0] + i])
        return {**timeline.result(), "pid": os.getpid()}

    return {"engine": "fake", "version": "1", "options": options}, run


serve(load)
