"""``python -m vlmfast scan``: which methods of the installed transformers are known, and which only look like them.

Modelling files are parsed, not imported, so that their dependencies need not be installed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfast.console import CommandError, needed, version, writable
from vlmfast.patches.bodies import BODIES, Body
from vlmfast.patches.plan import find_sites, is_like, may_be_known
from vlmfast.patches.upstream import Source, Text, closure

KNOWN = {(body.method, body.key): body for body in BODIES}
METHODS = tuple(dict.fromkeys(body.method for body in BODIES if isinstance(body.key, str)))


@dataclass(frozen=True)
class Found:
    """A method whose body is known or looks like a known one."""

    site: str  # "<model folder>.<Class>.<method>"
    digest: str
    body: Body | None  # None if the body is unknown


@dataclass(frozen=True, eq=False)
class Module:
    """A modelling file: its functions and classes, and the classes that it imports from other modelling files."""

    path: Path
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imported: dict[str, Path] = field(default_factory=dict)

    @classmethod
    @functools.cache
    def read(cls, path: Path) -> Module:
        """Parse the file."""
        module = cls(path)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                module.functions[node.name] = node
            elif isinstance(node, ast.ClassDef):
                module.classes[node.name] = node
            elif isinstance(node, ast.ImportFrom) and node.module and ".modeling_" in f".{node.module}":
                file = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
                if "models" not in file.parts or not file.exists():  # not a model's file, such as modeling_utils.py
                    continue
                module.imported.update({alias.asname or alias.name: file for alias in node.names})
        return module

    def ancestry(self, name: str) -> Iterator[tuple[ast.ClassDef, Module]]:
        """Yield a class and its bases in the order of attribute lookup, as far as modelling files define them."""
        if name in self.classes:
            yield self.classes[name], self
            for base in self.classes[name].bases:
                yield from self.ancestry(getattr(base, "id", ""))
        elif name in self.imported:
            yield from Module.read(self.imported[name]).ancestry(name)

    def method(self, class_name: str, name: str) -> tuple[ast.FunctionDef, Module] | None:
        """Find a method of a class and the file that defines it."""
        for node, module in self.ancestry(class_name):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == name:
                    return item, module
        return None

    def source(self, class_name: str, method: str) -> Source:
        """Return the same as `vlmfast.patches.upstream.source` does for the class, without importing it."""

        def resolve(name: str, is_method: bool, place: Any) -> tuple[Text, Any] | None:
            if is_method:
                found = self.method(class_name, name)
            else:
                found = (place.functions[name], place) if name in place.functions else None
            return None if found is None else (_text(found[0]), found[1])

        return closure(method, resolve)


@functools.cache
def _text(node: ast.FunctionDef) -> Text:
    return Text.of(node)


def scan(folder: Path | None = None) -> list[Found]:
    """Find every method in transformers' modelling files that is known or looks like a known one.

    Args:
        folder: the folder of the transformers package; None for the installed one.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
    """
    if folder is None:
        spec = importlib.util.find_spec("transformers")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("transformers is not installed")
        folder = Path(spec.origin).parent
    found = []
    for path in sorted(folder.glob("models/**/modeling_*.py")):
        module = Module.read(path)
        for class_name in module.classes:
            for method in METHODS:
                definition = module.method(class_name, method)
                if definition is None:
                    continue
                parameters = definition[0].args
                named = [each.arg for each in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)]
                starred = parameters.vararg is not None or parameters.kwarg is not None
                if method == "forward" and not may_be_known(class_name, named, starred):
                    continue
                source = module.source(class_name, method)
                body = KNOWN.get((method, source.digest))
                if body is not None or is_like(class_name, method, source):
                    site = f"{path.stem.removeprefix('modeling_')}.{class_name}.{method}"
                    found.append(Found(site, source.digest, body))
    return found


def model_types() -> dict[str, list[str] | str]:
    """Find the sites of every image-text-to-text model type, in the model that its default configuration builds.

    Returns:
        Model type -> the names of its sites, or why the model cannot be built.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    found: dict[str, list[str] | str] = {}
    for model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        try:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type]())
        except Exception as error:  # some default configurations build no model, or need a library that is missing
            found[model_type] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:100]
        else:
            found[model_type] = sorted({site.name for site in find_sites(model)})
    return found


def grouped(found: list[Found]) -> dict[str, list[str]]:
    """Map each digest to the sites that have it, the digests with most sites first."""
    sites: dict[str, list[str]] = {}
    for each in found:
        sites.setdefault(each.digest, []).append(each.site)
    return dict(sorted(sites.items(), key=lambda item: (-len(item[1]), item[0])))


def run(options: Namespace) -> None:
    """Print the methods that each replacement reaches, and the unknown bodies, those of most classes first.

    With ``options.file``, print nothing and update that JSON file, from which ``make docs`` makes docs/families.md.
    """
    needed("transformers", "scan")
    file = options.file
    seen = _read(file)
    found = scan()
    if file is not None:
        seen[str(version("transformers"))] = {"bodies": grouped(found), "types": model_types()}
        file.write_text(json.dumps(seen, indent=0, sort_keys=False) + "\n")
        return
    groups: dict[str, dict[str, list[str]]] = {"known": {}, "left alone": {}, "unknown": {}}
    for each in found:
        if each.body is None:
            groups["unknown"].setdefault(each.digest, []).append(each.site)
        elif each.body.function is None:
            groups["left alone"].setdefault(each.body.says, []).append(each.site)
        else:
            groups["known"].setdefault(each.body.function.__name__, []).append(each.site)
    for title, sites_of in groups.items():
        print(f"{title}: {sum(map(len, sites_of.values()))} methods")
        for name, sites in sorted(sites_of.items(), key=lambda item: -len(item[1])):
            print(f"{len(sites):5} {name}: {', '.join(sites)}")


def _read(file: Path | None) -> dict[str, Any]:
    """Read what an earlier scan wrote, which may be of other releases; nothing without a file.

    Raises:
        CommandError: if the file was not written by ``scan``.
    """
    writable("PATH.json", file)
    if file is None or not file.exists():
        return {}
    try:
        seen = json.loads(file.read_text())
    except ValueError:
        seen = None
    if not isinstance(seen, dict):
        raise CommandError(f"PATH.json: {file} is not what `scan` writes")
    return seen


if __name__ == "__main__":
    sys.exit(importlib.import_module("vlmfast.cli").entry(["scan", *sys.argv[1:]]))
