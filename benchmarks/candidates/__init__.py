"""Ops that wait for a GPU to time them, laid out as in the package: ``ops/<family>`` and ``kernels/<family>``.

They stay out of `vlmfast.registry.OPS`, of which docs and the generated tests are made.
"""

import importlib
import pkgutil

from vlmfast.registry import OPS, Op

FAMILIES = [found.name for found in pkgutil.iter_modules([f"{__path__[0]}/ops"])]
CANDIDATES: dict[str, Op] = {
    name: OPS.pop(name) for family in FAMILIES for name in importlib.import_module(f"{__name__}.ops.{family}").__all__
}
