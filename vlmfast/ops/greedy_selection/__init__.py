"""Fewer visual tokens: each is chosen for what those before it have left open."""

from vlmfast.ops.greedy_selection.definition import coverage, farthest

__all__ = ["coverage", "farthest"]
