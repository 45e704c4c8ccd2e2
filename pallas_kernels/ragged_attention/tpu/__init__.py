"""The TPU backend of ragged attention: Pallas kernels that write the cache and attend."""
