"""The dissimilarity of video tokens to their frame, or to the frame before, by which video reduction chooses tokens.

V-CAST compares each token with the mean of its frame, and also uses its length; EVS compares it with the token in the
same place of the frame before. In PyTorch these are eight passes over products and squares in float32, each twice as
large as the features in half precision. Here V-CAST's scores read the features twice, because the mean comes first, and
those of EVS once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfast import checks
from vlmfast.functions import op


def _check(frames: Tensor) -> None:
    checks.tensor("frames", frames, "BTND")
    if frames.shape[2] < 1:
        raise ValueError(f"frames must have shape (B, T, N, D) with a token, got {tuple(frames.shape)}")


def _novelty(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one minus the cosine of each row with another, and the row's length, in float32 or wider."""
    squares, other_squares = rows.square().sum(3), others.square().sum(3)
    length = squares.sqrt()
    # sqrt(a) * sqrt(a) may differ from a, but the cosine of a row with itself must be exactly 1.
    both = torch.where(squares == other_squares, squares, length * other_squares.sqrt())
    return 1 - torch.where(both == 0, 0, (rows * others).sum(3) / both), length


@op(check=_check, detached=True)
def frame_novelty(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean of each frame, one minus the cosine of each token with that mean, and the lengths of tokens.

    All in float32::

        mean    = sum of the tokens / N
        length  = sqrt(sum(token * token))
        novelty = 1 - sum(token * mean) / (length * sqrt(sum(mean * mean)))

    A token or a mean of zeros has a cosine of 0 with everything.

    Args:
        frames: (B, T, N, D) float32, float16 or bfloat16: N tokens, one at least, of each of T frames; any strides.

    Returns:
        ``(mean, novelty, length)``, (B, T, D), (B, T, N) and (B, T, N), float32 without a gradient.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for another shape.

    Source:
        The frame descriptors and the token scores of V-CAST.
    """
    rows = frames.to(torch.promote_types(frames.dtype, torch.float32))
    mean = rows.mean(2)
    return mean, *_novelty(rows, mean[:, :, None])


@op(check=_check, detached=True)
def frame_change(frames: Tensor) -> Tensor:
    """Compute how much each token of a video changed: one minus its cosine with the same token of the frame before.

    Sums are accumulated in float32. An unchanged token has a change of exactly 0; one that is or was zeros, of 1.

    Args:
        frames: (B, T, N, D) float32, float16 or bfloat16: N tokens, one at least, of each of T frames; any strides.

    Returns:
        (B, T - 1, N) float32 without a gradient; (B, 0, N) if there is no frame.

    Raises:
        TypeError: for a tensor of another dtype. ValueError: for another shape.

    Source:
        The dissimilarity of EVS.
    """
    rows = frames.to(torch.promote_types(frames.dtype, torch.float32))
    return _novelty(rows[:, 1:], rows[:, : max(0, frames.shape[1] - 1)])[0]
