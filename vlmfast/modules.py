"""Find the Hugging Face model in a module, and tell what others did to modules: hooks, methods on instances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def hugging_face_model(model: object) -> nn.Module:
    """Find the one outermost module in ``model`` that has a ``config.model_type``.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: if it holds none, or several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

    def outermost(module: nn.Module) -> list[nn.Module]:
        if isinstance(getattr(getattr(module, "config", None), "model_type", None), str):
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
    """Say on how many of these modules of ``cls`` somebody else replaced the method, which would hide ours."""
    modules, taken = list(modules), 0
    for module in modules:
        # accelerate's hooks call the method that they keep here; `kernelize` assigns to the instance
        bound = vars(module).get(f"_old_{method}" if "_hf_hook" in vars(module) else method)
        if bound is not None and getattr(bound, "__func__", None) is not getattr(cls, method):
            taken += 1
    plural = "" if len(modules) == 1 else "s"
    return f"{method} was already replaced on {taken} of {len(modules)} module{plural}" if taken else None


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Have a module's own parameters loaded, which accelerate offloads until the module is called."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def is_bare(module: nn.Module) -> bool:
    """Tell whether a call runs the ``forward`` of the class and nothing else: no hook, no method on the instance."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return "forward" not in vars(module) and not any(hooks) and not _has_any_global_hook()  # type: ignore[no-untyped-call]
