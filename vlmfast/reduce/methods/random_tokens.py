"""A random choice of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.reduce.methods.method import PruningMethod
from vlmfast.reduce.tokens import VisualTokens


@dataclass(frozen=True)
class RandomTokens(PruningMethod, name="random"):
    """A random choice: the baseline that a method has to beat.

    Args:
        keep: how many tokens are kept for each image: an int, or a float as the share of its visual tokens.
        seed: a picture gets the same tokens for the same seed, be it alone, in any batch or in any turn: the draw is
            told by its pixels.

    Raises:
        TypeError or ValueError: for a ``keep`` that is neither. TypeError: for a ``seed`` that is no int.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")

    def score(self, tokens: VisualTokens) -> Tensor:
        """Draw numbers on the CPU, so that every device has the same."""
        pictures = tokens.pixels().detach().cpu().contiguous()
        return torch.stack([self._draw(picture, tokens.count) for picture in pictures]).to(tokens.device)

    def _draw(self, picture: Tensor, count: int) -> Tensor:
        digest = hashlib.blake2b(repr(self.seed).encode(), digest_size=8)
        digest.update(picture.view(torch.uint8).numpy().data)
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little", signed=True))
        return torch.rand(count, generator=generator)
