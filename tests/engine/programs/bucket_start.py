"""One start of an engine: prints a line of JSON with what it loaded, compiled, measured and answered.

    python -m tests.engine.programs.bucket_start OPTIONS

OPTIONS is JSON. The cache is that of FASTGEN_CACHE_DIR.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter

import jax

import fastgen_jax
from fastgen_jax.engine import executables
from fastgen_jax.engine.runner import Runner


def main(options: dict[str, object]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastgen_jax").setLevel(logging.INFO)
    events: Counter[str] = Counter()
    jax.monitoring.register_event_listener(lambda event, **kwargs: events.update([event]))
    load, measure = executables.load, Runner.measure

    def counted_load(*args, **kwargs):
        program = load(*args, **kwargs)
        events["loaded" if program else "not found"] += 1
        return program

    def counted_measure(*args, **kwargs):
        events["measured"] += 1
        return measure(*args, **kwargs)

    executables.load, Runner.measure = counted_load, counted_measure
    pipe = fastgen_jax.pipeline("sotu-1m", **options)
    pipe.engine.wait_until_compiled()
    found = {
        "ladder": pipe.engine.config.budget_ladder,
        "text": pipe("The state of", max_new_tokens=5, do_sample=False)[0].generated_text,
        "hits": events["/jax/compilation_cache/cache_hits"],
        "misses": events["/jax/compilation_cache/cache_misses"],
        "loaded": events["loaded"],
        "not found": events["not found"],
        "measured": events["measured"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
