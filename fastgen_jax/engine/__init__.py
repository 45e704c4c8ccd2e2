"""The engine: configuration, packing, compiled programs, sampling, and the step loop."""

from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.outputs import RequestOutput, TokenLogprob

__all__ = ["Engine", "EngineConfig", "RequestOutput", "TokenLogprob"]
