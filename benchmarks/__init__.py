"""Benchmarks made from the op registry: ``python -m vlmfast bench``."""
