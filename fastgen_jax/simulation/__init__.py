"""A discrete-event simulator: the engine's scheduler with a cost model instead of a device."""

from fastgen_jax.plan.roofline import Efficiency, StepShape
from fastgen_jax.simulation.costs import MeasuredCost, RooflineCost, StepCost, load_cost
from fastgen_jax.simulation.models import MODELS
from fastgen_jax.simulation.replica import Replica, ReplicaConfig
from fastgen_jax.simulation.simulator import Simulation, simulate

__all__ = [
    "MODELS",
    "Efficiency",
    "MeasuredCost",
    "Replica",
    "ReplicaConfig",
    "RooflineCost",
    "Simulation",
    "StepCost",
    "StepShape",
    "load_cost",
    "simulate",
]
