"""Find the sites of a model: methods with known bodies, and unknown methods that look like them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from vlmfast.checks import DTYPES
from vlmfast.modules import replaced_on_instances
from vlmfast.patches.bodies import BEGINNINGS, BODIES, QUIET, Body
from vlmfast.patches.projects import Named
from vlmfast.patches.swap import PatchedModule
from vlmfast.patches.upstream import Source, method_of, parameters, site_name, source


@dataclass(frozen=True)
class Site:
    """One method of one class in a model."""

    name: str  # patterns of `only` and `exclude` match this name
    method: str
    modules: list[nn.Module]  # all modules of the class
    body: Body | None  # None if the body is unknown
    reason: str | None  # why the method is not replaced, or None


# (method, digest of its body or name of its class) -> known body
KNOWN = {(body.method, body.key.class_name if isinstance(body.key, Named) else body.key): body for body in BODIES}
METHODS = tuple(dict.fromkeys(method for method, _ in KNOWN))


def find_sites(model: nn.Module) -> list[Site]:
    """Find every site in those modules of a model that are not patched, without changing anything."""
    modules_of: dict[type, list[nn.Module]] = {}
    for module in model.modules():
        if not isinstance(module, PatchedModule):
            modules_of.setdefault(type(module), []).append(module)
    return [site for cls, modules in modules_of.items() for method in METHODS for site in _site(cls, method, modules)]


def _site(cls: type, method: str, modules: list[nn.Module]) -> Iterator[Site]:
    """Yield the site of a class's method, if it is one."""
    function = method_of(cls, method)
    if function is None:
        if hasattr(cls, method) and is_like(cls.__name__, method, Source("", frozenset())):
            origin = _origin(inspect.getattr_static(cls, method))
            yield Site(site_name(cls, method), method, modules, None, f"it is not the code of a model, but {origin}")
        return
    for base in cls.__mro__:
        if body := KNOWN.get((method, base.__name__)):
            reason = difference(cls, base.__name__, body) or _obstacle(cls, method, modules)
            yield Site(f"{base.__name__}.{method}", method, modules, body, reason)
            return
    if method == "forward":
        code = inspect.unwrap(function).__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not may_be_known(cls.__name__, names, bool(code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS))):
            return
    name = site_name(cls, method)
    try:
        found = source(cls, method)
    except (OSError, TypeError, SyntaxError) as error:
        if is_like(cls.__name__, method, Source("", frozenset())):
            yield Site(name, method, modules, None, f"its source cannot be read ({error})")
        return
    body = KNOWN.get((method, found.digest))
    if body is not None:
        left = f"left alone: {body.says}" if body.function is None else None
        yield Site(name, method, modules, body, left or _obstacle(cls, method, modules))
    elif is_like(cls.__name__, method, found) or (method == "forward" and _calls_a_norm(modules[0], found.names)):
        reason = f"its body is not one that this version of vlmfast was written for (digest {found.digest})"
        yield Site(name, method, modules, None, reason)


def is_like(class_name: str, method: str, found: Source) -> bool:
    """Tell whether an unknown method looks like a known one.

    A forward counts as an RMSNorm by its class name or by the names that it reads, any other method by its own name.
    """
    if method != "forward":
        return method not in QUIET and any(body.method == method and isinstance(body.key, str) for body in BODIES)
    names = found.names
    is_norm = "mean" in names and names & {"pow", "square"} and names & {"rsqrt", "sqrt"}
    return "RMSNorm" in class_name or bool(is_norm and names & {"eps", "variance_epsilon"} and "bias" not in names)


def _calls_a_norm(module: nn.Module, names: Iterable[str]) -> bool:
    """Tell whether a module without children calls an RMSNorm function, such as LigerRMSNormFunction."""
    return not any(module.children()) and any("rmsnorm" in name.replace("_", "").lower() for name in names)


def _origin(method: object) -> str:
    """Return the qualified name of a method, or of the type of an object that takes a method's place."""
    named = method if hasattr(method, "__qualname__") else type(method)
    return f"{named.__module__}.{named.__qualname__}"  # type: ignore[attr-defined]


def may_be_known(class_name: str, parameters: Sequence[str], starred: bool) -> bool:
    """Tell whether to read the source of a forward, by its class and its parameters, which include self.

    A known one is an RMSNorm's, takes at most two tensors, or is longer and begins with known parameters. `starred`:
    it also takes ``*args`` or ``**kwargs``.
    """
    is_short = len(parameters) <= 3 and not starred
    return "RMSNorm" in class_name or is_short or tuple(parameters[:3]) in BEGINNINGS


def difference(cls: type, class_name: str, body: Body) -> str | None:
    """Say how the method of a class differs from a body that is recognised by names (`Named`), or return None."""
    owner = next(base.__name__ for base in cls.__mro__ if body.method in vars(base))
    if owner != class_name:
        return f"it is that of {owner}"
    function = getattr(cls, body.method)
    expected, got = parameters(body.function), parameters(function)  # type: ignore[arg-type]
    if expected != got:
        return f"its parameters are ({', '.join(got)}), expected ({', '.join(expected)})"
    told = body.key.difference(function) if isinstance(body.key, Named) else None
    return f"its body is another than the one replaced here ({told})" if told else None


def _obstacle(cls: type, method: str, modules: list[nn.Module]) -> str | None:
    """Say why a method with a known body must not be replaced in these modules of one class, or return None."""
    dtypes = {parameter.dtype for module in modules for parameter in module.parameters(recurse=False)}
    if unsupported := ", ".join(sorted(str(dtype) for dtype in dtypes - set(DTYPES))):
        return f"its weights are {unsupported}, and the ops take float32, float16 and bfloat16"
    return replaced_on_instances(modules, cls, method)
