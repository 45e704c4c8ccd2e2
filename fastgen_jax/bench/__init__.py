"""Benchmarks: fixed workloads, pure metrics, and runs of this engine beside others on identical token ids."""
