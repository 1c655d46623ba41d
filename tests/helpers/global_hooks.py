"""Record what global module hooks see, which profilers and debuggers register for all modules of the process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import nn
from torch.nn.modules import module as hooks

REGISTER = {
    "before": hooks.register_module_forward_pre_hook,
    "after": hooks.register_module_forward_hook,
    "before its gradient": hooks.register_module_full_backward_pre_hook,
    "after its gradient": hooks.register_module_full_backward_hook,
}


def seen_by_global_hooks(model: nn.Module, step: Callable[[], object]) -> Counter[tuple[str, str]]:
    """Count how often each kind of global hook, registered alone, sees each module of the model in ``step``."""
    names = {module: name for name, module in model.named_modules()}
    seen: Counter[tuple[str, str]] = Counter()
    for kind, register in REGISTER.items():
        handle = register(
            lambda module, *_, kind=kind: seen.update([(kind, names[module])]) if module in names else None
        )
        try:
            step()
        finally:
            handle.remove()
    return seen
