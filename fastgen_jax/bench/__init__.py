"""Benchmarks: fixed workloads, metrics, and runs of this engine and others on identical token ids."""
