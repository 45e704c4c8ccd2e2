"""An answer of five tokens, with warnings of the log on standard error."""

from __future__ import annotations

import logging

import fastgen_jax

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    pipe = fastgen_jax.pipeline("sotu-1m", token_budget=16, budget_ladder=())
    print(pipe("The state of", max_new_tokens=5, do_sample=False)[0].generated_text)
