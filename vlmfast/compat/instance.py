"""Methods of one class replaced on one instance, where the project is no package whose versions could be told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vlmfast.patches import Patch
from vlmfast.patches.swap import PatchedModule, patched_class, set_class, trace_anew
from vlmfast.patches.upstream import parameters


def patch_instance(model: nn.Module, class_name: str, methods: Mapping[str, Callable[..., Any]], absent: str) -> Patch:
    """Replace methods on the one module in ``model`` whose class is, or derives from, one called ``class_name``.

    Args:
        model: the module, or a wrapper such as DistributedDataParallel around it.
        class_name: the name of the class whose methods the replacements were written for.
        methods: name -> a function with the parameters of the method that it replaces.
        absent: the end of a sentence, said of a class without one of the methods.

    Returns:
        A `Patch`: ``report()``, ``undo()``, and a context manager.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it does not hold one such module, or a method is absent,
            defined elsewhere or has other parameters. RuntimeError: if it is patched already, or a method was replaced
            on the instance. Nothing is changed then.
    """
    module = _instance(model, class_name)
    cls = type(module)
    if isinstance(module, PatchedModule):
        raise RuntimeError(f"this {class_name} is patched already: undo the patch, or vlmfast.unpatch(model)")
    for name, function in methods.items():
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        if owner is None:
            raise ValueError(f"{cls.__name__} has no {name}: {absent}")
        if owner.__name__ != class_name:
            raise ValueError(f"{name} must be that of {class_name}, got one that {owner.__name__} defines")
        expected, got = parameters(function), parameters(getattr(cls, name))
        if expected != got:
            raise ValueError(f"{class_name}.{name} must take ({', '.join(expected)}), got ({', '.join(got)})")
        if name in vars(module):
            raise RuntimeError(f"{name} was already replaced on this {class_name}")
    set_class(module, patched_class(cls, methods))
    trace_anew()
    return Patch(class_name, {f"{class_name}.{name}": 1 for name in methods}, {}, [module])


def _instance(model: object, class_name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [module for module in model.modules() if any(base.__name__ == class_name for base in type(module).__mro__)]
    if len(found) != 1:
        number = f"{len(found)} of them" if found else "none"
        raise ValueError(f"model must be or hold one {class_name}, got a {type(model).__name__} with {number}")
    return found[0]
