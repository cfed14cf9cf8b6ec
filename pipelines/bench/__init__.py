"""Benchmarks: what decides something, measured in turn with what it is compared to."""
