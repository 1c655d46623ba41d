"""The novelty of the tokens of a video."""

from vlmfast.ops.frame_novelty.definition import frame_change, frame_novelty

__all__ = ["frame_change", "frame_novelty"]
