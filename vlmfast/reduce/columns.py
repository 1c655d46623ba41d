"""Which columns of a prompt stay when visual tokens are reduced, and which images belong to which sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.reduce.reduced_image import ReducedImage


@dataclass(frozen=True)
class Columns:
    """A short prompt, described by the columns of the full prompt that it keeps."""

    index: Tensor  # (B, N) int64, for each column of the short prompt its column in the full one
    valid: Tensor  # (B, N) bool, false at padding
    total: int  # L, the number of columns of the full prompt
    padded: bool = True  # whether there may be padding; known without a wait for ``valid``

    @property
    def dropped(self) -> int:
        """The number of columns that the short prompt lacks."""
        return self.total - self.index.shape[1]

    def take(self, rows: Tensor, fill: int) -> Tensor:
        """(..., B, L) -> (..., B, N), with ``fill`` for padding."""
        index, valid = (own.expand(*rows.shape[:-2], -1, -1) for own in (self.index, self.valid))
        return rows.gather(-1, index).masked_fill(~valid, fill)

    def then(self, other: Columns) -> Columns:
        """Return the columns of two prompts, one after the other."""
        index = torch.cat([self.index, other.index + self.total], 1)
        valid = torch.cat([self.valid, other.valid], 1)
        return Columns(index, valid, self.total + other.total, self.padded or other.padded)

    def select(self, samples: list[int]) -> Columns:
        """Return the columns of these samples."""
        return Columns(self.index[samples], self.valid[samples], self.total, self.padded)

    def to(self, device: torch.device) -> Columns:
        """Return them on a device."""
        if self.index.device == device:
            return self
        return Columns(self.index.to(device), self.valid.to(device), self.total, self.padded)

    def reorder(self, samples: Tensor) -> Columns:
        """Return the columns of these samples, given as a tensor, without waiting for the device."""
        rows = samples.to(self.index.device)
        return Columns(self.index[rows], self.valid[rows], self.total, self.padded)

    def latest(self) -> Tensor:
        """(B, L) int64: for each column of the full prompt its column in the short one, or the last one before it."""
        own = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        found = own.new_zeros(own.shape[0], self.total).scatter(1, self.index, own.masked_fill(~self.valid, 0))
        return found.cummax(1).values

    def of(self, other: Columns) -> Columns:
        """Return these columns, which count in the short prompt of another, as columns of the full prompt."""
        index, valid = (rows.gather(1, self.index) for rows in (other.index, other.valid))
        return Columns(index, valid & self.valid, other.total, self.padded or other.padded)

    @classmethod
    def all(cls, like: Tensor) -> Columns:
        """Return all columns of a prompt (B, L)."""
        index = torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)
        return cls(index, torch.ones_like(index, dtype=torch.bool), like.shape[1], padded=False)


def drop_columns(mask: Tensor, *visual: tuple[Tensor, Sequence[ReducedImage]]) -> Columns:
    """Leave out the placeholders that the images do not keep, and padding that no sample needs any longer.

    If the images keep all placeholders, nothing is left out. A masked placeholder is not padding, because its image is
    encoded too. Shorter samples are padded on the left, or on the right if the prompt was.

    Args:
        mask: (B, L) bool, false at padding.
        visual: all images of the batch, and all videos: where their placeholders are, (B, L) bool, and what became of
            them in row-major order.
    """
    if all(len(image.columns) == image.total for _, images in visual for image in images):
        return Columns.all(mask)
    # only padding at an end is left out: the caller meant a gap within a prompt, and a masked image
    present = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
    for is_image, images in visual:
        flags = [mask.new_zeros(image.total).index_fill(0, image.columns.to(mask.device), True) for image in images]
        present = present.masked_scatter(is_image, torch.cat(flags))
    right = ~mask[:, -1].all() & mask[:, 0].all()
    lengths = torch.cat([present.sum(1), right[None]]).tolist()  # the one wait for the device
    return squeezed(present, lengths[:-1], bool(lengths[-1]))


def squeezed(present: Tensor, lengths: Sequence[int], right: bool) -> Columns:
    """Keep the columns that are ``present`` (B, L), ``lengths`` of each sample, padded on the left or ``right``."""
    longest = max(lengths)
    order = present.to(torch.uint8).argsort(dim=1, stable=True, descending=right)
    index = order[:, :longest] if right else order[:, order.shape[1] - longest :]
    return Columns(index, present.gather(1, index), present.shape[1], padded=min(lengths) < longest)


def dealt(
    totals: Sequence[int], cached: Sequence[int], new: Sequence[int], mismatch: str
) -> list[tuple[list[int], list[int]]]:
    """Return the numbers of the images of each sample: those in the cached part, and those after it.

    Args:
        totals: the number of placeholders of each image, in the order of the batch, for the new parts or for the
            whole prompts.
        cached: how many placeholders each sample has in the cached part.
        new: how many it has after that.
        mismatch: how the error message begins.

    Raises:
        ValueError: if they do not fit.
    """
    whole = sum(totals) != sum(new)
    at, found = 0, []
    for sample, (before, after) in enumerate(zip(cached, new, strict=True)):
        parts: list[list[int]] = []
        for placeholders in (before if whole else 0, after):
            begin, missing = at, placeholders
            while missing > 0 and at < len(totals):
                missing -= totals[at]
                at += 1
            if missing:
                raise ValueError(
                    f"{mismatch}: sample {sample} has {placeholders} placeholders, and the next images make "
                    f"{list(totals[begin:])}"
                )
            parts.append(list(range(begin, at)))
        found.append((parts[0], parts[1]))
    if at < len(totals):
        raise ValueError(f"{mismatch}: {sum(cached) + sum(new)} placeholders, and images of {list(totals)}")
    return found


def new_images(
    images: Sequence[ReducedImage], cached: Sequence[int], new: Sequence[int], mismatch: str
) -> list[list[ReducedImage]]:
    """Return the images that belong to the new part of each sample, as `dealt` says."""
    numbers = dealt([image.total for image in images], cached, new, mismatch)
    return [[images[number] for number in own] for _, own in numbers]


def without_gaps(positions: Tensor, columns: Columns) -> Tensor:
    """(B, L) positions of the full prompt -> (B, N) of the short one, without gaps where tokens were left out.

    Positions may restart within a row, as in packed samples: each run is counted by itself.
    """
    kept = torch.zeros_like(positions, dtype=torch.bool).scatter(1, columns.index, columns.valid)
    left_out = (~kept).cumsum(1)
    begins = torch.ones_like(kept)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    before = torch.where(begins, left_out - (~kept).long(), 0).cummax(1).values
    return columns.take(positions - (left_out - before), 0)
