"""Methods replaced on instances, where the project is no package whose versions could be told apart."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from types import CodeType, MappingProxyType
from typing import Any

from torch import nn

from vlmfast.patches import Patch
from vlmfast.patches.apply import ABSENT, Methods, _swap
from vlmfast.patches.swap import PatchedModule
from vlmfast.patches.upstream import parameters

Replacements = Mapping[str, Callable[..., Any]]  # "<Class>.<method>" -> what to put there
_TALKING = {"print", "warn", "warnings"}  # copies differ in what they tell their users


def patch_instance(
    model: nn.Module,
    project: str,
    replace: Replacements,
    absent: str,
    bodies: Mapping[str, set[str]] = MappingProxyType({}),
) -> Patch:
    """Replace methods on the one module of each class that ``replace`` names, as far as ``model`` has them.

    A class or a method that is not there is skipped, and so is a method whose body is another than that in ``bodies``:
    the class of a fork has the same name. With nothing left to replace, the model is refused.

    Args:
        model: the module, or a wrapper such as DistributedDataParallel around it.
        project: what the models are called.
        replace: "<Class>.<method>" -> a function with the parameters of the method that it replaces. The class of the
            module is the one of that name, or derives from it.
        absent: the end of a sentence, said of a class without one of the methods.
        bodies: "<Class>.<method>" -> the names of functions, methods and attributes that the body must use, all of
            them and no others. Constants are not compared.

    Returns:
        A `Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it holds none of the modules or several of one class, if
            a method is defined by another class or has other parameters, or if nothing is left to replace.
            RuntimeError: if a module is patched already, or a method was replaced on the instance. Nothing is changed
            then.
    """
    classes = dict.fromkeys(site.partition(".")[0] for site in replace)
    modules = _instances(model, list(classes))
    methods: Methods = {}
    skipped = {}
    for site, function in replace.items():
        class_name, _, name = site.partition(".")
        module = modules.get(class_name)
        if module is None:
            skipped[site] = ABSENT
        elif not hasattr(type(module), name):
            skipped[site] = f"{type(module).__name__} has no {name}: {absent}"
        else:
            _check_method(module, class_name, name, function)
            if reason := _other_body(getattr(type(module), name), bodies.get(site)):
                skipped[site] = reason
            else:
                methods.setdefault(type(module), {})[name] = site, function
    reasons = {site: reason for site, reason in skipped.items() if reason != ABSENT}
    if not methods:
        raise ValueError(f"nothing to replace in this {project} model ({'; '.join(reasons.values())})")
    for site, reason in reasons.items():
        warnings.warn(f"{site} is not patched: {reason}", stacklevel=3)
    return _swap(model, project, methods, skipped)


def _instances(model: object, class_names: list[str]) -> dict[str, nn.Module]:
    """Class name -> the module of that class, for those that are there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    instances = {}
    for name in class_names:
        found = [module for module in model.modules() if any(base.__name__ == name for base in type(module).__mro__)]
        if len(found) > 1:
            raise ValueError(
                f"model must be or hold one {name}, got a {type(model).__name__} with {len(found)} of them"
            )
        if found:
            instances[name] = found[0]
            if isinstance(found[0], PatchedModule):
                raise RuntimeError(f"this {name} is patched already: undo the patch, or vlmfast.unpatch(model)")
    if not instances:
        names = " or ".join(class_names)
        raise ValueError(f"model must be or hold one {names}, got a {type(model).__name__} with none")
    return instances


def _check_method(module: nn.Module, class_name: str, name: str, function: Callable[..., Any]) -> None:
    """Raise unless the method is that of the class, with the parameters of the function that is to replace it."""
    cls = type(module)
    owner = next(base for base in cls.__mro__ if name in vars(base))
    if owner.__name__ != class_name:
        raise ValueError(f"{name} must be that of {class_name}, got one that {owner.__name__} defines")
    expected, got = parameters(function), parameters(getattr(cls, name))
    if expected != got:
        raise ValueError(f"{class_name}.{name} must take ({', '.join(expected)}), got ({', '.join(got)})")
    if name in vars(module):
        raise RuntimeError(f"{name} was already replaced on this {class_name}")


def _other_body(method: Callable[..., Any], known: set[str] | None) -> str | None:
    """Why the body of the method is not the known one, or None."""
    if known is None:
        return None
    code = getattr(inspect.unwrap(method), "__code__", None)
    used = _names(code) - _TALKING if code else set()
    differences = [
        f"{word} {', '.join(sorted(names))}"
        for word, names in (("without", known - used), ("with", used - known))
        if names
    ]
    return f"its body is another than the one replaced here ({', '.join(differences)})" if differences else None


def _names(code: CodeType) -> set[str]:
    """What the code calls and reads by name; Python before 3.12 compiles a comprehension to code of its own."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
