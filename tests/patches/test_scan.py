"""The table of bodies agrees with the scan of transformers' files and docs/families.json, and a body is one line."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from vlmfast.patches import scan
from vlmfast.patches.bodies import BODIES
from vlmfast.patches.upstream import source

ROOT = Path(__file__).parents[2]
SEEN = json.loads((ROOT / "docs" / "families.json").read_text())
FOLDER = Path(transformers.__file__).parent
HERE = SEEN.get(transformers.__version__, {"bodies": {}})["bodies"]


def module_of(site: str) -> scan.Module:
    (path,) = FOLDER.glob(f"models/**/modeling_{site.split('.')[0]}.py")
    return scan.Module.read(path)


@pytest.mark.parametrize(("digest", "site"), [(digest, sites[0]) for digest, sites in HERE.items()])
def test_file_and_import_say_what_was_seen(digest: str, site: str):
    _, class_name, method = site.split(".")
    module = module_of(site)
    assert module.source(class_name, method).digest == digest
    name = ".".join(("transformers", *module.path.relative_to(FOLDER).with_suffix("").parts))
    assert source(getattr(importlib.import_module(name), class_name), method).digest == digest


def test_scan_finds_what_was_seen(tmp_path: Path):
    folder = tmp_path / "models"
    expected = {}
    for name in ("qwen3_vl", "gemma3", "idefics3"):
        path = FOLDER / "models" / name / f"modeling_{name}.py"
        (folder / name).mkdir(parents=True)
        shutil.copy(path, folder / name)
        expected |= {s: d for d, sites in HERE.items() for s in sites if s.startswith(f"{name}.")}
    found = scan.scan(tmp_path)
    assert {each.site: each.digest for each in found} == expected
    assert all(each.body is not None for each in found)


def test_every_body_was_seen():
    digests = {digest for found in SEEN.values() for digest in found["bodies"]}
    assert {body.key for body in BODIES if isinstance(body.key, str)} <= digests


@pytest.mark.skipif(Version(transformers.__version__) != Version("5.23.0"), reason="the counts are of 5.23.0")
def test_most_norms_and_masks_are_known():
    known = {body.key for body in BODIES if body.function is not None}
    for kind, least in (("RMSNorm", 160), ("get_placeholder_mask", 75)):
        assert sum(digest in known for digest, sites in HERE.items() for site in sites if kind in site) >= least


@pytest.mark.parametrize("text", ["x: int = 3\n    return x", "'says nothing'\n    return 3", "return 3  # three"])
def test_what_changes_nothing(text: str):
    plain, told = (ast.parse(f"def f(self):\n    {body}").body[0] for body in ("return 3", text))
    same = scan._text(plain).code == scan._text(told).code
    assert same == ("x" not in text)


TOY = """
from torch import nn

class Toy(nn.Module):
    def forward(self, x):
        return self.shifted(x) * 2

    def shifted(self, x):
        return x + self.shift
"""
USE = """
import torch, vlmfast
from toy import Toy

class Derived(Toy):
    shift = 1

model = Derived()
try:
    vlmfast.patch(model)
except ValueError as error:
    assert "vlmfast knows no method" in str(error)
    print("unknown")
else:
    print(model(torch.tensor(3)).item())
"""


@pytest.mark.thorough
def test_a_new_body_is_one_line(tmp_path: Path):
    """In a copy of the package, one new line replaces the method of a toy model, which doubles its input."""
    ignored = shutil.ignore_patterns("__pycache__", "benchmarks", "kernels", "*.so")
    shutil.copytree(ROOT / "vlmfast", tmp_path / "vlmfast", ignore=ignored)
    for name, text in (("toy", TOY), ("use", USE)):
        (tmp_path / f"{name}.py").write_text(text)
    (toy,) = [node for node in ast.walk(ast.parse(TOY)) if isinstance(node, ast.ClassDef)]
    digest = scan.Module(tmp_path / "toy.py", classes={"Toy": toy}).source("Toy", "forward").digest
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    def said() -> str:
        command = [sys.executable, "-W", "ignore", str(tmp_path / "use.py")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert said() == "unknown"
    table = tmp_path / "vlmfast" / "patches" / "bodies.py"
    line = f'    Body("forward", "{digest}", lambda self, x: x + self.shift, "shifts and doubles: a toy"),\n'
    table.write_text(table.read_text().replace("BODIES = (\n", f"BODIES = (\n{line}"))
    assert said() == "4"
