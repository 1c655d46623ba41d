"""A second implementation of token reduction, from its rules: plain float64 loops over one crop or image at a time."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Reduced:
    """The reduced tokens of one crop: the kept patches, the merge targets, and the merged rows."""

    kept: list[int]
    targets: list[int]
    assigned: list[list[int]]
    merged: list[Tensor]


def zipped(hidden: Tensor, scores: Tensor, metric: Tensor, keep: int, contextual: int, merge: str) -> Reduced:
    """Apply VisionZip to one crop: hidden (N, C), scores (N,), metric (N, M)."""
    worth, keys = scores.tolist(), metric.tolist()
    ranked = sorted(range(len(worth)), key=lambda i: (-worth[i], i))
    kept = sorted(ranked[:keep])
    others = [i for i in range(len(worth)) if i not in kept]
    if not contextual:
        return Reduced(kept, [], [], [])
    step = len(others) // contextual
    targets = [others[step * c] for c in range(contextual)]

    def cosine(i: int, j: int) -> float:
        lengths = math.sqrt(sum(a * a for a in keys[i]) * sum(a * a for a in keys[j]))
        return sum(a * b for a, b in zip(keys[i], keys[j], strict=True)) / lengths

    assigned: list[list[int]] = [[] for _ in targets]
    for i in others:
        if i not in targets:
            likeness = [cosine(i, target) for target in targets]
            assigned[likeness.index(max(likeness))].append(i)
    merged = []
    for target, joined in zip(targets, assigned, strict=True):
        added = sum((hidden[i] for i in joined), torch.zeros_like(hidden[target]))
        if merge == "mean":
            merged.append((hidden[target] + added) / (1 + len(joined)))
        else:
            merged.append(hidden[target] + added / max(1, len(joined)))
    return Reduced(kept, targets, assigned, merged)


@dataclass
class Tower:
    """Outputs of a tower for B crops: hidden (B, N, C), scores (B, N), metric (B, N, M), and the (B, C) CLS token."""

    hidden: Tensor
    scores: Tensor
    metric: Tensor
    cls: Tensor | None


@torch.no_grad()
def encoded(model: nn.Module, pixels: Tensor, layer: int, has_cls: bool, dtype: torch.dtype = torch.float64) -> Tower:
    """Encode pixels by a copy of the tower with eager attention, which returns its attention maps."""
    tower: Any = copy.deepcopy(model.vision_tower).to(dtype)
    tower.set_attn_implementation("eager")
    out = tower(pixels.to(dtype), output_attentions=True, output_hidden_states=True)
    number = layer % len(out.hidden_states)
    below, weights = out.hidden_states[number - 1], out.attentions[number - 1]
    layers = getattr(tower.encoder, "layers", None) or tower.encoder.layer
    block = layers[number - 1]
    if hasattr(block, "attention"):
        key = block.attention.k_norm(block.attention.k_proj(block.layernorm_before(below)))
        heads = block.attention.num_heads
        states = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    else:
        key = block.self_attn.k_proj(block.layer_norm1(below))
        heads = block.self_attn.num_heads
        states = out.hidden_states[layer]
    metric = key.view(*key.shape[:2], heads, -1).mean(2)
    if not has_cls:
        return Tower(states, weights.mean(1).sum(1), metric, None)
    return Tower(states[:, 1:], weights[:, :, 0, 1:].sum(1), metric[:, 1:], states[:, 0])


def kept_part(grid: tuple[int, int], side: int, size: tuple[int, int]) -> tuple[range, range]:
    """Return the rows and columns of patches, over all crops, that hold a part of an image of size (height, width)."""
    rows, columns = grid[0] * side, grid[1] * side
    height, width = size
    if width * rows > height * columns:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return range(border, rows - border), range(columns)
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return range(rows), range(border, columns - border)


Token = tuple[int, int] | str  # (crop, patch), or the name of another row


def model_order(grid: tuple[int, int] | None, side: int, size: tuple[int, int]) -> list[Token]:
    """Return the tokens of an unreduced image in the model's order; without a grid the image has no crops."""
    tokens: list[Token] = [(0, patch) for patch in range(side * side)]
    if grid is None:
        return [*tokens, "newline"]
    rows, columns = kept_part(grid, side, size)
    for y in rows:
        for x in columns:
            tokens.append((1 + y // side * grid[1] + x // side, y % side * side + x % side))
        tokens.append("newline")
    return tokens


def published_order(grid: tuple[int, int], side: int, crops: list[Reduced]) -> list[Token]:
    """Return VisionZip's order of tokens: "cls", a kept (crop, patch), "crop merged number", or the name of a row."""
    tokens: list[Token] = ["0 cls", *((0, patch) for patch in crops[0].kept)]
    tokens += [f"0 merged {c}" for c in range(len(crops[0].targets))]
    for y in range(grid[0] * side):
        for x in range(grid[1] * side):
            crop, patch = 1 + y // side * grid[1] + x // side, y % side * side + x % side
            if patch in crops[crop].kept:
                tokens.append((crop, patch))
    tokens += [f"{crop} cls" for crop in range(1, len(crops))]
    return tokens + [f"{crop} merged {c}" for crop in range(1, len(crops)) for c in range(len(crops[crop].targets))]
