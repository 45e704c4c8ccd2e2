"""Generates with the checkpoint that is named, and prints versions, the origin of the kernels and the text."""

from __future__ import annotations

import sys
from importlib.metadata import version

import fastgen_jax
from pallas_kernels import native

pipe = fastgen_jax.pipeline(sys.argv[1], max_num_seqs=2, max_context_len=128)
responses = pipe(["My fellow citizens, the state of", "We must"], max_new_tokens=8, do_sample=False)
assert all(response.generated_text.strip() for response in responses)
again = pipe(["We must"], max_new_tokens=8, do_sample=False)
assert again[0].generated_text == responses[1].generated_text, "the answer depends on the other prompt"
print(f"jax {version('jax')}; kernels: {native.origin()}; {responses[0].generated_text!r}")
