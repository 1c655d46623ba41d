"""Fewer visual tokens: each is chosen for what those before it have left open."""

from vlmfast.ops.greedy_selection.definition import coverage, dpp_map, farthest

__all__ = ["coverage", "dpp_map", "farthest"]
