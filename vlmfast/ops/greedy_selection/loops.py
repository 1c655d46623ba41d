"""The greedy choices as PyTorch code: a loop of a few operations a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.ops.greedy_selection import definition

Call = tuple[Any, ...]
Preparation = Callable[..., Callable[[], Tensor]]  # takes the arguments of an op, and returns the call


def apart(op: Any, *args: Any) -> list[tuple[int, Call]]:
    """Return where each image in a row begins, and a call for it alone; images of one size are one call."""
    names, defaults = op.op.parameters
    *common, cu_seqlens, cu_kept, _ = args + tuple(defaults[len(args) :])
    if cu_seqlens is None:
        return [(0, tuple(common))]
    found: list[tuple[int, Call]] = []
    for (begin, kept), (end, kept_end) in pairwise(zip(cu_seqlens.tolist(), cu_kept.tolist(), strict=True)):
        own = {"k": kept_end - kept}
        for name, value in zip(names, common, strict=False):
            if isinstance(value, Tensor):
                value = value[len(found) :][:1] if name == "row_weights" else value[:, begin:end]
            own.setdefault(name, value)
        found.append((begin, tuple(own[name] for name in names[: len(common)])))
    return found


def _image_by_image(op: Any) -> Callable[[Preparation], Preparation]:
    """Let a loop for images of one size take all calls of an op."""

    def extend(loop: Preparation) -> Preparation:
        def prepare(*args: Any) -> Callable[[], Tensor]:
            images = apart(op, *args)
            if len(images) == 1:
                return loop(*images[0][1])
            runs = [(begin, loop(*call)) for begin, call in images if call[1]]
            return lambda: torch.cat([begin + run() for begin, run in runs], 1)

        return prepare

    return extend


@_image_by_image(definition.farthest)
def farthest_loop(
    features: Tensor, k: int, quality: Tensor | None = None, first_by_quality: bool = True
) -> Callable[[], Tensor]:
    """Choose for a whole batch at once, in float32: a matmul and four operations a step."""
    images = torch.arange(len(features), device=features.device)

    def run() -> Tensor:
        unit = F.normalize(features.float(), dim=2)
        distance = 1 - unit @ unit.transpose(1, 2)
        distance.diagonal(dim1=1, dim2=2).fill_(2)
        first = distance.amin(1)
        if quality is not None:
            distance = distance * quality[:, None]
            first = first * quality if first_by_quality else first
        best = first.argmax(1)
        chosen, nearest = [best], distance[images, best]
        nearest[images, best] = -1
        for _ in range(k - 1):
            best = nearest.argmax(1)
            chosen.append(best)
            nearest = torch.minimum(nearest, distance[images, best])
            nearest[images, best] = -1
        return torch.stack(chosen, 1).sort(1).values

    return run


@_image_by_image(definition.coverage)
def coverage_loop(
    similarity: Tensor, k: int, row_weights: Tensor | None = None, quality: Tensor | None = None
) -> Callable[[], Tensor]:
    """Choose for a whole batch at once, in float32: six operations a step, half of them small."""
    images = torch.arange(len(similarity), device=similarity.device)

    def run() -> Tensor:
        wide = similarity.float()
        covered = wide.new_zeros(len(wide), 1, wide.shape[2])
        gains = torch.empty_like(wide)
        chosen: list[Tensor] = []
        ones = torch.ones_like(covered[:, 0]) if row_weights is None else row_weights.float()
        for _ in range(k):
            torch.sub(wide, covered, out=gains).clamp_(min=0)
            gain = torch.bmm(gains, ones[..., None])[..., 0]
            gain = gain if quality is None else gain.mul_(quality)
            if chosen:
                gain.scatter_(1, torch.stack(chosen, 1), -1.0)
            chosen.append(gain.argmax(1))
            covered = torch.maximum(covered, wide[images, chosen[-1]][:, None])
        return torch.stack(chosen, 1).sort(1).values

    return run


@_image_by_image(definition.dpp_map)
def dpp_map_loop(features: Tensor, k: int, relevance: Tensor | None = None) -> Callable[[], Tensor]:
    """Choose for a whole batch at once, in float32: a matmul, then one of few rows and six operations a step."""
    images = torch.arange(len(features), device=features.device)

    def run() -> Tensor:
        unit = F.normalize(features.float(), dim=2)
        kernel = unit @ unit.transpose(1, 2)
        if relevance is not None:
            kernel = kernel * (relevance[:, :, None] * relevance[:, None]).float()
        left = kernel.diagonal(dim1=1, dim2=2).clone()
        shares = kernel.new_zeros(len(kernel), k, kernel.shape[1])
        chosen: list[Tensor] = []
        for step in range(k):
            best = left.argmax(1)
            chosen.append(best)
            row = kernel[images, best]
            if step:
                row = row - torch.bmm(shares[images, :step, best][:, None], shares[:, :step])[:, 0]
            share = torch.div(row, left[images, best].sqrt()[:, None], out=shares[:, step])
            left = torch.addcmul(left, share, share, value=-1).clamp_(min=1e-8)
            left.scatter_(1, torch.stack(chosen, 1), -1.0)
        return torch.stack(chosen, 1).sort(1).values

    return run
