"""Benchmarks: speeds that a user decides by, each measured in turn with what it is compared to."""
