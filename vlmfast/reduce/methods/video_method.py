"""A way to reduce the tokens of videos, told by all frames together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.reduce.methods.method import PruningMethod, share
from vlmfast.reduce.tokens import Selection, VisualTokens


@dataclass(frozen=True)
class VideoMethod(PruningMethod):
    """A method that sees all frames of a video, (T, rows, columns) of `VisualTokens.grid`. Images stay as they are.

    Args:
        keep: how many tokens are kept of each frame, on average over the frames of a video: an int, or a float as the
            share of all its tokens.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither.
    """

    takes: ClassVar[tuple[str, ...]] = ("video",)

    def select_videos(self, tokens: VisualTokens) -> Selection:
        """Decide for B videos at once, each as a whole."""
        return self.select(tokens)

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Keep so many of the ``count`` tokens of all ``crops`` frames, at least one of a video, and merge nothing."""
        return share(self.keep, count, crops, least=1), 0


def frames_of(tokens: VisualTokens) -> Tensor:
    """(B, T, n, D): what the language model would see of each frame."""
    rows = tokens.features()
    return rows.reshape(tokens.batch, tokens.crops, -1, rows.shape[2])
