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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from vlmfast import backends
from vlmfast.torch_internals import any_requires_grad, is_grad_enabled

if TYPE_CHECKING:
    from vlmfast.cases import Cases


@dataclass(frozen=True, eq=False)
class Op:
    """What an op is. Tests, benchmarks and docs are generated from it and its `cases`."""

    name: str
    package: str  # vlmfast.ops.<family>, where the definition and the cases are
    reference: Callable[..., Any]  # the definition
    check: Callable[..., bool | None]  # raises ValueError or TypeError on a bad call; see `functions.op`
    # (setup_context, backward), as for torch.library.register_autograd, except that backward may leave out the
    # gradients of the last inputs, and is called only if at least one output has a gradient.
    gradients: tuple[Callable[..., None], Callable[..., Any]] | None = None
    exact: bool = False  # no sums: all backends are bit-identical
    detached: bool = False  # the outputs are scores or positions and never carry a gradient
    # Device types on which a compiled graph contains the definition rather than the op, because Inductor fuses it with
    # its surroundings into code as fast as the kernel. On others the op is one node of the graph.
    inlined: tuple[str, ...] = ()
    # For an op made of other ops: the function that runs in place of the definition, with all arguments positional, and
    # the ops in it that backends provide. Tracers and autograd see these ops.
    compose: Callable[..., Any] | None = None
    parts: tuple[str, ...] = ()
    _cases: Cases | None = field(default=None, repr=False)  # overrides those found by name
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
        """Whether backends other than the definition support gradients."""
        return self.gradients is not None or self.compose is not None

    def backend(self, name: str) -> backends.Backend:
        """Load the backend of that name; an absent one refuses every call with the reason."""
        found = self._loaded.get(name)
        if found is None:
            composed = self.compose is not None and name != "torch"
            found = self._composed(name) if composed else backends.load(name, self.name, self.family, self.reference)
            if not (self.differentiable or self.detached or name == "torch"):
                refuse = functools.partial(_refuse_gradients, found.unsupported)
                found = replace(found, unsupported=refuse, takes_cpu=False)
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

    def definition(self, *args: Any, **kwargs: Any) -> Any:
        """Run the definition like a backend: with contiguous outputs, detached if the op is."""
        if self.detached:
            args, kwargs = detached(args, kwargs)
        return backends.contiguous(self.reference(*args, **kwargs))

    def run_definition(self, *args: Any, **kwargs: Any) -> Any:
        """Run the definition for derivatives that only it has: forward mode, torch.func, double backward."""
        if "torch" not in order.get():
            pinned = ", ".join(order.get())
            raise RuntimeError(
                f"{self.name}: only the definition has this derivative, and the backend {pinned} is pinned"
            )
        return self.definition(*args, **kwargs)

    def choose(self, args: tuple[Any, ...], on_cpu: bool | None = None) -> backends.Backend:
        """Return the first backend that accepts a call; ``on_cpu`` is what `check` returned of it."""
        loaded = self._loaded
        for name in order.get():
            backend = loaded.get(name) or self.backend(name)
            if (on_cpu and backend.takes_cpu) or backend.unsupported(*args) is None:
                return backend
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refusals(*args))
        raise RuntimeError(f"{self.name}: no backend can run this call ({reasons})")

    def run(self, *args: Any) -> Any:
        """Run a checked call without recording a gradient; a composed op needs every argument."""
        return self.choose(args).run(*args)


def _reason(reasons: Mapping[str, str | None]) -> str | None:
    """Say why a composed op cannot run: the reason that all parts share, or the first part's with its name."""
    found = [(part, reason) for part, reason in reasons.items() if reason]
    if not found:
        return None
    part, reason = found[0]
    shared = len(found) == len(reasons) and len({reason for _, reason in found}) == 1
    return reason if shared else f"{part}: {reason}"


def detached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Detach the tensors among the arguments of a call."""

    def detach(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    return tuple(map(detach, args)), {name: detach(value) for name, value in kwargs.items()}


def _refuse_gradients(unsupported: Callable[..., str | None], *args: Any) -> str | None:
    if is_grad_enabled() and any_requires_grad(*args):
        return "a gradient is needed, and only the definition of this op has one"
    return unsupported(*args)


OPS: dict[str, Op] = {}


# The backends that a call may run on, in order of preference; a pinned backend is the only one. An unknown name is
# refused by `backends.loader` when an op is called, not at import, so that commands can report it.
_pinned = os.environ.get("VLMFAST_BACKEND")
order: ContextVar[Iterable[str]] = ContextVar("vlmfast_backends", default=(_pinned,) if _pinned else backends.LOADERS)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op inside the block on one backend; a call that it cannot run raises its reason.

    The pin holds for this thread, and for the backward of what ran inside the block. Ops that are nodes of a compiled
    graph follow the pin at the time when the graph runs, forward or backward. Definitions that were traced into a graph
    cannot be pinned.

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
    """Replace a backend of an op, or make it absent for a reason, inside the block.

    Args:
        entry: the op, as ``vlmfast.rms_norm.op``.
        name: "native", "triton" or "torch".
        backend: the backend that runs, or a sentence that says why there is none.
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
