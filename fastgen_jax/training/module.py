"""The model as a `flax.nnx.Module` whose state is the engine's arrays."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.weight_spec import Params
from fastgen_jax.training.batch import TrainingBatch
from fastgen_jax.training.forward import DEFAULTS, Options, logits, logprobs

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(f"as_nnx needs flax.nnx ({error}); pip install 'fastgen_jax[train]'") from error


class Weights(nnx.Module):
    """A dict of weights as attributes, each an `nnx.Param`."""

    def __init__(self, weights: Mapping[str, jax.Array]) -> None:
        for name, leaf in weights.items():
            if not isinstance(leaf, jax.Array):
                raise ValueError(
                    f"{name} is a {type(leaf).__name__}, but must be an array; load the weights with prepare=None"
                )
            setattr(self, name, nnx.Param(leaf))


class Decoder(Weights):
    """The decoder of `fastgen_jax.models` as a module: its attributes are the weights, by their names in `Params`."""

    def __init__(self, params: Params, config: ModelConfig, options: Options) -> None:
        layers = params["layers"]
        if not isinstance(layers, Mapping):
            raise ValueError("layers are separate, but the module has stacked ones; load the weights with stack_layers=True")
        super().__init__({name: leaf for name, leaf in params.items() if name != "layers"})
        self.layers = Weights(layers)
        self.config = config
        self.options = options

    def __call__(self, batch: TrainingBatch) -> jax.Array:
        """f32[R, V]: `training.logits`."""
        return logits(params_of(self), batch, config=self.config, options=self.options)

    def logprobs(self, batch: TrainingBatch, *, temperature: float = 1.0) -> jax.Array:
        """f32[R]: `training.logprobs`."""
        return logprobs(params_of(self), batch, config=self.config, options=self.options, temperature=temperature)


def as_nnx(params: Params, config: ModelConfig, *, options: Options = DEFAULTS) -> Decoder:
    """A module whose parameters are the arrays of `params`, which are stacked; nothing is copied.

    `module(batch)` returns logits and `module.logprobs(batch)` log-probabilities. It splits and merges, and trains with
    `nnx.Optimizer`, like any other module. Raises ValueError if a weight is not an array.
    """
    return Decoder(params, config, options)


def params_of(module: Decoder) -> Params:
    """The weights of a module in the engine's form; nothing is copied."""

    def arrays(weights: nnx.Module) -> Params:
        return {name: param[...] for name, param in vars(weights).items() if isinstance(param, nnx.Variable)}

    return {**arrays(module), "layers": arrays(module.layers)}
