"""In a copy of the tree, a new op is one folder in each of vlmfast/ops, kernels and csrc, and no line elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlmfast
from tests.emulation import build

ROOT = Path(vlmfast.__file__).parents[1]
PARTS = ("vlmfast", "kernels", "csrc/common", "benchmarks", "scripts", "tests", "docs")
FILES = ("pyproject.toml", "setup.py", "README.md")
TESTS = ("tests/ops/test_generated.py", "tests/ops/test_traffic.py", "tests/test_static.py")
GENERATED = {
    "bad_calls_are_refused",
    "errors_and_roundings_are_those_of_hugging_face",
    "gradients",
    "gradients_of_some_inputs",
    "op_is_documented",
    "traffic",
    "triton_launcher_has_the_signature_of_the_definition",
}
pytestmark = pytest.mark.thorough
QUIET = ("-q", "-p", "no:cacheprovider")
USE = """
import runpy, torch, vlmfast

x, factors = torch.randn(3, 8), torch.randn(3)
assert torch.equal(vlmfast.scale_rows(x, factors), x * factors[:, None])
assert "scale_rows" in vlmfast.__all__
assert "triton: runs" in vlmfast.explain(vlmfast.scale_rows, x, factors)
docs = runpy.run_path("scripts/make_docs.py")
assert "## `scale_rows`" in docs["page"]()
assert "import scale_rows" in docs["stub"]()
"""
TIME = """
from vlmfast.benchmarks import command, ops
from vlmfast.registry import OPS

assert "scale_rows" in command.KNOWN
found = ops.contenders(OPS["scale_rows"], (torch.randn(3, 8), torch.randn(3)), ("torch", "compile"))
assert [contender.name for contender in found] == ["vlmfast triton", "torch.compile", "copy"]
"""
BUILD = """
import pathlib, runpy, setuptools

setuptools.setup = lambda **_: None
setup = runpy.run_path("setup.py")
pathlib.Path("csrc/scale_rows/cpu.cpp").touch()
commands = setup["cpu_commands"](setup["import_torch"](), ["c++"])
assert any(command[-1].endswith("scale_rows/cpu.cpp") for command in commands)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that runs Python in a copy of the tree with the toy op, whose csrc has no other family.

    Compiling the other families would take a minute.
    """
    copy = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=ignored)
    for file in FILES:
        shutil.copy(ROOT / file, copy)
    shutil.copytree(Path(__file__).parent / "toy", copy, dirs_exist_ok=True)

    def python(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": "1"}
        environment["VLMFAST_TEST_REQUIRE"] = "triton,emulated,torch"  # the toy has no kernel for the CPU
        ran = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    return python


def test_it_is_public_explained_documented_and_timed(run):
    pytest.importorskip("triton")
    run("-c", USE + TIME)


def test_it_is_built(run):
    run("-c", BUILD)


def test_the_generated_tests_have_it(run):
    """Its Triton kernel passes the tests of rounding, gradients, bad calls, docs, signatures and traffic."""
    pytest.importorskip("triton")
    chosen = "roundings or gradients or bad_calls or documented or traffic or signature"
    output = run("-m", "pytest", "-v", *QUIET[1:], *TESTS, "-k", f"scale_rows and ({chosen}) and not emulated")
    passed = set(re.findall(r"::test_(\w+)\[\S*scale_rows\S* PASSED", output))
    assert passed >= GENERATED, GENERATED - passed


def test_the_traffic_of_its_cuda_kernel_is_counted(run):
    if reason := build.missing():
        pytest.skip(reason)
    assert "1 passed" in run("-m", "pytest", *QUIET, *TESTS, "-k", "test_traffic and scale_rows and emulated")
