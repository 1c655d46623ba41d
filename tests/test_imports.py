"""Imports within the package: no cycles, and a definition does not import its cases."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmfast

ROOT = Path(vlmfast.__file__).parents[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path
    for path in (ROOT / "vlmfast").rglob("*.py")
    if path.relative_to(ROOT).parts[1] not in {"kernels", "benchmarks"}
}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run on import: none inside functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)) and "TYPE_CHECKING" not in ast.unparse(node):
            yield from statements([*node.body, *getattr(node, "orelse", [])])


def imports(module: str) -> set[str]:
    """Return the other modules of the package that a module imports."""
    found: set[str] = set()
    for node in statements(ast.parse(MODULES[module].read_text()).body):
        if isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules if len(submodules) == len(node.names) else submodules | {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys() - {module}


def test_nothing_is_imported_in_a_circle():
    """A package may import its modules, as long as none of them imports the package itself."""
    left = {module: imports(module) for module in MODULES}
    while ready := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in ready:
            del left[module]
    assert not left


LOADED = """
import sys, torch

before = set(sys.modules)
import vlmfast

new = set(sys.modules) - before
packages = {name.split(".")[0] for name in new} - {"vlmfast", "torch", *sys.stdlib_module_names}
print(sorted(packages | {name for name in new if "cases" in name or "benchmarks" in name}))
"""


def test_importing_vlmfast_loads_torch_alone():
    """`import vlmfast` imports no other package than torch, and neither cases nor benchmarks."""
    ran = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("vlmfast.ops.")])
def test_a_definition_knows_no_cases(module: str):
    assert module.endswith(".cases") or not [name for name in imports(module) if name.endswith("cases")]
