"""V-CAST: more tokens for the frames where a video turns, and of each frame those that stand out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmfast import checks
from vlmfast.functions import accepting
from vlmfast.ops.frame_novelty import frame_novelty
from vlmfast.reduce.methods.video_method import VideoMethod, frames_of
from vlmfast.reduce.tokens import VisualTokens

TEMPERATURE = 0.7  # of the softmax over the curvatures of frames
REMAINDERS = ("largest", "reference")


@dataclass(frozen=True)
class VCAST(VideoMethod, name="vcast"):
    """V-CAST (2026): frames get tokens by the curvature of the video, and keep those unlike their mean, or long.

    A frame's curvature is one minus the cosine between the steps that lead to its mean and on from it. Its share of
    the tokens is a softmax of that, but at least one token. A video of one frame keeps all its tokens.

    Args:
        keep: how many tokens are kept of each frame, on average over a video: an int, or a float as the share of all
            its tokens, rounded to the nearest number. At least one for each frame.
        remainder: who gets what is left when shares are rounded down: "largest", frames by what they lost, each once
            before any twice; or "reference", the one frame that lost most until it is full, as the published code does.

    Raises:
        TypeError or ValueError: for an argument that is none of these.

    Source:
        V-CAST.
    """

    remainder: str = "largest"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.one_of("remainder", self.remainder, REMAINDERS)

    def budget(self, count: int, has_cls: bool, crops: int = 1) -> tuple[int, int]:
        """Keep at least one token of each frame, and all of one frame."""
        if crops == 1:
            return count, 0
        return max(crops, self.keep * crops if isinstance(self.keep, int) else round(self.keep * count)), 0

    def score(self, tokens: VisualTokens) -> Tensor:
        """(B, T * n): how far above the last that its frame keeps a token ranks: the kept ones are above 0."""
        frames = frames_of(tokens)
        means, novelty, lengths = accepting(frame_novelty, frames)(frames)
        low, high = lengths.aminmax(dim=2, keepdim=True)
        worth = novelty + (lengths - low) / (high - low + 1e-6)
        rank = worth.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        kept = min(self.budget(tokens.total, tokens.has_cls, tokens.crops)[0], tokens.count)
        margins: Tensor = self._quotas(means, kept, frames.shape[2])[..., None] - rank
        return margins.flatten(1).float()

    def _quotas(self, means: Tensor, kept: int, most: int) -> Tensor:
        """(B, T) int64 of (B, T, D) means: how many tokens each frame keeps: 1 to ``most``, ``kept`` in all.

        In float64: a share that is a whole number must not be rounded down to the one below.
        """
        frames = means.shape[1]
        steps = nn.functional.normalize(means, dim=2).diff(dim=1).double()
        curvature = 1 - nn.functional.cosine_similarity(steps[:, :-1], steps[:, 1:], dim=2)
        curvature = nn.functional.pad(curvature, (1, 1) if frames > 1 else (0, frames), value=1.0)
        shares = (curvature / TEMPERATURE).softmax(1) * (kept - frames)
        quotas = shares.floor()
        order = (shares - quotas).argsort(dim=1, descending=True, stable=True)
        quotas = quotas.long().clamp(max=most - 1)
        left = kept - frames - quotas.sum(1)
        # each place that a frame still has, round by round of the frames, or frame by frame
        room = (most - 1 - quotas).gather(1, order)
        places = room[:, None] > torch.arange(most - 1, device=room.device)[:, None]
        by_turn = places if self.remainder == "largest" else places.mT
        given = by_turn & (by_turn.flatten(1).cumsum(1) <= left[:, None]).view_as(by_turn)
        more = given.sum(1 if self.remainder == "largest" else 2)
        return 1 + quotas.scatter_add(1, order, more)
