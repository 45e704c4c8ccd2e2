"""One start of a pipeline: prints a line of JSON with what it found, chose, answered and compiled.

    python -m tests.engine.programs.second_start SHARE MEBIBYTES OPTIONS

The engine sees SHARE of the free memory, so that the cache of this small model does not fit as a whole; MEBIBYTES are taken
before. OPTIONS is JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import jax

import fastgen_jax
from fastgen_jax.engine import memory


def main(share: float, mebibytes: int, options: dict[str, object]) -> None:
    events: Counter[str] = Counter()
    jax.monitoring.register_event_listener(lambda event, **kwargs: events.update([event]))
    held = bytearray(mebibytes << 20)
    held[::4096] = b"x" * len(held[::4096])
    system = memory.available
    memory.available = lambda: int(system() * share)
    pipe = fastgen_jax.pipeline("sotu-1m", **options)
    pipe.engine.wait_until_compiled()
    found = {
        "available": memory.available(),
        "num_blocks": pipe.engine.config.num_blocks,
        "ladder": pipe.engine.config.budget_ladder,
        "text": pipe("The state of", max_new_tokens=5, do_sample=False)[0].generated_text,
        "hits": events["/jax/compilation_cache/cache_hits"],
        "misses": events["/jax/compilation_cache/cache_misses"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
