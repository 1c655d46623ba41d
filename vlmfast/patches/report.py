"""Report on a patch: what the model runs now, not what it ran when it was patched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from vlmfast.modules import made_around, replaced_on_instances
from vlmfast.patches.layers import obstacles
from vlmfast.patches.plan import find_sites
from vlmfast.patches.residual import FOLLOWING


@dataclass(frozen=True)
class Placed:
    """Where a patch has put its replacements.

    Attributes:
        model: the patched model.
        names: original class -> replaced method -> name of its site.
        classes: the classes of all modules before the patch.
    """

    model: nn.Module
    names: dict[type, dict[str, str]]
    classes: frozenset[type]

    def rows(self) -> dict[str, str]:
        """Map each replaced site to how many modules run the replacement now, and add sites that came later."""
        running, others = Counter[str](), Counter[str]()
        apart: dict[str, Counter[str]] = {}
        unfused: dict[str, Counter[str]] = {}
        for module in self.model.modules():
            cls = type(module)
            for method, name in self.names.get(getattr(cls, "original_class", cls), {}).items():
                runs = _runs(module, method)
                (running if runs else others)[name] += 1
                if runs and FOLLOWING in vars(module) and (reasons := Counter(obstacles(module))):
                    apart.setdefault(name, Counter()).update(reasons)
                # A replacement with this attribute can say why parts of it run as modules.
                why = getattr(getattr(cls, method, None), "unfused", None)
                if why is not None and (reason := why(module)):
                    unfused.setdefault(name, Counter())[reason] += 1
        rows = {name: count(running[name], "module") for methods in self.names.values() for name in methods.values()}
        for name, reasons in apart.items():
            told = "; ".join(f"{number} {reason}" for reason, number in reasons.items())
            rows[name] += f"; additions apart from their norm: {told}"
        for name, reasons in unfused.items():
            rows[name] += "".join(f"; {number} with norms apart: {reason}" for reason, number in reasons.items())
        for name, number in others.items():
            rows[name] += f"; {number} not: replaced again or new since the patch"
        for site in find_sites(self.model):
            if type(site.modules[0]) not in self.classes:
                rows[site.name] = f"skipped: {site.reason or 'it came after the patch'}"
        return rows


def _runs(module: nn.Module, method: str) -> bool:
    """Tell whether calling the method of this module runs the replacement."""
    cls = type(module)
    ours = getattr(cls, "replacements", {}).get(method)
    if ours is None or made_around(getattr(cls, method), ours, ours) is None:  # FSDP2's subclass of a layer wraps it
        return False
    return not replaced_on_instances([module], cls, method)


def count(number: int, noun: str) -> str:
    """Write a number and its noun, in the plural unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
