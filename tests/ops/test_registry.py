"""The choice of a backend: order, pinning, reasons, and what is saved for a gradient."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import vlmfast
from tests.helpers.cases import EACH_OP
from vlmfast import backends
from vlmfast.backends import Backend
from vlmfast.registry import OPS, Op


@pytest.fixture
def call():
    x, weight = torch.randn(3, 64), torch.randn(64)
    return x, weight


@pytest.fixture
def fake_backends(override):
    """Return a function that replaces the backends of rms_norm: {name: Backend or reason why there is none}."""
    return lambda **loaded: [override(OPS["rms_norm"], name, backend) for name, backend in loaded.items()]


def constant(value: float, reason: str | None = None) -> Backend:
    return Backend("stand-in", lambda x, *_, **__: torch.full_like(x, value), lambda *_, **__: reason)


def test_first_backend_that_accepts_the_call_runs(call, fake_backends):
    fake_backends(native=constant(1.0), triton=constant(2.0))
    assert vlmfast.rms_norm(*call).unique() == 1.0
    fake_backends(native=constant(1.0, "too narrow"))
    assert vlmfast.rms_norm(*call).unique() == 2.0
    fake_backends(triton="not here")
    assert torch.equal(vlmfast.rms_norm(*call), OPS["rms_norm"].reference(*call))


@pytest.mark.parametrize("op", EACH_OP)
def test_no_kernel_claims_a_device_that_it_does_not_run_on(op: Op):
    args = tuple(
        a.to("meta") if isinstance(a, torch.Tensor) else a for a in next(iter(op.cases.samples("cpu", torch.float32)))
    )
    reasons = dict(op.refusals(*args))
    assert reasons.pop("torch") is None
    assert all(reasons.values()), reasons


def test_an_exception_is_not_a_no(call, fake_backends):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    fake_backends(native=Backend("native", broken, lambda *_, **__: None))
    with pytest.raises(ZeroDivisionError):
        vlmfast.rms_norm(*call)


def test_a_pinned_backend_never_falls_back(call, fake_backends):
    fake_backends(native=constant(1.0, "too narrow"), triton="not here")
    for name, reason in (("native", "too narrow"), ("triton", "not here")):
        with vlmfast.use(name), pytest.raises(RuntimeError, match=rf"rms_norm: no backend can run .*{name}: {reason}"):
            vlmfast.rms_norm(*call)
    with vlmfast.use("torch"):
        assert torch.equal(vlmfast.rms_norm(*call), OPS["rms_norm"].reference(*call))


def test_use_ends_with_its_block_even_after_an_error(call, fake_backends):
    fake_backends(native=constant(1.0))
    with pytest.raises(KeyError), vlmfast.use("torch"):
        raise KeyError
    assert vlmfast.rms_norm(*call).unique() == 1.0


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"backend must be one of native, triton, torch.* got 'cuda'"),
        vlmfast.use("cuda"),
    ):
        pass


@pytest.mark.parametrize(("value", "expected"), [("torch", "torch: runs"), ("no", "VLMFAST_BACKEND must be one of")])
def test_backend_from_the_environment(value: str, expected: str):
    code = "import torch, vlmfast; print(vlmfast.explain(vlmfast.rms_norm, torch.ones(1, 8), torch.ones(8)))"
    environment = {**os.environ, "VLMFAST_BACKEND": value}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert expected in ran.stdout + ran.stderr
    assert (ran.returncode == 0) == (value == "torch")


def test_explain(call, fake_backends):
    fake_backends(native=constant(1.0, "too narrow"), triton="not here")
    assert vlmfast.explain(vlmfast.rms_norm, *call) == "native: no, too narrow\ntriton: no, not here\ntorch: runs"
    with vlmfast.use("native"):
        assert vlmfast.explain(vlmfast.rms_norm, *call) == "native: no, too narrow\nno backend can run this call"


def test_explain_refuses_what_is_no_op_and_bad_calls(call):
    with pytest.raises(TypeError, match="function must be one of vlmfast's ops"):
        vlmfast.explain(torch.add, *call)
    with pytest.raises(ValueError, match="weight must have shape"):
        vlmfast.explain(vlmfast.rms_norm, call[0], call[1][:5])


def test_an_op_without_a_backward_runs_its_definition_where_a_gradient_is_needed(call):
    entry = OPS["rms_norm_backward"]
    x, weight = call
    x.requires_grad_()
    refused = dict(entry.refusals(x, x, weight))
    assert all(
        "only the definition" in reason or "not" in reason for name, reason in refused.items() if name != "torch"
    )
    with torch.no_grad():
        assert "only the definition" not in str(list(entry.refusals(x, x, weight)))


def test_nothing_is_stored_where_no_gradient_is_needed(call):
    x, weight = call
    assert vlmfast.rms_norm(x, weight).grad_fn is None
    x.requires_grad_()
    with torch.no_grad():
        assert vlmfast.rms_norm(x, weight).grad_fn is None
    y = vlmfast.rms_norm(x, weight)
    assert {t.data_ptr() for t in y.grad_fn.saved_tensors} == {x.data_ptr(), weight.data_ptr()}


def test_the_backward_runs_on_the_backend_of_the_forward(call, fake_backends, override):
    ran = []
    reference = OPS["rms_norm_backward"].reference
    recorder = Backend("native", lambda *a, **k: (ran.append("native"), reference(*a, **k))[1], lambda *_, **__: None)
    override(OPS["rms_norm_backward"], "native", recorder)
    x = call[0].requires_grad_()
    with vlmfast.use("torch"):
        y = vlmfast.rms_norm(x, call[1])
    y.sum().backward()
    assert not ran
    vlmfast.rms_norm(x, call[1]).sum().backward()
    assert ran == ["native"]


def test_keyword_arguments(call):
    x, weight = call
    want = vlmfast.rms_norm(x, weight, 1e-3, "gemma")
    assert torch.equal(vlmfast.rms_norm(x=x, variant="gemma", weight=weight, eps=1e-3), want)
    leaf = x.clone().requires_grad_()
    assert torch.equal(vlmfast.rms_norm(variant="gemma", eps=1e-3, weight=weight, x=leaf), want)


def test_meta_tensors_and_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, weight = torch.empty(2, 5, 64, device="meta"), torch.empty(64, device="meta")
    assert vlmfast.rms_norm(x, weight).shape == x.shape
    with FakeTensorMode():
        y, residual = vlmfast.add_rms_norm(torch.empty(2, 64), torch.empty(2, 64), torch.empty(64))
    assert [y.shape, residual.shape] == [(2, 64)] * 2


@pytest.mark.parametrize("op", EACH_OP)
def test_every_op_has_a_definition_that_runs_everywhere(op):
    assert op.backend("torch").absent is None
    assert list(backends.LOADERS)[:3] == ["native", "triton", "torch"]


def test_function_transforms(call):
    """torch.func differentiates the definition; with a pinned backend it is an error."""

    def loss(function):
        return lambda x, weight: function(x, weight).pow(2).sum()

    got = torch.func.grad(loss(vlmfast.rms_norm), (0, 1))(*call)
    want = torch.func.grad(loss(OPS["rms_norm"].reference), (0, 1))(*call)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    with vlmfast.use("native"), pytest.raises(RuntimeError, match="only the definition has this derivative"):
        torch.func.grad(loss(vlmfast.rms_norm))(*call)


def test_a_missing_argument_is_one_of_the_op(call):
    with pytest.raises(TypeError, match=r"^add_rms_norm\(\) missing . required positional arguments?: 'residual'"):
        vlmfast.add_rms_norm(call[0])


def test_forward_mode(call):
    tangents = torch.randn(3, 64), torch.randn(64)
    _, got = torch.func.jvp(vlmfast.rms_norm, call, tangents)
    _, want = torch.func.jvp(OPS["rms_norm"].reference, call, tangents)
    assert want.any()
    assert torch.equal(got, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(call[0], tangents[0])
        assert torch.autograd.forward_ad.unpack_dual(vlmfast.rms_norm(dual, call[1])).tangent is not None


def test_second_gradient_under_a_dispatch_mode(call):
    from torch.utils.flop_counter import FlopCounterMode

    def second(function):
        x = call[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x, call[1]).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    with FlopCounterMode(display=False):
        got = second(vlmfast.rms_norm)
    torch.testing.assert_close(got, second(OPS["rms_norm"].reference), rtol=1e-4, atol=1e-4)


def test_an_output_without_a_gradient(call):
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = call[0].requires_grad_()
    (NoGradient.apply(vlmfast.rms_norm(x, call[1])).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_subclasses_of_tensor_run_the_definition(call):
    class Marked(torch.Tensor):
        pass

    x = call[0].as_subclass(Marked)
    for name in ("native", "triton"):
        backend = OPS["rms_norm"].backend(name)
        if not backend.absent:
            assert backend.unsupported(x, call[1]) == "Marked is a subclass of Tensor"
            assert name == "triton" or backend.unsupported(call[0], call[1].as_subclass(Marked)) is not None
    assert torch.equal(vlmfast.rms_norm(x, call[1]), OPS["rms_norm"].reference(*call))


def test_a_composed_op_gives_the_reason_that_its_parts_share(override):
    op = OPS["merge_tokens"]
    for part, reason in zip(op.parts, ("not built", "not built"), strict=True):
        override(OPS[part], "native", reason)
    assert op._composed("native").absent == "not built"
    override(OPS[op.parts[1]], "native", "too old")
    assert op._composed("native").absent == f"{op.parts[0]}: not built"
