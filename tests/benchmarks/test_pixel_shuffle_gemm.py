"""The candidate passes the tests of every op, and tests of several tiles, real widths and the choice of tiles."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

import vlmfast
from tests.helpers import cases
from tests.ops import test_generated, test_gpu, test_traffic
from vlmfast.benchmarks import bench
from vlmfast.benchmarks.candidates import CANDIDATES
from vlmfast.ops.pixel_shuffle import cases as calls
from vlmfast.registry import OPS

pytestmark = pytest.mark.thorough
OP = CANDIDATES["pixel_shuffle_gemm"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """Return the kernels with tiles so small that a matmul of a few tokens has many."""
    cases.require(OP, "triton")
    from vlmfast.benchmarks.candidates.kernels import pixel_shuffle_gemm

    tile = pixel_shuffle_gemm.GemmConfig(
        BLOCK_TOKENS=16, BLOCK_COLUMNS=16, BLOCK_CHANNELS=16, num_warps=4, num_stages=2, GROUP=2
    )
    monkeypatch.setattr(pixel_shuffle_gemm, "HALF", (tile,))
    monkeypatch.setattr(pixel_shuffle_gemm, "WIDE", (tile,))
    with vlmfast.use("triton"):
        yield pixel_shuffle_gemm


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_errors_and_roundings(dtype: torch.dtype) -> None:
    """As for every op, but a row that is rounded the other way may show in several outputs.

    On a CPU torch rounds a matmul of strided half-precision matrices twice, so it is no reference for these.
    """
    differ = total = 0
    draws = itertools.chain(*(OP.cases.samples(DEVICE, dtype) for _ in range(4)))  # one draw has few outputs
    for args in cases.runnable(OP, "triton", draws):
        got, defined = cases.run(OP, "triton", args), cases.outputs(OP.reference(*args))
        test_generated.assert_within(got, defined, cases.outputs(OP.reference(*cases.widened(args))))
        differ += int((got[0] != OP.cases.upstream(*args)()).sum())
        total += got[0].numel()
    if dtype != torch.float32:
        assert differ <= total // (250 if dtype == torch.bfloat16 else 150), f"{differ} of {total} elements differ"


AS_EVERY_OP = [
    test_generated.test_opcheck,
    test_generated.test_triton_launchers_wait_for_nothing,
    test_generated.test_checks_need_no_numbers_of_a_device,
    test_generated.test_bad_calls_are_refused,
]


@pytest.mark.parametrize("test", AS_EVERY_OP, ids=lambda test: test.__name__)
def test_it_passes(test) -> None:
    test(OP)


def test_traffic_of_the_kernels() -> None:
    test_traffic.test_traffic(OP, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("test", [test_gpu.test_no_host_synchronisation, test_gpu.test_cuda_graph])
def test_it_passes_on_a_gpu(test) -> None:
    test(OP, "triton")


def test_it_is_no_op_of_the_package() -> None:
    assert OP.name not in OPS
    assert OP.name in bench.KNOWN
    assert OP.name not in bench.PUBLIC


def call(dtype: torch.dtype, norm: int, batch: int = 3, mean: float = 10.0) -> tuple:
    """Make the arguments of a matmul of 5 x 6 tokens per image, with features far from zero."""
    x = torch.randn(batch, 120, 24, device=DEVICE).to(dtype) + mean
    weight = (torch.randn(40, 96, device=DEVICE) * 96**-0.5).to(dtype)
    bias, *vectors = (torch.randn(size, device=DEVICE).to(dtype) for size in (40, norm * 24, norm * 24))
    vectors = vectors if norm else (None, None)
    return x, weight, bias, (10, 12), 2, "column", 1.0, *vectors, 1e-6, "gelu"


@pytest.mark.parametrize("norm", [0, 1, 4], ids=["none", "patch", "token"])
def test_tiles_meet(kernels, norm: int) -> None:
    """There are one or three groups of blocks of tokens, the last of them not full, and several blocks of columns."""
    for batch in (1, 3):
        args = call(torch.float32, norm, batch)
        exact = OP.reference(*cases.widened(args))
        torch.testing.assert_close(OP.function(*args).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3, 64])
def test_groups_of_any_size_cover_all_blocks(kernels, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WIDE", (dataclasses.replace(kernels.WIDE[0], GROUP=group),))
    args = call(torch.float32, 0)
    torch.testing.assert_close(OP.function(*args), OP.reference(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_no_bit_depends_on_the_layout(dtype: torch.dtype) -> None:
    cases.require(OP, "triton")
    for sample in list(OP.cases.samples(DEVICE, dtype))[:4]:
        want = cases.run(OP, "triton", sample)
        for layout in (cases.offset, cases.padded, cases.oddly_padded, cases.transposed, cases.every_other):
            args = tuple(layout(a) if cases.is_tensor(a) else a for a in sample)
            assert torch.equal(*cases.run(OP, "triton", args), *want), layout.__name__


@pytest.mark.parametrize("norm", [1, 4], ids=["patch", "token"])
def test_tokens_are_rounded_before_the_product(kernels, norm: int) -> None:
    """They are rounded as between two modules; a norm that is folded into the matmul would skip that rounding."""
    args = call(torch.bfloat16, norm)
    got, upstream = OP.function(*args), calls.linear_upstream(*args)()
    assert (got != upstream).double().mean() < 0.02  # another order of sums
    x, weight, bias, *layout, gamma, beta, eps, _ = (a.float() if cases.is_float(a) else a for a in args)
    tokens = OPS["pixel_shuffle_norm"].reference(x, gamma, beta, *layout, eps)
    folded = F.gelu((tokens @ weight.t() + bias).bfloat16())
    assert (folded != upstream).double().mean() > 0.05


@pytest.mark.parametrize("norm", [1, 4], ids=["patch", "token"])
def test_moments_of_features_far_from_zero(kernels, norm: int) -> None:
    """The mean of squares minus the square of the mean would be wrong by a tenth."""
    args = call(torch.float32, norm, mean=1000.0)
    exact = OP.reference(*cases.widened(args))
    torch.testing.assert_close(OP.function(*args).double(), exact, rtol=1e-3, atol=1e-3)


def test_the_tile_fits_the_gpu() -> None:
    """The choice is the largest tile that fits the shared memory and occupies all multiprocessors."""
    cases.require(OP, "triton")
    from vlmfast.benchmarks.candidates.kernels.pixel_shuffle_gemm import HALF, WIDE, config_for

    h100, a100, mi300 = (132, 227 << 10), (108, 163 << 10), (304, 64 << 10)
    assert config_for(16384, 3584, 2, *h100) == HALF[0]
    assert config_for(16384, 3584, 2, *a100) == HALF[1]
    assert config_for(16384, 3584, 2, *mi300) == HALF[3]
    assert config_for(4096, 960, 2, *h100) == HALF[0]
    assert config_for(1024, 3584, 2, *h100) == HALF[1]
    assert config_for(1024, 960, 2, *h100) == HALF[2]
    assert config_for(256, 3584, 2, *h100) == HALF[3]
    assert config_for(16384, 3584, 4, *h100) == WIDE[0]


def test_reasons() -> None:
    cases.require(OP, "triton")
    unsupported = OP.backend("triton").unsupported
    x, weight = torch.ones(1, 16, 8), torch.ones(5, 32)
    assert unsupported(x, weight) is None or torch.cuda.is_available()
    assert "several dtypes" in unsupported(x, weight.half())
    assert "several dtypes" in unsupported(x, weight, torch.ones(5).bfloat16())
    assert "0 channels" in unsupported(x[..., :0], weight[:, :0])
    assert "16385 channels" in unsupported(torch.empty(1, 16, 16385, device="meta"), weight)
    assert "more than" in unsupported(torch.empty(1 << 27, 16, 8, device="meta"), weight)
