"""The function that a user calls, made of an op's definition: what eager code, gradients and tracers run.

Eager code calls the backend that the registry chooses directly, without torch's dispatcher. torch.compile, and modes
that watch operators, see one op of the library ``vlmfast``, which calls the same backend when it runs but is a barrier
to fusion. If fusion would be faster (`Op.inlined`), and for exporters, the definition is traced instead.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from vlmfast.backends import contiguous
from vlmfast.checks import DTYPES
from vlmfast.registry import OPS, Op, detached, order
from vlmfast.torch_internals import (
    any_requires_grad,
    constant_result,
    dispatch_modes,
    exporting,
    forward_mode,
    in_function_transform,
    is_compiling,
    is_grad_enabled,
    is_jit_tracing,
)

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class OpFunction(Protocol[P, R]):
    """The function that a user calls: typed as its definition, with its `Op` beside it."""

    op: Op

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op on the first backend that accepts the call."""


def op(check: Callable[P, bool | None], **fields: Any) -> Callable[[Callable[P, R]], OpFunction[P, R]]:
    """Register the decorated function as an op; its body becomes the definition.

    Args:
        check: raises ValueError or TypeError on a bad call; it takes the op's arguments. It may return True if it has
            seen that all tensors are plain, of one dtype and on the CPU.
        **fields: `gradients`, `exact`, `detached`, `inlined`, `compose` and `parts` of `Op`, by name.

    Returns:
        A decorator, which gives the function that a user calls.
    """

    def register(reference: Callable[P, R]) -> OpFunction[P, R]:
        name, package = reference.__name__, reference.__module__.rpartition(".")[0]
        entry = OPS[name] = Op(name, package, reference, _renamed(check, name), **fields)
        return cast("OpFunction[P, R]", _function(entry) if entry.compose is None else _composed_function(entry))

    return register


def accepting(function: OpFunction[..., R], *tensors: Tensor) -> Callable[..., R]:
    """Return the op, or its definition where the op does not take the dtype of one of these tensors (float64)."""
    taken = all(not isinstance(x, Tensor) or x.dtype in DTYPES for x in tensors)
    return function if taken else cast("Callable[..., R]", function.op.reference)


def _renamed(function: Callable[..., bool | None], name: str) -> Callable[..., bool | None]:
    """Copy a function under another name, which Python shows in the error for a missing argument."""
    found = cast("types.FunctionType", function)
    copy = types.FunctionType(found.__code__, found.__globals__, name, found.__defaults__, found.__closure__)
    copy.__kwdefaults__, copy.__qualname__ = found.__kwdefaults__, name
    return copy


def _function(entry: Op) -> Callable[..., Any]:
    """Make the function that a user calls, for an op with kernels of its own."""
    overload, differentiable = _register_with_torch(entry), _autograd_function(entry)
    is_inlined, define = _inlining(entry, overload)
    check, choose, scores = entry.check, entry.choose, entry.detached
    _, defaults = entry.parameters

    def node(*args: Any, **kwargs: Any) -> Any:
        if is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in (*args, *kwargs.values())):
            if scores:
                args, kwargs = detached(args, kwargs)
            elif differentiable is None:
                return entry.run_definition(*args, **kwargs)
        return overload(*args, **kwargs)

    @functools.wraps(entry.reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Tracers and modes that watch operators need a dispatched op. All other calls skip the dispatcher, which costs
        # 1.5 us per call with define/impl and 8 us with custom_op.
        if is_compiling() or dispatch_modes() or is_jit_tracing():
            return define(*args, **kwargs) if is_inlined(args, kwargs) else node(*args, **kwargs)
        on_cpu = check(*args, **kwargs)
        if in_function_transform() or forward_mode._current_level >= 0:
            return entry.run_definition(*args, **kwargs)
        if kwargs:  # made positional here, because every call further down would pay for keywords
            args = entry.positional(args, kwargs)
        if is_grad_enabled() and any_requires_grad(*args):
            if scores:
                args, _ = detached(args, {})
            elif differentiable is not None:
                return differentiable.apply(*args, *defaults[len(args) :])
        return choose(args, on_cpu).run(*args)  # not `run`: its frame costs 0.1 us, and 0.6 us with cold caches

    call.op = entry  # type: ignore[attr-defined]
    return call


def _composed_function(entry: Op) -> Callable[..., Any]:
    """Make the function that a user calls, for an op made of other ops, which tracers and autograd see."""
    compose, defaults = cast("Callable[..., Any]", entry.compose), entry.parameters[1]
    is_inlined, define = _inlining(entry, entry.check)

    @functools.wraps(entry.reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracing = is_compiling() or dispatch_modes() or is_jit_tracing()
        if tracing and is_inlined(args, kwargs):
            return define(*args, **kwargs)
        entry.check(*args, **kwargs)
        if kwargs:
            args = entry.positional(args, kwargs)
        args = (*args, *defaults[len(args) :])
        if tracing:  # a tracer must see the parts, and cannot read a context variable
            return compose(*args)
        return entry.run(*args)

    call.op = entry  # type: ignore[attr-defined]
    return call


@constant_result
def _compiled_inline(name: str, device: str) -> bool:
    """Return whether a graph traces the definition: under torch.compile if inlined there, under torch.export always."""
    return torch.compiler.is_exporting() or device in OPS[name].inlined


@constant_result
def _checked_by(compiling: bool, dtypes: list[torch.dtype]) -> str | None:
    """Return how a call whose definition is traced is checked: in "Python", by the op's "fake", or not at all.

    Guards on what a check reads would cost a compiled graph 1 us per call. Under torch.compile, Python therefore runs
    the check only if it refuses a dtype, which the caller can catch; otherwise the op's fake runs it. torch.jit traces
    sizes as tensors, which checks cannot take.
    """
    refused = any(dtype.is_floating_point and dtype not in DTYPES for dtype in dtypes)
    if refused or in_function_transform() or forward_mode._current_level >= 0:  # the op has no rule for these
        return "Python"
    if compiling:  # which is not so in here
        return None if torch.compiler.is_exporting() else "fake"
    return None if is_jit_tracing() else "Python"


def _inlining(entry: Op, overload: Callable[..., Any]) -> tuple[Callable[..., bool], Callable[..., Any]]:
    """Make the predicate for whether a traced call inlines the definition, and the function that inlines it.

    torch.compile guards all that is read here at each call of the graph, so these are variables, not attributes.
    """
    name, check, first = entry.name, entry.check, entry.parameters[0][0]
    definition = entry.definition if entry.detached else entry.reference

    def is_inlined(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not is_compiling():
            return exporting()
        x = args[0] if args else kwargs.get(first)
        return isinstance(x, Tensor) and _compiled_inline(name, x.device.type)

    def define(*args: Any, **kwargs: Any) -> Any:
        how = _checked_by(is_compiling(), [x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])
        if how == "Python":
            check(*args, **kwargs)
        elif how == "fake":  # its result is unused: compilers drop it from the graph, "eager" runs it
            overload(*args, **kwargs)
        return contiguous(definition(*args, **kwargs))

    return is_inlined, define


def _register_with_torch(entry: Op) -> Callable[..., Any]:
    """Define ``torch.ops.vlmfast.<name>``, the op as tracers see it."""
    qualified = f"vlmfast::{entry.name}"

    def fake(*args: Any, **kwargs: Any) -> Any:
        entry.check(*args, **kwargs)
        return contiguous(entry.reference(*args, **kwargs))

    # The dispatcher drops arguments that equal their schema default before it calls `entry.run`, so the defaults of
    # every backend must equal those of the definition (tests/test_static.py checks that).
    torch.library.define(qualified, torch.library.infer_schema(entry.reference, mutates_args=()))
    torch.library.impl(qualified, "CompositeExplicitAutograd", entry.run)
    torch.library.register_fake(qualified, fake)
    if entry.gradients is not None:
        torch.library.register_autograd(qualified, _backward(entry), setup_context=entry.gradients[0])
    return cast("Callable[..., Any]", getattr(torch.ops.vlmfast, entry.name).default)


def _backward(entry: Op) -> Callable[..., Any]:
    """Complete an op's backward: return one gradient per input, and none at all if no output has a gradient."""
    formula, inputs = cast("Any", entry.gradients)[1], len(entry.parameters[0])

    def backward(ctx: Any, *grads: Any) -> Any:
        found = formula(ctx, *grads) if any(grad is not None for grad in grads) else ()
        return *found, *(None,) * (inputs - len(found))

    return backward


def _autograd_function(entry: Op) -> Any:
    """Make the eager twin of ``torch.library.register_autograd``, from the same two functions."""
    if entry.gradients is None:
        return None
    (setup_context, _), formula = entry.gradients, _backward(entry)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = entry.run(*inputs)
        setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.order = order.get()  # the engine's device threads do not inherit context variables
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        token = order.set(ctx.order)
        try:
            return formula(ctx, *grads)
        finally:
            order.reset(token)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{entry.name}_autograd", (torch.autograd.Function,), members)
