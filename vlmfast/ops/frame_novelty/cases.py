"""How the novelty of tokens is tested and timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.cases import Cases, Samples, Workloads


def novelty_in_pytorch(frames: Tensor) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Compute it as published code does: a mean, the tokens widened to float32, a cosine, and a norm."""

    def run() -> tuple[Tensor, Tensor, Tensor]:
        mean = frames.mean(2, keepdim=True, dtype=torch.float32)
        wide = frames.float()
        return mean.squeeze(2), 1 - F.cosine_similarity(wide, mean, dim=3), wide.norm(dim=3)

    return run


def change_in_pytorch(frames: Tensor) -> Callable[[], Tensor]:
    """Compute it as published code does, which widens the tokens to float32."""
    return lambda: 1 - F.cosine_similarity(frames[:, 1:].float(), frames[:, :-1].float(), dim=3)


def novelty_bytes(frames: Tensor) -> int:
    """Count the tokens twice, and the float32 means out of the first launch and into the second."""
    batch, count, tokens, size = frames.shape
    return 2 * frames.nbytes + 8 * batch * count * (size + tokens)


def change_bytes(frames: Tensor) -> int:
    batch, count, tokens, _ = frames.shape
    return frames.nbytes + 4 * batch * (count - 1) * tokens


def samples(device: str, dtype: torch.dtype) -> Samples:
    shapes = [
        (2, 3, 5, 64),
        (1, 1, 1, 8),
        (1, 2, 7, 80),
        (3, 2, 9, 7),
        (1, 3, 6, 1160),
        (1, 0, 5, 16),
        (0, 2, 3, 16),
        (1, 3, 13, 33),
        (2, 5, 17, 128),
        (1, 2, 70, 24),
    ]
    for shape in shapes:
        yield (torch.randn(shape, device=device, dtype=dtype),)
    # tokens that stay the same, are negated, appear and disappear
    frames = torch.randn(1, 3, 5, 40, device=device, dtype=dtype)
    frames[:, 1, 0] = frames[:, 0, 0]
    frames[:, 1, 1] = -2 * frames[:, 0, 1]
    frames[:, 1, 2] = 0
    frames[:, 2, 2:] = 0
    yield (frames,)


def workloads(device: str, dtype: torch.dtype) -> Workloads:
    """Yield 8 small frames of Qwen2-VL-2B, and 32 of Qwen2.5-VL-7B."""
    for frames, tokens, size in ((8, 64, 1536), (32, 256, 3584)):
        yield f"{frames}x{tokens}x{size}", (torch.randn(1, frames, tokens, size, device=device, dtype=dtype),)


_FRAMES = torch.ones(2, 3, 4, 8)
_SHARED: dict[str, Any] = {
    "samples": samples,
    "good_call": {"frames": _FRAMES},
    "bad_calls": (
        ("frames", _FRAMES[0], ValueError, r"frames must have shape \(B, T, N, D\), got \(3, 4, 8\)"),
        ("frames", _FRAMES[:, :, :0], ValueError, r"frames must have shape .* with a token, got \(2, 3, 0, 8\)"),
    ),
    "workloads": workloads,
}

frame_novelty = Cases(
    **_SHARED,
    bytes=novelty_bytes,
    flops=lambda frames: 5 * frames.numel(),
    peers={"PyTorch": novelty_in_pytorch},
    launches=2,
    requested=1.4,  # the float32 mean is read for every four tokens
)

frame_change = Cases(
    **_SHARED,
    bytes=change_bytes,
    flops=lambda frames: 6 * frames[:, 1:].numel(),
    peers={"PyTorch": change_in_pytorch},
    requested=2,  # a token is read again for the comparison with the next frame
)
