"""The checkpoint in this repository: it loads without a download, and the engine computes what was trained."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax import Engine, Research
from fastgen_jax.bench.perplexity import perplexity
from fastgen_jax.checkpoint import load_params, open_checkpoint, resolve_model
from fastgen_jax.models.dense import dense_forward
from tests.tiny import drain, greedy

PASSAGE = (
    "Fellow-Citizens of the Senate and House of Representatives: I congratulate you and my country on the favorable "
    "state of our relations with foreign nations, and on the continued prosperity of the people of the United States."
)
# bfloat16 weights in float32 arithmetic on both sides; sums are taken in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("sotu-1m", token_budget=64, budget_ladder=(64,), max_num_seqs=4, num_blocks=64)


def test_the_engine_gives_the_logits_that_were_trained(engine):
    params = load_params(open_checkpoint(resolve_model("sotu-1m")), dtype=jnp.float32)
    ids = engine.encode(PASSAGE)
    assert engine.tokenizer.decode(ids) == PASSAGE
    dense = np.asarray(jax.jit(partial(dense_forward, config=engine.model))(params, jnp.asarray([ids], jnp.int32)))[0, -1]
    research = Research(engine)
    ours = research.put(["passage"], [ids])[0]
    research.flush("passage")
    assert np.abs(ours - dense).max() <= TOLERANCE * np.abs(dense).max()


def test_it_has_learned_the_style_of_the_addresses(engine):
    ids = engine.encode(PASSAGE)
    value, _ = perplexity(engine, ids, window=len(ids))
    assert value < 100  # of 2,048 tokens; before training it is above 2,000
    request_id = engine.add("The people of the United", greedy(4))
    text = "".join(output.text for output in drain(engine)[request_id])
    assert text.startswith(" States")


@pytest.mark.slow
def test_the_dense_forward_can_be_trained_through(engine):
    params = load_params(open_checkpoint(resolve_model("sotu-1m")), dtype=jnp.float32)
    ids = jnp.asarray([engine.encode(PASSAGE)[:32]], jnp.int32)

    def loss(params):
        logprobs = jax.nn.log_softmax(dense_forward(params, ids, config=engine.model)[:, :-1])
        return -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()

    before, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.isfinite(leaf).all() and np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    step = jax.tree.map(lambda leaf, slope: leaf - 0.01 * slope, params, gradient)
    assert jax.jit(loss)(step) < before
