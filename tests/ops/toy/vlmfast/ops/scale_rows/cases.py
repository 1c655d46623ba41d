"""Cases of `scale_rows`."""

from __future__ import annotations

import torch

from vlmfast.cases import Cases, Samples, Workloads


def samples(device: str, dtype: torch.dtype) -> Samples:
    for shape in ((3, 64), (5, 7), (0, 8), (2, 0)):
        yield tuple(torch.randn(size, device=device, dtype=dtype) for size in (shape, shape[:1]))


def workloads(device: str, dtype: torch.dtype) -> Workloads:
    yield "600x2048", tuple(torch.randn(size, device=device, dtype=dtype) for size in ((600, 2048), (600,)))


scale_rows = Cases(
    samples=samples,
    good_call={"x": torch.ones(2, 8), "factors": torch.ones(2)},
    bad_calls=[("factors", torch.ones(3), ValueError, r"factors must have shape \(2,\), the rows of x, got \(3,\)")],
    workloads=workloads,
    bytes=lambda x, factors: 2 * x.nbytes + factors.nbytes,
)
