"""scripts/upstream_tests.py on trees with a passing test, one that a patch breaks and one that it refuses."""

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

COMMON = """
from .exporters.test_export import ExportTesterMixin
from .generation.test_utils import GenerationTesterMixin


class ModelTesterMixin(ExportTesterMixin):
    def made(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return [cls(config).eval() for cls in self.all_model_classes], inputs

    def test_runs(self):
        for model in self.made()[0]:
            _, inputs = self.made()
            size = (self.model_tester.batch_size, self.model_tester.seq_length)
            assert model(**inputs)[0].shape[:2] == size

    def test_is_not_patched(self):
        (_, model), inputs = self.made()
        model(**inputs)
        assert not [module for module in model.modules() if hasattr(module, "original_class")], "it is patched"

    def test_is_refused(self):
        (_, model), inputs = self.made()
        model(**inputs, labels=inputs["input_ids"], shift_labels=inputs["input_ids"])
"""
SAID_OF_COMMON = """
unpatched: 3 of 3 pass
patch: 2 of 3 pass, 0 are refused by design
even:1.0: 1 of 3 pass, 1 are refused by design
"""


def run(tree: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "upstream_tests.py"), str(tree), "llava", *more],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.thorough
def test_what_passes_unpatched_is_held_against_what_passes_patched(tmp_path: Path):
    import torch

    folder = tmp_path / "tests" / "models" / "llava"
    folder.mkdir(parents=True)
    (folder / "test_modeling_llava.py").write_text(TESTS)
    model, inputs = tiny("llava")
    torch.save((model.config, inputs), tmp_path / "llava.pt")

    done = run(tmp_path)
    assert done.returncode == 1, done.stderr
    for line in SAID.strip().splitlines():
        assert line in done.stdout.splitlines()
    assert "it is patched" in done.stdout
    assert done.stdout.splitlines()[-1] == "  tests/models/llava/test_modeling_llava.py::test_is_not_patched"
    nothing = run(tmp_path, "-k", "fails_anyway")
    assert nothing.returncode == 2
    assert "no test" in nothing.stderr


@pytest.mark.thorough
def test_a_source_distribution_has_only_the_common_tests(tmp_path: Path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_modeling_common.py").write_text(COMMON)
    done = run(tmp_path)
    assert done.returncode == 1, done.stderr
    for line in SAID_OF_COMMON.strip().splitlines():
        assert line in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "  tests/helpers/upstream_testers.py::llava::test_is_not_patched"
