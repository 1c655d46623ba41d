"""Every op on every backend against its definition. Nothing here names an op."""

from __future__ import annotations

import inspect
import itertools
import math
import platform

import pytest
import torch

import vlmfast
from tests.helpers.cases import (
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
    is_float,
    is_tensor,
    outputs,
    run,
    runnable,
    widened,
)
from tests.helpers.rounding import Tensors, assert_within
from vlmfast.linear import SLOW
from vlmfast.registry import OPS, Op

INTERPRETED = ("triton", "emulated")


def replaced(op: Op):
    """The Hugging Face code that the op replaces, as a function; the definition where there is none."""
    return op.reference if op.cases.upstream is None else lambda *args: op.cases.upstream(*args)()


@pytest.mark.parametrize(("op", "place", "dtype"), each_place(OPS.values(), DTYPES) + each_as_compiled(DTYPES))
def test_errors_and_roundings_are_those_of_hugging_face(op: Op, place: tuple[str, str], dtype: torch.dtype):
    """The error is no larger than the definition's, and numbers are rounded in the order of the code replaced.

    A sum taken in another order flips the last bit of few elements; a rounding left out flips many. Where the op
    replaces no module of its own, the order is the definition's.
    """
    device, backend = place
    upstream_sums = op.cases.upstream is not None and platform.machine() == "x86_64"
    same_sums = upstream_sums and device == "cpu" and backend in ("native", "torch")
    same_sums &= op.compose is None or backend == "torch" or dtype not in SLOW  # see vlmfast/linear.py
    same_sums &= op.cases.same_bits or backend == "torch"
    differ = total = 0
    candidates = calls(op, device, dtype)
    if place == ("cpu", "triton"):  # whose interpreter takes a second for a call: in each dtype another layout
        candidates = calls(op, device, dtype, [DTYPES.index(dtype)])
        if op.compose is not None:  # what it is composed of has been run
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
    elif dtype != torch.float32:  # in float32 every sum is its own rounding
        share = 500 if dtype == torch.bfloat16 else 300  # float16 is finer, so that a float32 sum shows more often
        assert differ <= total // share, f"{differ} of {total} elements differ"


def spoiled(args, backend: str):
    """A call with one number that is not finite, in each floating input, at its begin and further on."""
    values = (math.inf, -math.inf, math.nan)
    for index in (i for i, a in enumerate(args) if is_float(a) and a.numel()):
        # an interpreter takes a second for a call
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
    """It spoils the same outputs, and is refused alike. What is moved stays what it is."""
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
    """The gradients of the floating inputs for given gradients of the outputs (None: that output is not used)."""
    leaves = [a.detach().clone().requires_grad_() if is_float(a) else a for a in args]
    used = [(o, g) for o, g in zip(outputs(function(*leaves)), grads, strict=True) if g is not None]
    inputs = [leaf for leaf in leaves if is_float(leaf)]
    found = torch.autograd.grad([o for o, _ in used], inputs, [g for _, g in used], materialize_grads=True)
    return [grad.contiguous() for grad in found]


def with_gradient(op: Op, args) -> list[int]:
    """Which arguments the outputs are differentiable in: of some ops not all that are floating."""
    found = []
    for wanted in (i for i, a in enumerate(args) if is_float(a)):
        leaves = [a.detach().clone().requires_grad_(i == wanted) if is_float(a) else a for i, a in enumerate(args)]
        if any(o.requires_grad for o in outputs(op.reference(*leaves))):
            found.append(wanted)
    return found


def ones(op: Op, args):
    """A gradient of one for each output that can have one."""
    return [torch.ones_like(o) if is_float(o) else None for o in outputs(op.reference(*args))]


@pytest.mark.parametrize(("op", "place", "dtype"), each_place(DIFFERENTIABLE, DTYPES))
def test_gradients(op: Op, place: tuple[str, str], dtype: torch.dtype):
    """Of all outputs together and of each alone. An interpreter runs a few of these and of composed ops."""
    device, backend = place
    samples = runnable(op, backend, op.cases.samples(device, dtype))
    few = 3 if place == ("cpu", "triton") else len(samples)
    for number, args in enumerate(samples if op.compose is None else samples[:few]):
        shapes = outputs(op.reference(*args))
        everything = [torch.randn_like(o) if is_float(o) else None for o in shapes]
        used = [i for i, g in enumerate(everything) if g is not None]
        only_one = [[g if i == j else None for j, g in enumerate(everything)] for i in used]
        for grads in [everything, *(only_one if len(used) > 1 and number < few else [])]:
            got = gradients(lambda *a: run(op, backend, a), args, grads)
            reference = gradients(replaced(op), args, grads)
            exact = gradients(op.reference, widened(args), [g if g is None else g.double() for g in grads])
            assert_within(got, reference, exact, composed=op.compose is not None)


@pytest.mark.parametrize(("op", "place"), each_place(DIFFERENTIABLE))
def test_gradients_of_some_inputs(op: Op, place: tuple[str, str]):
    """Inputs that need no gradient get none, and change nothing for the others."""
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
    """The gradient's own gradient comes from the definition: never wrong, never silently missing."""
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
    """torch's own checks of a custom op; on inputs that need a gradient where there is one."""
    for args in list(op.cases.samples("cpu", torch.float32))[:3]:
        leaves = tuple(a.requires_grad_(op in DIFFERENTIABLE) if is_float(a) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.vlmfast, op.name).default, leaves)


def in_a_graph(op: Op):
    """What a compiled graph has of the op, as a function."""
    return op.definition if "cpu" in op.inlined else op.function


def assert_traced_alike(op: Op, got: Tensors, want: Tensors) -> None:
    """The same bits; tracers take torch's part of a composed op apart and sum in another order."""
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w) if op.compose is None else torch.allclose(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static"), pytest.param(True, id="dynamic", marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("op", each_traced(OPS.values()))
def test_compiles_into_one_graph(op: Op, dynamic: bool):
    """torch.compile breaks no graph, and gives the same results and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    most = 2 if dynamic else 3  # symbols of a grid take ten seconds each
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
    """What a CUDA graph can hold, as far as that shows without a GPU."""
    for args in runnable(op, "triton", list(op.cases.samples("cpu", torch.float32))[:2]):
        with vlmfast.use("triton"), Recorder() as recorder:
            op.run(*args, *op.parameters[1][len(args) :])
        assert not recorder.names & WAITING


@pytest.mark.parametrize("op", EACH_OP)
def test_checks_need_no_numbers_of_a_device(op: Op):
    """Meta tensors have none: whatever asked for one would fail."""
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
    """A list, a tensor of float64 and one on another device, in the place of each tensor."""
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
