"""Edge cases of RMSNorm that the generated tests do not reach."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlmfast
from tests.helpers.cases import DTYPES, each, family, outputs, padded, require, run, runnable, widened
from tests.helpers.rounding import assert_within
from vlmfast.ops.rms_norm.definition import VARIANTS
from vlmfast.registry import OPS, Op

ROOT = Path(__file__).parents[2]
FAMILY = family("rms_norm")
DEFINITION = OPS["rms_norm"].reference


CLASSES = [
    ("olmo2.Olmo2RMSNorm", "olmo"),
    ("helium.HeliumRMSNorm", "olmo"),
    ("gemma4.Gemma4RMSNorm", "olmo"),
    ("gemma4.Gemma4RMSNorm", None),
    ("nanochat.NanoChatRMSNorm", None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "variant"), CLASSES)
@pytest.mark.parametrize("wide_weight", [False, True])
def test_classes_of_hugging_face(name: str, variant: str | None, wide_weight: bool, dtype: torch.dtype):
    """The native op is bit-equal to each Hugging Face class that the op's docstring cites."""
    require(OPS["rms_norm"], "native")
    folder, _, class_name = name.partition(".")
    modeling = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}", reason="an older transformers")
    norm_class = getattr(modeling, class_name)
    if variant is not None:
        module = norm_class(96, 1e-5)
        module.weight = torch.nn.Parameter(torch.randn(96, dtype=torch.float32 if wide_weight else dtype))
    else:
        module = norm_class(96, 1e-5, with_scale=False) if folder == "gemma4" else norm_class(1e-5)
    x = torch.randn(5, 96).to(dtype)
    with torch.no_grad(), vlmfast.use("native"):
        got = vlmfast.rms_norm(x, getattr(module, "weight", None), 1e-5, variant or "llama")
        want = module(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", each(FAMILY))
def test_native_takes_every_sample(op: Op, dtype: torch.dtype):
    """The generated tests skip calls that a backend refuses; native refuses none, in particular no float32 weight."""
    require(op, "native")
    samples = list(op.cases.samples("cpu", dtype))
    assert runnable(op, "native", samples) == samples


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hidden", [2, 7, 64, 1000, 2048])  # less than a vector, than a block, and a level of a sum
def test_native_weight_of_float32(hidden: int, variant: str, dtype: torch.dtype):
    """With half-precision rows it is bit-equal to Hugging Face, and gradients are as accurate as the definition's."""
    x, residual = (padded(torch.randn(35, hidden).to(dtype)) for _ in range(2))
    norm = torch.randn(hidden), 1e-6, variant
    grad_output = torch.randn_like(DEFINITION(x, *norm))
    args = {
        "rms_norm": (x, *norm),
        "add_rms_norm": (x, residual, *norm),
        "rms_norm_backward": (grad_output, x, *norm, residual),
    }
    for op in FAMILY:
        require(op, "native")
        call = args[op.name]
        got = run(op, "native", call)
        if op.cases.upstream is None:
            assert_within(got, op.reference(*call), op.reference(*widened(call)))
            continue
        for g, u in zip(got, outputs(op.cases.upstream(*call)()), strict=True):
            assert g.dtype == u.dtype
            assert torch.equal(g, u)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_native_refuses_other_mixtures(x: torch.dtype, weight: torch.dtype, variant: str):
    """It gives a reason, so that another backend runs; a direct call of the native op is an error."""
    require(OPS["rms_norm"], "native")
    rows, factors = torch.randn(3, 96).to(x), torch.randn(96).to(weight)
    wide = torch.promote_types(x, weight) if variant == "llama" else x
    tail = factors, 1e-6, variant
    for op, args in (
        (OPS["rms_norm"], (rows, *tail)),
        (OPS["add_rms_norm"], (rows, rows, *tail)),
        (OPS["rms_norm_backward"], (rows.to(wide), rows, *tail)),
    ):
        assert "several dtypes" in op.backend("native").unsupported(*args)
        with pytest.raises(RuntimeError, match=f"weight must be {str(x)[6:]}, the dtype of x, .*got {str(weight)[6:]}"):
            op.backend("native").run(*args)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_have_the_dtype_of_the_output(variant: str):
    require(OPS["rms_norm"], "native")
    backward = OPS["rms_norm_backward"]
    x, weight = torch.randn(3, 96).bfloat16(), torch.randn(96)
    right = OPS["rms_norm"].reference(x, weight, 1e-6, variant)
    wrong = right.bfloat16() if variant == "llama" else right.float()
    assert backward.backend("native").unsupported(right, x, weight, 1e-6, variant) is None
    assert "several dtypes" in backward.backend("native").unsupported(wrong, x, weight, 1e-6, variant)
    with pytest.raises(RuntimeError, match=f"grad_output must be {str(right.dtype)[6:]}, got {str(wrong.dtype)[6:]}"):
        backward.backend("native").run(wrong, x, weight, 1e-6, variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_one_element(backend: str, dtype: torch.dtype):
    """Such rows are not among the samples, because their gradient is zero except for eps and noise."""
    x, weight = torch.tensor([[-3.0], [-1.0], [0.5], [2.0], [4.0]]).to(dtype), torch.tensor([1.5]).to(dtype)
    assert torch.equal(vlmfast.rms_norm(x, weight), DEFINITION(x, weight))
    grad_x, grad_weight = OPS["rms_norm_backward"].function(torch.ones_like(x), x, weight)
    assert grad_x.abs().max() < 1e-3
    torch.testing.assert_close(grad_weight, torch.ones_like(weight), rtol=1e-2, atol=0.0)  # two -1, three 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(backend: str, dtype: torch.dtype, value: float):
    x, weight = torch.randn(3, 96).to(dtype), torch.randn(96).to(dtype)
    x[1, 50] = value
    got, want = vlmfast.rms_norm(x, weight), DEFINITION(x, weight)
    assert torch.equal(got.isnan(), want.isnan())
    assert want[1].isnan().any()
    assert not got[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subnormal_and_huge_values(backend: str, dtype: torch.dtype):
    """Subnormals are not flushed; a sum of squares that overflows gives zeros, as Hugging Face's does."""
    x, weight = torch.randn(3, 128).to(dtype), torch.randn(128).to(dtype)
    x[0] *= 1e-40
    x[1] *= 1e30
    weight[:4] = 1e-39
    got, want = vlmfast.rms_norm(x, weight), DEFINITION(x, weight)
    assert want[2, :4].abs().max() > 0
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.usefixtures("four_threads")
def test_more_rows_than_threads_or_blocks(backend: str):
    rows = 600 if backend != "native" else 70_000  # the native op uses threads from 32k elements on
    x, weight = torch.randn(rows, 64), torch.randn(64)
    torch.testing.assert_close(vlmfast.rms_norm(x, weight), DEFINITION(x, weight))
    grads = OPS["rms_norm_backward"].function(x, x, weight)
    exact = OPS["rms_norm_backward"].reference(x.double(), x.double(), weight.double())
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.thorough
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one level")
@pytest.mark.parametrize("level", ["baseline", "v3", "v4"])
def test_every_cpu_level_gives_the_same_bits(level: str):
    """The level is chosen once per process, so the generated tests run again in one with a lower level."""
    require(OPS["rms_norm"], "native")
    own = {"DEFAULT": "baseline", "AVX2": "v3"}.get(torch.backends.cpu.get_cpu_capability())
    if level == own and not os.environ.keys() & {"ATEN_CPU_CAPABILITY", "VLMFAST_CPU_LEVEL"}:
        pytest.skip("it is the level of this processor, at which the generated tests run anyway")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qx",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_generated.py",
        "-k",
        "cpu-native",
    ]
    environment = {**os.environ, "VLMFAST_CPU_LEVEL": level}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "which this processor does not have" in ran.stdout:
        pytest.skip(f"this processor is older than {level}")
    if "which this build does not have" in ran.stdout:
        pytest.skip(f"{level} was not compiled: VLMFAST_HIGHEST_LEVEL")
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert " passed" in ran.stdout


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns, the same one for every NaN."""
    return torch.where(values.isnan(), torch.full_like(values, float("nan")), values).view(torch.int16)


@pytest.mark.parametrize("variant", [*VARIANTS, None])
@pytest.mark.parametrize("weight_exponent", [-133, -126, -60, 0, 100])
@pytest.mark.parametrize("hidden", [64, 100, 128, 2048])
def test_what_the_processor_would_flush(hidden: int, weight_exponent: int, variant: str | None):
    """The processor's conversion flushes subnormals to zero, so the native op uses it only where none can occur."""
    require(OPS["rms_norm"], "native")
    generator = torch.Generator().manual_seed(hidden)
    exponents = torch.arange(-133, 127).repeat_interleave(2)  # of one element per row; the others are ordinary
    x = torch.randn(len(exponents), hidden, generator=generator)
    residual, weight = torch.randn(x.shape, generator=generator), torch.randn(hidden, generator=generator)
    x[:, 7] = torch.tensor([1.5 * 2.0**exponent for exponent in exponents.tolist()])
    residual[:, 7] = -1.25 * x[:, 7]
    residual[::3] *= 2.0**-120
    x[::5, 9], x[::7], residual[::7] = 0.0, x[::7] * 2.0**-125, 0.0
    x[1::7] *= 2.0**-70  # their squares are subnormal, and rounded before they are added
    x[:4, 3] = torch.tensor([float("inf"), float("nan"), 0.0, 3e38])
    weight[7], weight[11] = 1.5 * 2.0**weight_exponent, 0.0
    x, residual, weight = (values.to(torch.bfloat16) for values in (x, residual, weight))
    weight, variant = (None, "gemma") if variant is None else (weight, variant)
    for eps in (1e-6, 0.0, 1e30):
        with vlmfast.use("native"):
            got = vlmfast.rms_norm(x, weight, eps, variant), *vlmfast.add_rms_norm(x, residual, weight, eps, variant)
        want = DEFINITION(x, weight, eps, variant), *OPS["add_rms_norm"].reference(x, residual, weight, eps, variant)
        for name, ours, theirs in zip(("y", "y of the sum", "sum"), got, want, strict=True):
            assert torch.equal(_bits(ours), _bits(theirs)), (name, eps)
