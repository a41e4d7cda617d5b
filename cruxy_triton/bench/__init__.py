"""Benchmarks: the optimizer step against its peers, and the momentum codec against its candidates."""
