"""The GPU backend of ragged attention: Mosaic-GPU kernels for Hopper and Ampere."""
