"""EVS: the tokens that changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.functions import accepting
from vlmfast.ops.frame_novelty import frame_change
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
        frames = frames_of(tokens)
        changes = accepting(frame_change, frames)(frames).nan_to_num(1.0)  # what is not finite is like nothing
        first = changes.new_full((tokens.batch, 1, frames.shape[2]), FIRST)
        return torch.cat([first, changes], 1).flatten(1)
