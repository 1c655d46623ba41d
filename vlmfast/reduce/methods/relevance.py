"""How relevant visual tokens are to the text of a prompt, as the methods that read it have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-6  # what a token has at least, and what keeps a scale from being 0


def unlikeness(features: Tensor, text: Tensor) -> Tensor:
    """(B, N, D) tokens and (B, L, D) of text -> (B, N, L) float32: minus the cosine of each with each.

    Minus on purpose, as published: of the tokens of an image, those of the background are the most like any text.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    return -(F.normalize(features.to(wide), dim=2) @ F.normalize(text.to(features.device, wide), dim=2).mT)


def scaled(worth: Tensor) -> Tensor:
    """(B, N): from next to 0 for the least of an image to 1 for the most; 1 for all where they are the same."""
    least, most = worth.amin(1, keepdim=True), worth.amax(1, keepdim=True)
    return (worth - least + TINY) / (most - least + TINY)
