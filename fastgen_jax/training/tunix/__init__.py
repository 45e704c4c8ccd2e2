"""This engine in tunix (`pip install google-tunix`): its learners train, and their rollouts are generated here.

Rollout              a `BaseRollout`, for `ClusterConfig(rollout_engine=partial(Rollout, engine=engine))`
Sampler              the newer protocol of samplers, with the phases of a weight update
Model                this project's decoder as a module that tunix trains; its arrays become the engine's without a copy
params_from_state    the weights of tunix' own models (Llama 3, Qwen 2 and 3, Gemma) for `engine.update_params`
"""

from fastgen_jax.training.tunix.model import Model, params_from_state
from fastgen_jax.training.tunix.rollout import Rollout
from fastgen_jax.training.tunix.sampler import Sampler

__all__ = ["Model", "Rollout", "Sampler", "params_from_state"]
