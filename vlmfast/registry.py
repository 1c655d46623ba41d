"""The op registry and the one place where a backend is chosen.

An op is a plain-PyTorch function under ``@op``. Its body is the definition, the reference of the tests and
the fallback. A backend is a function of the same name and signature, found by name:

    native   csrc/<stem>.{cpp,cu}     vlmfast_native::<op>, from the compiled extension
    triton   kernels/<stem>.py        <op>(...), imported on the first call
    torch    vlmfast/ops/<stem>.py    the body itself

The first backend whose ``unsupported(...)`` returns None runs the call.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmfast import backends


@dataclass(frozen=True)
class BadCall:
    """A call that must be refused: the arguments, the error's type and a piece of its message."""

    args: tuple[Any, ...]
    error: type[Exception]
    message: str


# Takes the op's arguments, builds what the call needs (a module, a graph), and returns the call itself.
Preparation = Callable[..., Callable[[], Any]]


@dataclass(frozen=True)
class Op:
    """All that is known of one op; tests, benchmarks and docs are generated from it."""

    name: str
    stem: str  # the file stem shared by vlmfast/ops/, kernels/, csrc/
    reference: Callable[..., Any]
    check: Callable[..., None]  # raises ValueError or TypeError on a bad call
    upstream: Preparation | None  # the Hugging Face code that the op replaces
    peers: Mapping[str, Preparation]  # other ways to compute the same, to time against
    limits: Mapping[str, Preparation]  # less work than any way to compute it takes, to time against
    samples: Callable[[str, torch.dtype], Iterable[tuple[Any, ...]]]  # (device, dtype) -> calls for the tests
    bad_calls: Callable[[], Iterable[BadCall]]
    workloads: Callable[[str, torch.dtype], Iterable[tuple[str, tuple[Any, ...]]]]  # real shapes to time
    bytes: Callable[..., int]  # the least memory traffic of a call
    flops: Callable[..., int] | None  # its floating-point operations; None of what is only moved or ordered
    setup_context: Callable[..., None] | None = None  # what backward keeps, as in torch.library.register_autograd
    backward: Callable[..., Any] | None = None
    exact: bool = False  # nothing is summed: every backend gives the same bits
    detached: bool = False  # the outputs are scores or positions: they carry no gradient, whatever the inputs do
    # An op made of other ops: what runs in place of the definition, and the ops in it that backends provide. It is
    # traced through and differentiated through.
    compose: Callable[..., Any] | None = None
    parts: tuple[str, ...] = ()
    _loaded: dict[str, backends.Backend | str] = field(default_factory=dict, repr=False)

    @property
    def function(self) -> Callable[..., Any]:
        """The function that a user calls."""
        function: Callable[..., Any] = getattr(sys.modules[self.reference.__module__], self.name)
        return function

    def backend(self, name: str) -> backends.Backend | str:
        """The backend of that name, or the reason why it is absent."""
        found = self._loaded.get(name)
        if found is None:
            composed = self.compose is not None and name != "torch"
            found = self._composed(name) if composed else backends.LOADERS[name](self.name, self.stem, self.reference)
            self._loaded[name] = found
        return found

    def _composed(self, name: str) -> backends.Backend | str:
        found = {part: OPS[part].backend(name) for part in self.parts}
        if reason := _reason(
            {part: backend for part, backend in found.items() if isinstance(backend, str)}, self.parts
        ):
            return reason

        def unsupported(*args: Any, **kwargs: Any) -> str | None:
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            absent = {part: cast("backends.Backend", backend).absent_on(first) for part, backend in found.items()}
            return _reason({part: reason for part, reason in absent.items() if reason}, self.parts)

        return backends.Backend(name, cast("Callable[..., Any]", self.compose), unsupported)

    def refusals(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, str | None]]:
        """(backend, why it cannot run this call, or None) in order of preference; a pinned backend stands alone."""
        for name in _order():
            yield name, self._refusal(self.backend(name), args, kwargs)

    def _refusal(self, backend: backends.Backend | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if isinstance(backend, str):
            return backend
        if (
            self.backward is None
            and not self.detached
            and self.compose is None
            and torch.is_grad_enabled()
            and backend.name != "torch"
            and _requires_grad(args, kwargs)
        ):
            return "a gradient is needed, and only the definition of this op has one"
        return backend.unsupported(*args, **kwargs)

    def run_definition(self, *args: Any, **kwargs: Any) -> Any:
        """Run the definition for a derivative that only it has: forward mode, torch.func, a gradient's gradient."""
        if (name := pinned.get()) not in (None, "torch"):
            raise RuntimeError(
                f"{self.name}: only the definition has this derivative, and the backend {name} is pinned"
            )
        return backends.contiguous(self.reference(*args, **kwargs))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run a checked call on the first backend that can, without recording a gradient."""
        reasons = []
        for name, reason in self.refusals(*args, **kwargs):
            if reason is None:
                return cast("backends.Backend", self.backend(name)).run(*args, **kwargs)
            reasons.append(f"{name}: {reason}")
        raise RuntimeError(f"{self.name}: no backend can run this call ({'; '.join(reasons)})")


def _reason(reasons: Mapping[str, str], parts: tuple[str, ...]) -> str | None:
    """Why a composed op cannot run: the reason that all parts share, or the first part's with its name."""
    if not reasons:
        return None
    part, reason = next(iter(reasons.items()))
    return reason if len(reasons) == len(parts) and len({*reasons.values()}) == 1 else f"{part}: {reason}"


P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class OpFunction(Protocol[P, R]):
    """The function that a user calls: typed as its definition, with its `Op` beside it."""

    op: Op

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the op on the first backend that accepts the call."""


OPS: dict[str, Op] = {}


def _environment_backend() -> str | None:
    name = os.environ.get("VLMFAST_BACKEND") or None
    if name is not None and name not in backends.LOADERS:
        raise ValueError(f"VLMFAST_BACKEND must be one of {', '.join(backends.LOADERS)}, got {name!r}")
    return name


_from_environment = _environment_backend()
pinned: ContextVar[str | None] = ContextVar("vlmfast_backend", default=_from_environment)


def _order() -> Iterable[str]:
    name = pinned.get()
    return backends.LOADERS if name is None else (name,)


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
    token = pinned.set(backend)
    try:
        yield
    finally:
        pinned.reset(token)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which backend would run ``function(*args, **kwargs)``, and why the preferred ones would not.

    Args:
        function: an op of this package, such as ``vlmfast.rms_norm``.
        *args: the call's arguments; nothing is computed.
        **kwargs: likewise.

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


def op(
    *,
    check: Callable[..., None],
    samples: Callable[[str, torch.dtype], Iterable[tuple[Any, ...]]],
    bad_calls: Callable[[], Iterable[BadCall]],
    workloads: Callable[[str, torch.dtype], Iterable[tuple[str, tuple[Any, ...]]]],
    bytes: Callable[..., int],
    upstream: Preparation | None = None,
    peers: Mapping[str, Preparation] = MappingProxyType({}),
    limits: Mapping[str, Preparation] = MappingProxyType({}),
    flops: Callable[..., int] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    exact: bool = False,
    detached: bool = False,
    compose: Callable[..., Any] | None = None,
    parts: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], OpFunction[P, R]]:
    """Register the decorated function as an op; its body becomes the definition. See `Op` for the arguments."""

    def register(reference: Callable[P, R]) -> OpFunction[P, R]:
        name, stem = reference.__name__, reference.__module__.rpartition(".")[2]
        entry = Op(
            name,
            stem,
            reference,
            check,
            upstream,
            peers,
            limits,
            samples,
            bad_calls,
            workloads,
            bytes,
            flops,
            setup_context,
            backward,
            exact,
            detached,
            compose,
            parts,
        )
        OPS[name] = entry
        check.__qualname__ = name  # what Python calls it where an argument is missing
        return cast("OpFunction[P, R]", _function(entry) if compose is None else _composed_function(entry))

    return register


def _function(entry: Op) -> Callable[..., Any]:
    """The function that a user calls, of an op with kernels of its own."""
    overload, differentiable = _register_with_torch(entry), _autograd_function(entry)
    check, detached = entry.check, entry.detached
    parameters = {name: parameter.default for name, parameter in inspect.signature(entry.reference).parameters.items()}
    names, defaults = tuple(parameters), tuple(parameters.values())
    is_compiling, dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
    is_grad_enabled, function_transforms = torch.is_grad_enabled, torch._C._are_functorch_transforms_active
    loaders, loaded, pin_of = backends.LOADERS, entry._loaded, pinned.get

    @functools.wraps(entry.reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorded = is_grad_enabled() and _requires_grad(args, kwargs)
        if recorded and detached:
            args, kwargs = tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}
            recorded = False
        # A tracer (torch.compile, export, a dispatch mode) must see one op. Everybody else is spared the
        # dispatcher: define/impl costs 1.5 us a call, custom_op 8 us.
        if is_compiling() or dispatch_modes():
            if recorded and differentiable is None:
                return entry.run_definition(*args, **kwargs)
            return overload(*args, **kwargs)
        check(*args, **kwargs)
        if function_transforms() or forward_ad._current_level >= 0:
            return entry.run_definition(*args, **kwargs)
        if kwargs:  # which every call on the way down would pay for
            args = _by_position(names, defaults, args, kwargs)
        if recorded and differentiable is not None:
            return differentiable.apply(*args, *defaults[len(args) :])
        if recorded:
            return entry.run(*args)
        # `run`, without its frames: each costs 0.1 us, and 0.6 where a large op has emptied the caches.
        for name in loaders if (pin := pin_of()) is None else (pin,):
            backend = loaded.get(name) or entry.backend(name)
            if isinstance(backend, backends.Backend) and backend.unsupported(*args) is None:
                return backend.run(*args)
        return entry.run(*args)  # which says why none can

    call.op = entry  # type: ignore[attr-defined]
    return call


def _by_position(
    names: tuple[str, ...], defaults: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a checked call, up to the last that was given; by hand, because `Signature.bind` costs 2 us."""
    first = len(args)
    if names[first : first + len(kwargs)] == tuple(kwargs):  # none left out
        return (*args, *kwargs.values())
    last = max(map(names.index, kwargs))
    return (*args, *map(kwargs.get, names[first : last + 1], defaults[first : last + 1]))


def _composed_function(entry: Op) -> Callable[..., Any]:
    """The function that a user calls, of an op made of others: those are what tracers see and what has gradients."""
    compose = cast("Callable[..., Any]", entry.compose)
    is_compiling, dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack

    @functools.wraps(entry.reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        entry.check(*args, **kwargs)
        if is_compiling() or dispatch_modes():  # a tracer must see the parts, and cannot read a context variable
            return compose(*args, **kwargs)
        return entry.run(*args, **kwargs)

    call.op = entry  # type: ignore[attr-defined]
    return call


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _requires_grad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for value in (*args, *kwargs.values()) if kwargs else args:  # a loop: any() over a generator costs twice as much
        if isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


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
    if entry.backward is not None:
        torch.library.register_autograd(qualified, entry.backward, setup_context=entry.setup_context)
    overload: Callable[..., Any] = getattr(torch.ops.vlmfast, entry.name).default
    return overload


def _autograd_function(entry: Op) -> Any:
    """The eager twin of ``torch.library.register_autograd``, from the same two functions."""
    if entry.backward is None or entry.setup_context is None:
        return None
    setup_context, formula = entry.setup_context, entry.backward

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = entry.run(*inputs)
        setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)
        ctx.backend = pinned.get()  # the engine's device threads do not inherit context variables
        return output

    def backward(ctx: Any, *grads: Any) -> Any:
        token = pinned.set(ctx.backend)
        try:
            return formula(ctx, *grads)
        finally:
            pinned.reset(token)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{entry.name}_autograd", (torch.autograd.Function,), members)
