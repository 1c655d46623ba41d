"""The Gram matrices of the greedy selections, as an op by itself.

Few numbers of a matrix decide what is chosen, so that the ops' own samples do not notice most of the wrong ones.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tests.ptx.backend import PLACES, executing
from vlmfast.backends import Backend
from vlmfast.cases import Cases, Samples
from vlmfast.registry import OPS, Op

MOST = (
    1 << 14
)  # numbers of a sample's tokens; of longer ones, which a kernel sums one by one, the error exceeds torch's


def defined(features: Tensor, cu_seqlens: Tensor | None = None, longest: int = 0) -> Tensor:
    """Return the product of each two tokens of an image, in float32 or wider; 0 where an image has no such token."""
    wide = features if features.dtype == torch.float64 else features.float()
    if cu_seqlens is None:
        return wide @ wide.transpose(1, 2)
    products = wide.new_zeros(*features.shape[:2], longest)
    for first, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        products[0, first:end, : end - first] = wide[0, first:end] @ wide[0, first:end].T
    return products


def samples(device: str, dtype: torch.dtype) -> Samples:
    """Yield the shapes of the smaller samples of `farthest`, with numbers that are all of account."""
    for features, _, *more in OPS["farthest"].cases.samples(device, dtype):
        bounds = (more[2], more[4]) if len(more) > 2 else ()
        if 0 < features.numel() <= MOST:
            yield torch.randn(features.shape, device=device).to(dtype), *bounds


@functools.cache
def gram() -> Op:
    """Return the op, with backends that run Triton's kernel."""
    from vlmfast.kernels import greedy_selection

    def run(features: Tensor, cu_seqlens: Tensor | None = None, longest: int = 0) -> Tensor:
        count, longest = (len(features), features.shape[1]) if cu_seqlens is None else (len(cu_seqlens) - 1, longest)
        bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
        products = greedy_selection.gram(features, (count, longest, bounds, bounds))
        ones = torch.ones(*features.shape[:2], 1, dtype=torch.float64)
        return products.masked_fill(defined(ones, cu_seqlens, longest) == 0, 0.0)  # these are not written

    triton = Backend("triton", run, lambda *_: None)
    loaded = {"triton": triton} | {place: executing(triton, target) for place, target in PLACES.items()}
    cases = Cases(samples=samples, good_call={}, bad_calls=(), workloads=lambda *_: (), bytes=lambda *_: 0)
    family = OPS["farthest"].package
    return Op("gram", family, defined, lambda *_: None, detached=True, _cases=cases, _loaded=loaded)
