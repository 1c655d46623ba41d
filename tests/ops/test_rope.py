"""Cases of rotary embedding that the generated tests do not reach: inputs of real models, and mistakes of a caller."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vlmfast
from tests.helpers.cases import DTYPES, each, family, outputs, require, run, runnable
from vlmfast.registry import OPS, Op

FAMILY = family("rope")
OP = OPS["qk_norm_rope"]


def call(dtype: torch.dtype = torch.float32, heads: int = 4, size: int = 64) -> dict[str, Tensor]:
    """Make the arguments of a call with norms, whose cos and sin are those of positions 0, 1, 2, ..."""
    query, key = torch.randn(2, 5, heads, size, dtype=dtype), torch.randn(2, 5, 2, size, dtype=dtype)
    angles = torch.arange(5)[None, :, None] * 10000.0 ** -torch.linspace(0, 1, size // 2)
    angles = torch.cat([angles, angles], -1)
    weights = torch.randn(2, size, dtype=dtype)
    names = ("query", "key", "query_weight", "key_weight", "cos", "sin")
    values = (query, key, *weights, angles.cos().to(dtype), angles.sin().to(dtype))
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", each(FAMILY))
def test_native_takes_every_sample(op: Op, dtype: torch.dtype):
    """The generated tests skip calls that a backend refuses; native refuses none, not even float32 cos and sin."""
    require(op, "native")
    samples = list(op.cases.samples("cpu", dtype))
    assert runnable(op, "native", samples) == samples


def test_scores_depend_on_distances_alone(backend: str):
    """The dot product of a query and a key depends only on the distance of their positions."""
    given = call()
    given["query"], given["key"] = (x[:, :1].expand(-1, 5, -1, -1).contiguous() for x in (given["query"], given["key"]))
    query, key = vlmfast.qk_norm_rope(**given)
    scores = torch.einsum("bthd,bsd->bhts", query, key[:, :, 0])
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1], rtol=1e-4, atol=1e-3)
    assert (scores[..., 0, 1] - scores[..., 0, 0]).abs().max() > 0.1


@pytest.mark.parametrize("fault", ["shifted", "exchanged", "sections"])
def test_mistakes_of_a_caller_show(backend: str, fault: str):
    """Shifted positions, exchanged weights of queries and keys, and reordered sections each change the result."""
    given = call()
    if fault == "sections":
        for name in ("cos", "sin"):
            given[name] = torch.stack([given[name].roll(axis, 1) for axis in range(3)])
        wrong = {**given, "sections": [8, 16, 8]}
        given["sections"] = [16, 8, 8]
    elif fault == "shifted":
        wrong = {**given, **{name: given[name].roll(1, 1) for name in ("cos", "sin")}}
    else:
        wrong = {**given, "query_weight": given["key_weight"], "key_weight": given["query_weight"]}
    for got, want, other in zip(
        vlmfast.qk_norm_rope(**given), OP.reference(**given), OP.reference(**wrong), strict=True
    ):
        torch.testing.assert_close(got, want)
        assert (got - other).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_one_projection(backend: str, dtype: torch.dtype):
    """Queries and keys that are slices of one projection, or have heads before tokens, are read in place."""
    given = call(dtype)
    joined = torch.randn(2, 5, 4 + 2 + 2, 64, dtype=dtype)
    given["query"], given["key"], _ = joined.split([4, 2, 2], 2)
    want = OP.reference(**{name: x.contiguous() for name, x in given.items()})
    close = {"rtol": max(2 * torch.finfo(dtype).eps, 1.3e-6), "atol": 1e-5}  # a rounding may go the other way
    for got, expected in zip(vlmfast.qk_norm_rope(**given), want, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected, **close)
    before = {**given, **{name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key")}}
    for got, expected in zip(vlmfast.qk_norm_rope(**before), want, strict=True):
        torch.testing.assert_close(got, expected, **close)


def test_angles_carry_no_gradient():
    given = call()
    for name in ("cos", "sin"):
        given[name].requires_grad_()
    assert not any(output.requires_grad for output in vlmfast.qk_norm_rope(**given))
    given["query"].requires_grad_()
    sum(output.sum() for output in vlmfast.qk_norm_rope(**given)).backward()
    assert given["query"].grad is not None
    assert given["cos"].grad is None


def test_heads_without_norms_are_not_kept():
    """Their gradients depend only on cos and sin, so nothing of the size of a head is saved for the backward."""
    given = {**call(), "query_weight": None, "key_weight": None}
    given["query"].requires_grad_()
    saved: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        vlmfast.qk_norm_rope(**given)
    assert {value.data_ptr() for value in saved} == {given["cos"].data_ptr(), given["sin"].data_ptr()}


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("op", each(FAMILY))
def test_threads_share_the_rows(op: Op):
    """The rows are enough for four threads, and their number is not divisible by four."""
    require(op, "native")
    (_, args), *_ = [w for w in OP.cases.workloads("cpu", torch.bfloat16) if w[0].startswith("600")]
    args = tuple(x[:, :599] if isinstance(x, Tensor) and x.dim() > 1 else x for x in args)
    if op is not OP:
        args = (torch.randn_like(args[0]), torch.randn_like(args[1]), *args)
    for got, want in zip(run(op, "native", args), outputs(op.reference(*args)), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
