"""Kernels that stand on their own: they receive plain arrays and know nothing of engines or models."""
