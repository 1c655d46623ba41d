"""The op registry and the one place where a backend is chosen.

An op is a plain-PyTorch function under ``@op``. Its body is the definition, the reference of the tests and
the fallback. A backend is a function of the same name and signature, found by name:

    native   csrc/<family>/{cpu.cpp,cuda.cu}         vlmfast_native::<op>, from the compiled extension
    triton   kernels/<family>                        <op>(...), imported on the first call
    torch    vlmfast/ops/<family>/definition.py      the body itself

The first backend whose ``unsupported(...)`` returns None runs the call. How an op is tested and timed is found by name
too, in vlmfast/ops/<family>/cases.py.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from vlmfast import backends
from vlmfast.torch_internals import (
    any_requires_grad,
    dispatch_modes,
    forward_mode_level,
    in_function_transform,
    is_compiling,
    is_grad_enabled,
)

if TYPE_CHECKING:
    from vlmfast.cases import Cases


@dataclass(frozen=True, eq=False)
class Op:
    """What an op is. Tests, benchmarks and docs are generated from it and its `cases`."""

    name: str
    package: str  # vlmfast.ops.<family>, where the definition and the cases are
    reference: Callable[..., Any]  # the definition
    check: Callable[..., None]  # raises ValueError or TypeError on a bad call
    # (setup_context, backward), as torch.library.register_autograd takes them; the last inputs' gradients may be left
    # out, and backward is called only with the gradient of an output
    gradients: tuple[Callable[..., None], Callable[..., Any]] | None = None
    exact: bool = False  # nothing is summed: every backend gives the same bits
    detached: bool = False  # the outputs are scores or positions: they carry no gradient, whatever the inputs do
    # An op made of other ops: what runs in place of the definition, given all arguments by position, and the ops in it
    # that backends provide. It is traced through and differentiated through.
    compose: Callable[..., Any] | None = None
    parts: tuple[str, ...] = ()
    _cases: Cases | None = field(default=None, repr=False)  # in place of those found by name
    _loaded: dict[str, backends.Backend] = field(default_factory=dict, repr=False)

    @property
    def family(self) -> str:
        """The folder in vlmfast/ops/, kernels/ and csrc/."""
        return self.package.rpartition(".")[2]

    @property
    def cases(self) -> Cases:
        """How the op is tested and timed; imported on first use."""
        return cast("Cases", self._cases or getattr(importlib.import_module(f"{self.package}.cases"), self.name))

    @property
    def function(self) -> Callable[..., Any]:
        """The function that a user calls."""
        return cast("Callable[..., Any]", getattr(sys.modules[self.reference.__module__], self.name))

    @functools.cached_property
    def parameters(self) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """The names and the defaults of the definition's parameters."""
        parameters = inspect.signature(self.reference).parameters
        return tuple(parameters), tuple(parameter.default for parameter in parameters.values())

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """List the arguments of a checked call up to the last one given; `Signature.bind` would cost 2 us."""
        names, defaults = self.parameters
        first = len(args)
        if names[first : first + len(kwargs)] == tuple(kwargs):  # none left out
            return (*args, *kwargs.values())
        last = max(map(names.index, kwargs))
        return (*args, *map(kwargs.get, names[first : last + 1], defaults[first : last + 1]))

    @property
    def differentiable(self) -> bool:
        """Whether a gradient can pass on a backend other than the definition."""
        return self.gradients is not None or self.compose is not None

    def backend(self, name: str) -> backends.Backend:
        """Load the backend of that name; one that is absent refuses every call with the reason."""
        found = self._loaded.get(name)
        if found is None:
            composed = self.compose is not None and name != "torch"
            found = self._composed(name) if composed else backends.load(name, self.name, self.family, self.reference)
            if not (self.differentiable or self.detached or name == "torch"):
                found = replace(found, unsupported=functools.partial(_refuse_gradients, found.unsupported))
            self._loaded[name] = found
        return found

    def _composed(self, name: str) -> backends.Backend:
        found = {part: OPS[part].backend(name) for part in self.parts}

        def unsupported(*args: Any) -> str | None:
            first = next(value for value in args if isinstance(value, Tensor))
            return _reason({part: backend.absent_on(first) for part, backend in found.items()})

        absent = _reason({part: backend.absent for part, backend in found.items()})
        return backends.Backend(name, cast("Callable[..., Any]", self.compose), unsupported, absent=absent)

    def refusals(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, str | None]]:
        """Yield (backend, why it cannot run this call, or None) in order of preference."""
        args = self.positional(args, kwargs)
        for name in order.get():
            yield name, self.backend(name).unsupported(*args)

    def run_definition(self, *args: Any, **kwargs: Any) -> Any:
        """Run the definition for a derivative that only it has: forward mode, torch.func, a gradient's gradient."""
        if "torch" not in order.get():
            pinned = ", ".join(order.get())
            raise RuntimeError(
                f"{self.name}: only the definition has this derivative, and the backend {pinned} is pinned"
            )
        if self.detached:
            args, kwargs = _detached(args, kwargs)
        return backends.contiguous(self.reference(*args, **kwargs))

    def choose(self, *args: Any) -> backends.Backend:
        """Return the first backend that accepts the call."""
        loaded = self._loaded
        for name in order.get():
            backend = loaded.get(name) or self.backend(name)
            if backend.unsupported(*args) is None:
                return backend
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refusals(*args))
        raise RuntimeError(f"{self.name}: no backend can run this call ({reasons})")

    def run(self, *args: Any) -> Any:
        """Run a checked call without recording a gradient; one of an op made of others gives every argument."""
        return self.choose(*args).run(*args)


def _reason(reasons: Mapping[str, str | None]) -> str | None:
    """Say why a composed op cannot run: the reason that all parts share, or the first part's with its name."""
    found = [(part, reason) for part, reason in reasons.items() if reason]
    if not found:
        return None
    part, reason = found[0]
    shared = len(found) == len(reasons) and len({reason for _, reason in found}) == 1
    return reason if shared else f"{part}: {reason}"


def _refuse_gradients(unsupported: Callable[..., str | None], *args: Any) -> str | None:
    if is_grad_enabled() and any_requires_grad(*args):
        return "a gradient is needed, and only the definition of this op has one"
    return unsupported(*args)


P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class OpFunction(Protocol[P, R]):
    """The function that a user calls: typed as its definition, with its `Op` beside it."""

    op: Op

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op on the first backend that accepts the call."""


OPS: dict[str, Op] = {}


def _from_environment() -> Iterable[str]:
    name = os.environ.get("VLMFAST_BACKEND") or None
    if name is not None and name not in backends.LOADERS:
        raise ValueError(f"VLMFAST_BACKEND must be one of {', '.join(backends.LOADERS)}, got {name!r}")
    return backends.LOADERS if name is None else (name,)


# The names of the backends that a call may run on, the preferred first; a pinned one stands alone.
order: ContextVar[Iterable[str]] = ContextVar("vlmfast_backends", default=_from_environment())  # noqa: B039  (tests add backends)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op inside the block on one backend; a call that it cannot run raises its reason.

    It holds for this thread, and for the backward of what ran inside. A compiled graph follows the pin of the moment in
    which it runs, forward or backward.

    Args:
        backend: "native", "triton" or "torch".

    Raises:
        ValueError: for a backend of another name.
    """
    if backend not in backends.LOADERS:
        raise ValueError(f"backend must be one of {', '.join(backends.LOADERS)}, got {backend!r}")
    token = order.set((backend,))
    try:
        yield
    finally:
        order.reset(token)


@contextmanager
def override(entry: Op, name: str, backend: backends.Backend | str) -> Iterator[None]:
    """Put a backend, or the reason why there is none, in the place of an op's own inside the block.

    Args:
        entry: the op, as ``vlmfast.rms_norm.op``.
        name: "native", "triton" or "torch".
        backend: what runs, or a sentence.
    """
    before = entry.backend(name)
    entry._loaded[name] = backends.absent(name, backend) if isinstance(backend, str) else backend
    try:
        yield
    finally:
        entry._loaded[name] = before


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which backend would run ``function(*args, **kwargs)``, and why the preferred ones would not.

    Args:
        function: an op of this package, such as ``vlmfast.rms_norm``.
        *args: the call's arguments; nothing is computed.
        **kwargs: the call's keyword arguments.

    Returns:
        One line per backend, in order of preference, up to the one that would run.

    Raises:
        TypeError: if ``function`` is not an op. ValueError or TypeError: if the call itself is a bad one.
    """
    entry = getattr(function, "op", None)
    if not isinstance(entry, Op):
        raise TypeError(f"function must be one of vlmfast's ops ({', '.join(OPS)}), got {function!r}")
    entry.check(*args, **kwargs)
    lines: list[str] = []
    for name, reason in entry.refusals(*args, **kwargs):
        if reason is None:
            return "\n".join([*lines, f"{name}: runs"])
        lines.append(f"{name}: no, {reason}")
    return "\n".join([*lines, "no backend can run this call"])


def op(check: Callable[P, None], **fields: Any) -> Callable[[Callable[P, R]], OpFunction[P, R]]:
    """Register the decorated function as an op; its body becomes the definition.

    Args:
        check: raises ValueError or TypeError on a bad call; it takes the op's arguments.
        **fields: `gradients`, `exact`, `detached`, `compose` and `parts` of `Op`, by name.

    Returns:
        A decorator, which gives the function that a user calls.
    """

    def register(reference: Callable[P, R]) -> OpFunction[P, R]:
        name, package = reference.__name__, reference.__module__.rpartition(".")[0]
        entry = OPS[name] = Op(name, package, reference, _renamed(check, name), **fields)
        return cast("OpFunction[P, R]", _function(entry) if entry.compose is None else _composed_function(entry))

    return register


def _renamed(function: Callable[..., None], name: str) -> Callable[..., None]:
    """Copy a function under another name, which is what Python calls it where an argument is missing."""
    found = cast("types.FunctionType", function)
    copy = types.FunctionType(found.__code__, found.__globals__, name, found.__defaults__, found.__closure__)
    copy.__kwdefaults__, copy.__qualname__ = found.__kwdefaults__, name
    return copy


def _function(entry: Op) -> Callable[..., Any]:
    """Make the function that a user calls, for an op with kernels of its own."""
    overload, differentiable = _register_with_torch(entry), _autograd_function(entry)
    check, choose, detached = entry.check, entry.choose, entry.detached
    _, defaults = entry.parameters

    def trace(*args: Any, **kwargs: Any) -> Any:
        if is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in (*args, *kwargs.values())):
            if detached:
                args, kwargs = _detached(args, kwargs)
            elif differentiable is None:
                return entry.run_definition(*args, **kwargs)
        return overload(*args, **kwargs)

    @functools.wraps(entry.reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A tracer (torch.compile, export, a dispatch mode) must see one op. Everybody else is spared the
        # dispatcher: define/impl costs 1.5 us a call, custom_op 8 us.
        if is_compiling() or dispatch_modes():
            return trace(*args, **kwargs)
        check(*args, **kwargs)
        if in_function_transform() or forward_mode_level() >= 0:
            return entry.run_definition(*args, **kwargs)
        if kwargs:  # which every call on the way down would pay for
            args = entry.positional(args, kwargs)
        if is_grad_enabled() and any_requires_grad(*args):
            if detached:
                args, _ = _detached(args, {})
            elif differentiable is not None:
                return differentiable.apply(*args, *defaults[len(args) :])
        return choose(*args).run(*args)  # not `run`: a frame costs 0.1 us, and 0.6 where a large op emptied the caches

    call.op = entry  # type: ignore[attr-defined]
    return call


def _composed_function(entry: Op) -> Callable[..., Any]:
    """Make the function that a user calls, for an op made of others: tracers and gradients see those."""
    compose, defaults = cast("Callable[..., Any]", entry.compose), entry.parameters[1]

    @functools.wraps(entry.reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        entry.check(*args, **kwargs)
        if kwargs:
            args = entry.positional(args, kwargs)
        args = (*args, *defaults[len(args) :])
        if is_compiling() or dispatch_modes():  # a tracer must see the parts, and cannot read a context variable
            return compose(*args)
        return entry.run(*args)

    call.op = entry  # type: ignore[attr-defined]
    return call


def _detached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def detach(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(detach, args)), {name: detach(value) for name, value in kwargs.items()}


def _register_with_torch(entry: Op) -> Callable[..., Any]:
    """Define ``torch.ops.vlmfast.<name>``, the op as tracers see it."""
    qualified = f"vlmfast::{entry.name}"

    def fake(*args: Any, **kwargs: Any) -> Any:
        entry.check(*args, **kwargs)
        return backends.contiguous(entry.reference(*args, **kwargs))

    # The dispatcher drops arguments equal to their schema default before it calls `entry.run`: the defaults of
    # every backend must therefore equal the definition's (tests/test_static.py).
    torch.library.define(qualified, torch.library.infer_schema(entry.reference, mutates_args=()))
    torch.library.impl(qualified, "CompositeExplicitAutograd", entry.run)
    torch.library.register_fake(qualified, fake)
    if entry.gradients is not None:
        torch.library.register_autograd(qualified, _backward(entry), setup_context=entry.gradients[0])
    return cast("Callable[..., Any]", getattr(torch.ops.vlmfast, entry.name).default)


def _backward(entry: Op) -> Callable[..., Any]:
    """Complete an op's formula: one gradient for each input, and none where no output has one."""
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
