"""Standalone kernels: they receive plain arrays and do not depend on the engine or the models."""
