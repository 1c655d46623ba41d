"""The ops: one folder per family, whose ``__all__`` lists the ops that are public.

``definition.py`` defines the ops; ``cases.py`` has the calls by which they are tested and timed.
"""

import importlib
import pkgutil

FAMILIES = tuple(found.name for found in pkgutil.iter_modules(__path__) if found.ispkg)
PUBLIC = {
    name: getattr(family, name)
    for family in [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
    for name in family.__all__
}
