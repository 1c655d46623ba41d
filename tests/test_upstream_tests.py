"""scripts/upstream_tests.py on a checkout with a passing test, one that a patch breaks and one that it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.patches_models import tiny

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

config, inputs = torch.load("llava.pt", weights_only=False)


@pytest.mark.parametrize("cls", [LlavaModel, LlavaForConditionalGeneration])
def test_runs(cls):
    model = cls(config).eval()
    assert model(**inputs)[0].shape[:2] == inputs["input_ids"].shape


def test_generates():
    model = LlavaForConditionalGeneration(config).eval()
    assert model.generate(**inputs, max_new_tokens=1).shape[0] == inputs["input_ids"].shape[0]


def test_is_not_patched():
    model = LlavaForConditionalGeneration(config)
    model(**inputs)
    assert type(model) is LlavaForConditionalGeneration, "it is patched"


def test_is_refused():
    LlavaForConditionalGeneration(config)(**inputs, labels=inputs["input_ids"], shift_labels=inputs["input_ids"])


@pytest.mark.parametrize("number", [1, 2])
def test_fails_anyway(number):
    assert number == 0
"""
SAID = """
unpatched: 5 of 7 pass
patch: 5 of 5 pass, 0 are refused by design
even:1.0: 3 of 5 pass, 1 are refused by design
  1 x shift_labels cannot be given where visual tokens are reduced: it belongs to the full prompt
"""


@pytest.mark.thorough
def test_what_passes_unpatched_is_held_against_what_passes_patched(tmp_path: Path):
    import torch

    folder = tmp_path / "tests" / "models" / "llava"
    folder.mkdir(parents=True)
    (folder / "test_modeling_llava.py").write_text(TESTS)
    model, inputs = tiny("llava")
    torch.save((model.config, inputs), tmp_path / "llava.pt")

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "upstream_tests.py"), str(tmp_path), "llava", *more],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run()
    assert done.returncode == 1, done.stderr
    for line in SAID.strip().splitlines():
        assert line in done.stdout.splitlines()
    assert "it is patched" in done.stdout
    assert done.stdout.splitlines()[-1] == "  tests/models/llava/test_modeling_llava.py::test_is_not_patched"
    nothing = run("-k", "fails_anyway")
    assert nothing.returncode == 2
    assert "no test" in nothing.stderr
