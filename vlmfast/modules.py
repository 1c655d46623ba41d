"""Finds the Hugging Face model in a module, and detects changes by other code: hooks, methods set on instances."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any, TypeGuard, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.torch_internals import HOOKS

M = TypeVar("M", bound=nn.Module)
_Linear = nn.Linear
_LINEAR = nn.Linear.forward  # the original, because other code may replace it for all instances
_CALL = nn.Module.__call__  # likewise
# Attribute of a method that a patch made: this method, since wrappers copy attributes, and the replacement behind it.
DIRECT = "direct"


def hugging_face_model(model: object) -> nn.Module:
    """Find the one outermost module in ``model`` that has a ``config.model_type``.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it holds none, or several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

    def outermost(module: nn.Module) -> list[nn.Module]:
        # torch.compile and FSDP show the attributes of the model that they wrap as their own
        config = vars(module).get("config", getattr(type(module), "config", None))
        if isinstance(getattr(config, "model_type", None), str):
            return [module]
        return [found for child in module.children() for found in outermost(child)]

    found = outermost(model)
    if not found:
        raise ValueError(f"model must be or hold a module with config.model_type, got {type(model).__name__}")
    if len(found) > 1:
        names = ", ".join(type(module).__name__ for module in found)
        raise ValueError(f"model must hold one Hugging Face model, got {names}: patch each of them")
    return found[0]


def replaced_on_instances(modules: Iterable[nn.Module], cls: type, method: str) -> str | None:
    """Count the modules of ``cls`` on which other code replaced the method, which would hide a patch of the class."""
    modules, taken = list(modules), 0
    for module in modules:
        # accelerate's hooks keep the method that they call here; `kernelize` assigns it to the instance.
        kept = vars(module).get(f"_old_{method}" if "_hf_hook" in vars(module) else method)
        own = getattr(cls, method)
        if kept is not None and made_around(kept, own, own) is None:
            taken += 1
    plural = "" if len(modules) == 1 else "s"
    return f"{method} was already replaced on {taken} of {len(modules)} module{plural}" if taken else None


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Load a module's own parameters, which accelerate offloads until the module is called."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def made_around(wrapper: Any, old: Any, new: Any) -> Any:
    """Copy a wrapper of ``old``, such as accelerate's wrapper of ``forward`` for mixed precision, to wrap ``new``.

    Returns:
        A copy of ``wrapper``, which itself is not changed, because copies of a model share it. None if it does not wrap
        ``old`` in a way that can be recognised: as a bound method, or in a function or object with ``__wrapped__``.
    """
    if wrapper is old:
        return new
    if isinstance(wrapper, MethodType):
        inner = made_around(wrapper.__func__, old, new)
        return None if inner is None else MethodType(inner, wrapper.__self__)
    attributes = getattr(wrapper, "__dict__", {})
    wrapped = attributes.get("__wrapped__")
    if wrapped is None or "_torchdynamo_orig_callable" in attributes:  # a copy would not be compiled again
        return None
    inner = made_around(wrapped, old, new)
    cells = getattr(wrapper, "__closure__", None) or ()
    held = [_content(cell) for cell in cells] + [value for name, value in attributes.items() if name != "__wrapped__"]
    if inner is None or not any(value is wrapped for value in held):
        return None
    if isinstance(wrapper, FunctionType):
        closure = tuple(CellType(inner) if _content(cell) is wrapped else cell for cell in cells)
        code = wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__
        twin: Any = functools.update_wrapper(FunctionType(*code, closure), wrapper)
        twin.__kwdefaults__ = wrapper.__kwdefaults__
    else:
        twin = object.__new__(type(wrapper))
    twin.__dict__.update({name: inner if value is wrapped else value for name, value in attributes.items()})
    return twin


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def is_bare(module: nn.Module) -> bool:
    """Return whether a call runs only the ``forward`` of the class, without hooks or a ``forward`` on the instance."""
    own = module.__dict__  # read once: each attribute of a module costs 0.05 us, and this runs 10 times per layer
    return not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or HOOKS["_global_forward_pre_hooks"]
        or HOOKS["_global_forward_hooks"]
        or HOOKS["_global_backward_pre_hooks"]
        or HOOKS["_global_backward_hooks"]
    )


def is_plain(module: nn.Module | None, cls: type[M]) -> TypeGuard[M]:
    """Return whether calling the module does what ``cls`` does and nothing else."""
    return type(module) is cls and is_bare(module)


def child(owner: nn.Module, name: str) -> Any:
    """Return ``owner.<name>``; for a module this is ten times as fast, because torch looks among its modules last."""
    module = owner.__dict__["_modules"].get(name)
    return getattr(owner, name) if module is None else module


def project(owner: nn.Module, name: str, x: Tensor, linear: Callable[..., Tensor] | None = None) -> Tensor:
    """Return ``owner.<name>(x)`` of a projection.

    If that is only a `torch.nn.functional.linear`, it is called directly, or ``linear`` in its place: calling the
    module costs the host 5 us, as much as the launch, and a decoder layer has seven projections. What torch.compile
    traces must call the module.
    """
    parameters = _linear(owner, name)
    if parameters is None:
        projected: Tensor = getattr(owner, name)(x)
        return projected
    return (linear or F.linear)(x, *parameters)  # torch's is looked up now, because other code may replace it


def project_all(owner: nn.Module, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Return what `project` gives for several projections of (B, T, D), or the same elements as (B * T, D') rows.

    torch makes rows of the input of each matmul, which costs the host 1 us; here they are made once. Its matmul of what
    is not contiguous has other roundings, and is left to it.
    """
    found = [_linear(owner, name) for name in names]
    if None in found or not x.is_contiguous():
        return [project(owner, name, x) for name in names]
    rows = x.view(-1, x.shape[-1])
    return [F.linear(rows, *parameters) for parameters in found]  # type: ignore[misc]


def _linear(owner: nn.Module, name: str) -> tuple[Any, Any] | None:
    """Return the weight and the bias of a projection whose call is only a matmul; else None."""
    module = owner.__dict__["_modules"].get(name)
    if type(module) is _Linear and _Linear.forward is _LINEAR and is_bare(module):
        parameters = module.__dict__["_parameters"]
        if "weight" in parameters and "bias" in parameters:  # FSDP keeps its shards elsewhere
            return parameters["weight"], parameters["bias"]
    return None


def run_of(owner: nn.Module, name: str) -> tuple[Callable[..., Any], Any]:
    """Return ``owner.<name>`` and the function that its call runs, which takes the module as its first argument.

    If a call only runs the ``forward`` of the class, it is that function, or the replacement behind it: the calls in
    between cost the host 2 us. What torch.compile traces must call the module.
    """
    module = child(owner, name)
    cls = type(module)
    if cls.__call__ is _CALL and is_bare(module):
        forward = getattr(cls, "forward", None)
        if type(forward) is FunctionType:  # scripted modules have an object
            direct: Any = getattr(forward, DIRECT, (None, None))
            return direct[1] if direct[0] is forward else forward, module
    return cls.__call__, module


def calls_early(module: nn.Module) -> bool:
    """Return whether a call runs anything before the ``forward`` of the class: a hook, or a method on the instance."""
    own = module.__dict__
    return bool(own["_forward_pre_hooks"]) or "forward" in own
