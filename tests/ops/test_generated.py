"""Every op on every backend against its definition; no test here names an op."""

from __future__ import annotations

import inspect
import itertools
import math
import platform

import pytest
import torch

import vlmfast
from tests.helpers.cases import (
    COMPILED,
    DIFFERENTIABLE,
    DTYPES,
    EACH_OP,
    PRIMITIVE,
    REPLACING,
    WAITING,
    Recorder,
    calls,
    each,
    each_as_compiled,
    each_place,
    each_traced,
    few_calls,
    is_float,
    is_tensor,
    outputs,
    require,
    run,
    runnable,
    widened,
    with_cases,
)
from tests.helpers.rounding import Tensors, assert_within
from tests.helpers.thorough import INTERPRETED
from vlmfast.linear import SLOW
from vlmfast.registry import OPS, Op


def replaced(op: Op):
    """Return the Hugging Face code that the op replaces, as a function, or the definition where there is none."""
    return op.reference if op.cases.upstream is None else lambda *args: op.cases.upstream(*args)()


@pytest.mark.parametrize(("op", "place", "dtype"), each_place(OPS.values(), DTYPES) + each_as_compiled(DTYPES))
def test_errors_and_roundings_are_those_of_hugging_face(op: Op, place: tuple[str, str], dtype: torch.dtype):
    """The error is at most the definition's, and results are rounded at the same places as in the replaced code.

    Another order of a sum changes the last bit of few elements, a missing rounding that of many. Where the op replaces
    no Hugging Face code, the definition takes its place.
    """
    device, backend = place
    upstream_sums = op.cases.upstream is not None and platform.machine() == "x86_64"
    same_sums = upstream_sums and device == "cpu" and backend in ("native", "torch")
    same_sums &= op.compose is None or backend == "torch" or dtype not in SLOW  # see vlmfast/linear.py
    same_sums &= op.cases.same_bits or backend == "torch"
    differ = total = 0
    few = place == ("cpu", "triton") or place in COMPILED
    candidates = few_calls(op, place, dtype) if few else calls(op, device, dtype)
    if few and op.compose is not None:  # the tests of its parts run their kernels
        candidates = itertools.islice(op.cases.samples(device, dtype), 6)
    for args in runnable(op, backend, candidates):
        before = [a.clone() for a in args if is_tensor(a)]
        got = run(op, backend, args)
        for kept, value in zip(before, filter(is_tensor, args), strict=True):
            assert torch.equal(kept, value), "an input was written to"
        defined = outputs(op.reference(*args))
        assert_within(got, defined, outputs(op.reference(*widened(args))), composed=op.compose is not None)
        upstream = defined if op.cases.upstream is None else outputs(op.cases.upstream(*args)())
        for g, u in zip(got, upstream, strict=True):
            assert g.dtype == u.dtype
            if g.dtype != torch.float32 or op.exact or same_sums:
                differ += int((g != u).sum())
                total += g.numel()
    if op.exact or same_sums:
        assert differ == 0, f"{differ} of {total} elements differ"
    elif dtype != torch.float32:  # in float32 another order of a sum changes many last bits
        share = 500 if dtype == torch.bfloat16 else 300  # float16 is finer, so another order shows more often
        # Compiled places have half of the samples, in which such a count varies more: by its root.
        spread = 2 * math.isqrt(total // share) if place in COMPILED else 0
        assert differ <= total // share + spread, f"{differ} of {total} elements differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [*COMPILED, ("cpu", "triton")], ids=str)
def test_each_place_of_few_calls_meets_every_layout(place: tuple[str, str], dtype: torch.dtype):
    """Over all ops, with as many calls as each has."""
    met, every = set(), set()
    for op in PRIMITIVE:
        rows = [(torch.zeros(2, 6, 8), torch.zeros(2, 6, 8)) for _ in op.cases.samples("cpu", dtype)]
        alike = with_cases(op, samples=lambda *_, rows=rows: rows)
        for found, several in ((few_calls(alike, place, dtype), met), (calls(alike, "cpu", dtype), every)):
            several |= {tuple((a.stride(), a.storage_offset()) for a in args) for args in found}
    assert met == every


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", each(PRIMITIVE))
def test_the_native_kernels_take_real_shapes(op: Op, dtype: torch.dtype):
    """Without a GPU there is only PyTorch behind them, and other tests accept that a backend refuses some calls."""
    require(op, "native")
    reasons = {label: op.backend("native").unsupported(*args) for label, args in op.cases.workloads("cpu", dtype)}
    assert not {label: reason for label, reason in reasons.items() if reason}


def spoiled(args, backend: str):
    """Yield calls with one non-finite number in one of the floating inputs, at its beginning or further on."""
    values = (math.inf, -math.inf, math.nan)
    for index in (i for i, a in enumerate(args) if is_float(a) and a.numel()):
        # An interpreter takes a second per call.
        for value, share in itertools.product(values, (0.6,) if backend in INTERPRETED else (0.0, 0.6)):
            changed = args[index].clone().contiguous()
            changed.view(-1)[int(share * (changed.numel() - 1))] = value
            yield (*args[:index], changed, *args[index + 1 :])


def result_or_error(function):
    try:
        return function()
    except (ValueError, RuntimeError) as error:
        return error


@pytest.mark.parametrize(("op", "place"), [p for p in each_place(OPS.values()) if p.values[1][1] != "torch"])
def test_what_is_not_finite_goes_where_it_does_in_the_definition(op: Op, place: tuple[str, str]):
    """A non-finite number affects the same outputs as in the definition, or is refused alike; copies keep it."""
    device, backend = place
    most = 2 if backend in INTERPRETED else 8
    for args in (
        *runnable(op, backend, op.cases.samples(device, torch.bfloat16))[:most],
        *(() if backend == "triton" else runnable(op, backend, op.cases.samples(device, torch.float32))[:most]),
    ):
        for call in spoiled(args, backend):
            got = result_or_error(lambda: run(op, backend, call))  # noqa: B023
            want = result_or_error(lambda: outputs(op.reference(*call)))  # noqa: B023
            if isinstance(want, Exception):
                assert isinstance(got, Exception)
                continue
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g.isfinite(), w.isfinite(), rtol=0, atol=0)
                if op.exact:
                    torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", each(REPLACING))
def test_definition_equals_hugging_face(op: Op, dtype: torch.dtype):
    for args in calls(op, "cpu", dtype):
        for r, u in zip(outputs(op.reference(*args)), outputs(op.cases.upstream(*args)()), strict=True):
            assert r.dtype == u.dtype
            assert torch.equal(r, u)


def gradients(function, args, grads):
    """Return the gradients of the floating inputs, given those of the outputs (None: that output is not used)."""
    leaves = [a.detach().clone().requires_grad_() if is_float(a) else a for a in args]
    used = [(o, g) for o, g in zip(outputs(function(*leaves)), grads, strict=True) if g is not None]
    inputs = [leaf for leaf in leaves if is_float(leaf)]
    found = torch.autograd.grad([o for o, _ in used], inputs, [g for _, g in used], materialize_grads=True)
    return [grad.contiguous() for grad in found]


def with_gradient(op: Op, args) -> list[int]:
    """Return the indexes of the differentiable arguments; some ops have floating arguments that are not."""
    found = []
    for wanted in (i for i, a in enumerate(args) if is_float(a)):
        leaves = [a.detach().clone().requires_grad_(i == wanted) if is_float(a) else a for i, a in enumerate(args)]
        if any(o.requires_grad for o in outputs(op.reference(*leaves))):
            found.append(wanted)
    return found


def ones(op: Op, args):
    """Make a gradient of ones for each output that is differentiable."""
    return [torch.ones_like(o) if is_float(o) else None for o in outputs(op.reference(*args))]


@pytest.mark.parametrize(("op", "place", "dtype"), each_place(DIFFERENTIABLE, DTYPES))
def test_gradients(op: Op, place: tuple[str, str], dtype: torch.dtype):
    """For all outputs together and for each alone; three calls in Triton's interpreter, as backwards have samples."""
    device, backend = place
    samples = runnable(op, backend, op.cases.samples(device, dtype))
    for args in samples[:3] if place == ("cpu", "triton") else samples:
        shapes = outputs(op.reference(*args))
        everything = [torch.randn_like(o) if is_float(o) else None for o in shapes]
        used = [i for i, g in enumerate(everything) if g is not None]
        only_one = [[g if i == j else None for j, g in enumerate(everything)] for i in used]
        for grads in [everything, *(only_one if len(used) > 1 else [])]:
            got = gradients(lambda *a: run(op, backend, a), args, grads)
            reference = gradients(replaced(op), args, grads)
            exact = gradients(op.reference, widened(args), [g if g is None else g.double() for g in grads])
            assert_within(got, reference, exact, composed=op.compose is not None)


@pytest.mark.parametrize(("op", "place"), each_place(DIFFERENTIABLE))
def test_gradients_of_some_inputs(op: Op, place: tuple[str, str]):
    """Inputs that need no gradient get none, and the gradients of the others do not change."""
    device, backend = place
    args = runnable(op, backend, op.cases.samples(device, torch.float32))[0]
    floats = [i for i, a in enumerate(args) if is_float(a)]
    everything = gradients(lambda *a: run(op, backend, a), args, ones(op, args))
    for wanted in floats:
        leaves = [a.clone().requires_grad_(i == wanted) if is_float(a) else a for i, a in enumerate(args)]
        results = [o for o in run(op, backend, tuple(leaves)) if is_float(o)]
        if wanted not in with_gradient(op, args):
            assert not any(o.requires_grad for o in results)
            continue
        sum(o.sum() for o in results).backward()
        for i in floats:
            assert (leaves[i].grad is not None) == (i == wanted)
        torch.testing.assert_close(leaves[wanted].grad, everything[floats.index(wanted)], rtol=0, atol=0)


@pytest.mark.parametrize(("op", "place"), each_place([op for op in OPS.values() if op.detached]))
def test_scores_and_positions_carry_no_gradient(op: Op, place: tuple[str, str]):
    device, backend = place
    for args in runnable(op, backend, op.cases.samples(device, torch.float32))[:3]:
        leaves = tuple(a.requires_grad_() if is_float(a) else a for a in args)
        assert not any(o.requires_grad for o in run(op, backend, leaves))


@pytest.mark.parametrize("op", each(DIFFERENTIABLE))
def test_second_gradient(op: Op):
    """Second gradients come from the definition, so they are neither wrong nor silently missing."""
    args = [a.double() if is_float(a) else a for a in next(iter(op.cases.samples("cpu", torch.float32)))]
    wanted = with_gradient(op, args)

    def first(function, dtype):
        leaves = [a.to(dtype).requires_grad_() if is_float(a) else a for a in args]
        inputs = [leaves[index] for index in wanted]
        loss = sum(o.pow(2).sum() for o in outputs(function(*leaves)) if is_float(o))
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), inputs)

    for g, e in zip(first(op.function, torch.float32), first(op.reference, torch.float64), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


@pytest.mark.thorough
@pytest.mark.parametrize("op", each(PRIMITIVE))
def test_opcheck(op: Op):
    """torch.library.opcheck passes, on inputs that need a gradient where the op has one."""
    for args in list(op.cases.samples("cpu", torch.float32))[:3]:
        leaves = tuple(a.requires_grad_(op in DIFFERENTIABLE) if is_float(a) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.vlmfast, op.name).default, leaves)


def in_a_graph(op: Op):
    """Return, as a function, what a compiled graph contains in place of the op."""
    return op.definition if "cpu" in op.inlined else op.function


def assert_traced_alike(op: Op, got: Tensors, want: Tensors) -> None:
    """Check bit-equality; for composed ops allow another order of sums, since tracers decompose torch's part."""
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w) if op.compose is None else torch.allclose(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static"), pytest.param(True, id="dynamic", marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("op", each_traced(OPS.values()))
def test_compiles_into_one_graph(op: Op, dynamic: bool):
    """torch.compile makes one graph, with the same results and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    most = 2 if dynamic else 3  # symbolic sizes of a grid take ten seconds per call
    if op.compose is not None:
        most = 1  # its parts are ops
    for number, args in enumerate(list(op.cases.samples("cpu", torch.float32))[:most]):
        assert_traced_alike(op, outputs(compiled(*args)), outputs(in_a_graph(op)(*args)))
        if op in DIFFERENTIABLE and (number == 0 or not dynamic):
            grads = ones(op, args)
            assert_traced_alike(op, gradients(compiled, args, grads), gradients(in_a_graph(op), args, grads))


@pytest.mark.parametrize("op", each_traced(DIFFERENTIABLE))
def test_compiled_gradients_of_some_inputs_from_some_outputs(op: Op):
    args = next(iter(op.cases.samples("cpu", torch.float32)))
    floats = with_gradient(op, args)
    results = [index for index, o in enumerate(outputs(op.reference(*args))) if is_float(o)]
    for needed, used in itertools.product([[index] for index in floats] + [floats], [results[:1], results]):

        def grads(function, needed=needed, used=used):
            torch._dynamo.reset()
            leaves = [a.clone().requires_grad_(i in needed) if is_float(a) else a for i, a in enumerate(args)]
            results = outputs(function(*leaves))
            sum(results[index].pow(2).sum() for index in used).backward()
            return [leaves[index].grad for index in needed]

        compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
        assert_traced_alike(op, grads(compiled), grads(in_a_graph(op)))


@pytest.mark.parametrize("op", EACH_OP)
def test_triton_launchers_wait_for_nothing(op: Op):
    """A launcher runs no operator for which the host waits, as a CUDA graph requires; checked without a GPU."""
    for args in runnable(op, "triton", list(op.cases.samples("cpu", torch.float32))[:2]):
        with vlmfast.use("triton"), Recorder() as recorder:
            op.run(*args, *op.parameters[1][len(args) :])
        assert not recorder.names & WAITING


@pytest.mark.parametrize("op", EACH_OP)
def test_checks_need_no_numbers_of_a_device(op: Op):
    """The checks run on meta tensors, on which reading a value is an error."""
    for args in op.cases.samples("cpu", torch.float32):
        got = outputs(op.function(*(a.to("meta") if is_tensor(a) else a for a in args)))
        for g, want in zip(got, outputs(op.reference(*args)), strict=True):
            assert (g.device.type, g.shape, g.dtype) == ("meta", want.shape, want.dtype)


@pytest.mark.parametrize("op", EACH_OP)
def test_bad_calls_are_refused(op: Op):
    op.check(**op.cases.good_call)
    assert op.cases.bad_calls
    for name, value, error, message in op.cases.bad_calls:
        with pytest.raises(error, match=message):
            op.function(**{**op.cases.good_call, name: value})


@pytest.mark.parametrize("op", EACH_OP)
def test_tensors_of_another_kind_are_refused_by_name(op: Op):
    """A list, a float64 tensor and a tensor on another device are refused in the place of each tensor."""
    args = max(op.cases.samples("cpu", torch.float32), key=lambda args: sum(map(is_tensor, args)))
    places = [index for index, value in enumerate(args) if is_tensor(value)]
    for place, name in zip(
        places, (list(inspect.signature(op.reference).parameters)[place] for place in places), strict=True
    ):
        refusals = [([1.0], TypeError, f"^{name} must be a torch.Tensor, got list")]
        if is_float(args[place]):
            message = f"^{name} must be float32, float16 or bfloat16, got torch.float64"
            refusals.append((args[place].double(), TypeError, message))
        if len(places) > 1:
            refusals.append((args[place].to("meta"), ValueError, "must be on the device of "))
        for value, error, message in refusals:
            with pytest.raises(error, match=message):
                op.function(*args[:place], value, *args[place + 1 :])
