"""EVS: the tokens that changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.reduce.methods.method import share
from vlmfast.reduce.methods.video_method import VideoMethod, frames_of
from vlmfast.reduce.tokens import VisualTokens

FIRST = 255.0  # what each token of the first frame is worth, more than any change


@dataclass(frozen=True)
class EVS(VideoMethod, name="evs"):
    """Efficient Video Sampling: the tokens of a video that differ from those at their place in the frame before.

    The first frame is kept whole. A token is worth one minus the cosine to the token of the same position in the
    frame before; of equal ones the earlier is kept.

    Args:
        keep: how many tokens are kept of each frame, on average over a video: an int, or a float as the share of all
            its tokens. As published, they are at least those of the first frame.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither.

    Source:
        EVS as vLLM has it.
    """

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Keep at least a whole frame."""
        return max(count // crops, share(self.keep, count, crops)), 0

    def score(self, tokens: VisualTokens) -> Tensor:
        """(B, T * n): how much each token changed."""
        rows = frames_of(tokens)
        squares = rows.square().sum(3)
        dots = (rows[:, 1:] * rows[:, :-1]).sum(3)
        # the root of a square is exact, so that a token that is the same has not changed at all
        lengths = (squares[:, 1:] * squares[:, :-1]).sqrt()
        changes = 1 - torch.where(lengths > 0, dots / lengths, 0)
        return torch.cat([torch.full_like(squares[:, :1], FIRST), changes], 1).flatten(1)
