"""One compiled step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

try:
    import optax
except ImportError as error:
    raise ImportError(f"make_update needs optax ({error}); pip install 'fastgen_jax[train]'") from error

Metrics = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Metrics]]
"""(trained, *data) -> (loss, metrics)"""


def make_update(loss: Loss, optimizer: optax.GradientTransformation) -> Callable[..., tuple[Any, optax.OptState, Metrics]]:
    """A compiled (trained, state, *data) -> (trained, state, metrics), where `loss` is (trained, *data) -> (loss, metrics).

    `trained` is any pytree: weights, or adapters with the weights among `data`. `state` is that of `optimizer.init(trained)`
    and is donated; `trained` is not, because an engine may compute with these arrays. The metrics have the loss and the norm
    of the gradient as well.
    """

    @partial(jax.jit, donate_argnums=1)
    def update(trained: Any, state: optax.OptState, *data: Any) -> tuple[Any, optax.OptState, Metrics]:
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(trained, *data)
        changes, state = optimizer.update(gradient, state, trained)
        squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(gradient)]
        metrics = {**metrics, "loss": value, "gradient_norm": jnp.sqrt(jnp.sum(jnp.stack(squares)))}
        return optax.apply_updates(trained, changes), state, metrics

    return update
