"""A discrete-event simulator: the engine's own scheduler, with a model of what a step costs in place of a device."""

from fastgen_jax.simulation.costs import MeasuredCost, Roofline, StepCost, StepShape, load_cost
from fastgen_jax.simulation.hardware import ACCELERATORS, MODELS, Accelerator
from fastgen_jax.simulation.replica import Replica, ReplicaConfig
from fastgen_jax.simulation.simulator import Simulation, simulate

__all__ = [
    "ACCELERATORS",
    "MODELS",
    "Accelerator",
    "MeasuredCost",
    "Replica",
    "ReplicaConfig",
    "Roofline",
    "Simulation",
    "StepCost",
    "StepShape",
    "load_cost",
    "simulate",
]
