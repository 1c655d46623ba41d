"""Export the Triton kernels as a kernel of the Hugging Face Hub, which `kernels.get_kernel` loads without vlmfast.

    python scripts/export_hub_kernel.py FOLDER [--backends cuda rocm]

FOLDER is then a repository: FOLDER/build/torch-<backend> holds the files of kernels/ with relative imports, their
launchers by name, ``layers`` for ``kernels.LocalLayerRepository``, and the metadata that `kernels` 0.16 and later ask
for. The launchers are those of vlmfast without its checks, gradients and choice of a backend.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from pathlib import Path

import vlmfast  # noqa: F401  registers the ops
from vlmfast.registry import OPS

ROOT = Path(__file__).parents[1]
SHARED = ("PLAIN", "subclass")  # what kernels/ imports from vlmfast/backends.py
BACKENDS = ("cuda", "rocm", "cpu")  # "cpu" is for Triton's interpreter
IMPORT = re.compile(r"^(\s*from )vlmfast\.(?:kernels\.)?([\w.]+)", re.MULTILINE)

LAYERS = '''"""Norms of transformers in Triton, for inference. A module that they cannot run runs its own forward."""

import torch
from torch import Tensor, nn

from .rms_norm import rms_norm, unsupported

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _normalise(module: nn.Module, x: Tensor, eps: float, variant: str) -> Tensor:
    if {x.dtype, module.weight.dtype} <= {*DTYPES} and x.device == module.weight.device and unsupported(x) is None:
        return rms_norm(x, module.weight, eps, variant)
    return type(module).forward(module, x)


class LlamaRMSNorm(nn.Module):
    """Rounds before it multiplies by the weight, as most classes named "RMSNorm" do."""

    has_backward = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise(self, hidden_states, self.variance_epsilon, "llama")


class OlmoRMSNorm(nn.Module):
    """Multiplies by the weight in float32, as "RMSNorm" of OLMo 2, gpt-oss and Nemotron-H does."""

    has_backward = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise(self, hidden_states, self.variance_epsilon, "olmo")


class GemmaRMSNorm(nn.Module):
    """Multiplies by 1 + weight in float32, as "RMSNormZeroCentered" of Qwen3.5 does."""

    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return _normalise(self, x, self.eps, "gemma")
'''

README = """---
library_name: kernels
license: apache-2.0
tags: [kernels]
---

Triton kernels of vlmfast: {names}.

`kernels.get_kernel` gives their launchers, `layers` the norms of transformers: LlamaRMSNorm, OlmoRMSNorm, GemmaRMSNorm.
"""


def relative(text: str, depth: int) -> str:
    """Make the imports from vlmfast relative to a package that holds vlmfast's modules and the families of kernels/."""
    return IMPORT.sub(lambda found: f"{found[1]}{'.' * (depth + 1)}{found[2]}", text)


def sources() -> dict[str, str]:
    """Return the files of the package: path -> text."""
    kernels = ROOT / "kernels"
    found = {path.relative_to(kernels).as_posix(): path.read_text() for path in sorted(kernels.rglob("*.py"))}
    text = (ROOT / "vlmfast/backends.py").read_text()
    body = ast.parse(text).body
    named = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    named |= {ast.unparse(node.targets[0]): node for node in body if isinstance(node, ast.Assign)}
    shared = [ast.get_source_segment(text, named[name]) for name in SHARED]
    found["backends.py"] = "\n\n\n".join(["import torch\nfrom torch import Tensor", *shared]) + "\n"
    return {name: relative(text, name.count("/")) for name, text in found.items()}


def launchers(files: dict[str, str]) -> dict[str, list[str]]:
    """Return the ops that the file of each family in kernels/ launches."""
    found: dict[str, list[str]] = {}
    for op in OPS.values():
        text = files.get(f"{op.family}.py") or files.get(f"{op.family}/__init__.py", "")
        if f"\ndef {op.name}(" in text:
            found.setdefault(op.family, []).append(op.name)
    return found


def export(folder: Path, backends: tuple[str, ...]) -> list[str]:
    """Write the repository, and return the names of its launchers."""
    files = sources()
    of = launchers(files)
    names = sorted(name for found in of.values() for name in found)
    lines = [f"from .{family} import {', '.join(found)}" for family, found in of.items()]
    listed = "\n".join(f'    "{name}",' for name in [*names, "layers"])
    files["__init__.py"] = "\n".join(["from . import layers", *lines, "", f"__all__ = [\n{listed}\n]", ""])
    files["layers.py"] = LAYERS
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:10]
    for backend in backends:
        build = folder / "build" / f"torch-{backend}"
        metadata = {
            "id": f"_vlmfast_{backend}_{digest}",
            "name": "vlmfast",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        for name, text in {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"}.items():
            path = build / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (folder / "README.md").write_text(README.format(names=", ".join(names)))
    return names


def main() -> None:
    """Export to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS[:2])
    arguments = parser.parse_args()
    names = export(arguments.folder, tuple(arguments.backends))
    print(f"{arguments.folder}: {len(names)} launchers for {', '.join(arguments.backends)}")


if __name__ == "__main__":
    main()
